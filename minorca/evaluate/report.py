"""A suite's scores beside the published ones: as markdown, as JSON and as a picture."""

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minorca.evaluate.published import COLUMNS, PUBLISHED, SOURCES, Published
from minorca.evaluate.suites import BESIDE, MT_BENCH, Score, SuiteResult
from minorca.files.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"": "", "derived": " (d)", "unconfirmed": " (u)"}


def write(results: Sequence[SuiteResult], model: str, conditions: str, file: Path) -> None:
    """Writes the table and the picture beside `file`.

    Args:
        model: what to call the model that was evaluated.
        conditions: how it was.

    Raises:
        UserError: a file cannot be written.
    """
    for suffix, content in zip(BESIDE, (to_markdown(results, model, conditions), draw(results, model))):
        write_file(file.with_suffix(suffix), content)


# ---------------------------------------------------------------------------------------------------------------- JSON


def to_json(results: Sequence[SuiteResult]) -> dict:
    """By suite: its scores, each with its standard error and the published scores."""
    return {
        result.suite: {
            "averages": [_score_to_json(result.suite, score) for score in result.averages],
            "members": [_score_to_json(result.suite, score) for score in result.members],
        }
        for result in results
    }


def _score_to_json(suite: str, score: Score) -> dict:
    published = {
        column: {"value": found.value, "note": found.note, "source": SOURCES[found.source]}
        for column, found in _published(suite, score).items()
    }
    return asdict(score) | {"published": published}


def _published(suite: str, score: Score) -> dict[str, Published]:
    known = PUBLISHED[suite]
    return {column: known[column, score.name] for column in COLUMNS if (column, score.name) in known}


# ------------------------------------------------------------------------------------------------------------ markdown


def to_markdown(results: Sequence[SuiteResult], model: str, conditions: str) -> str:
    """A table a suite, averages first, how the model was evaluated, and what the published scores are."""
    model = model.replace("|", "\\|")
    lines = []
    sources = set()
    for result in results:
        unit = "1 to 10" if result.suite == MT_BENCH else "percent"
        lines += [f"## {result.title} ({unit})", "", f"| | {model} | {' | '.join(COLUMNS)} | |"]
        lines += ["| --- | ---: |" + " ---: |" * len(COLUMNS) + " --- |"]
        for score in (*result.averages, *result.members):
            published = _published(result.suite, score)
            sources |= {found.source for found in published.values()}
            cells = [f"{found.value:.2f}{MARKS[found.note]}" if found else "" for found in map(published.get, COLUMNS)]
            name = f"**{score.name}**" if score in result.averages else score.name
            lines.append(f"| {name} | {_with_error(score)} | {' | '.join(cells)} | {_detail(score)} |")
        lines.append("")
    lines += [
        f"{model}: {conditions}.",
        "",
        "± is one standard error; of averages, that of the mean of independent tasks, of MT-Bench that over questions. "
        "(d): derived from published numbers. (u): unconfirmed. The published scores of lm_eval's tasks were measured "
        "by the harnesses of 2023, without BOS and chat template.",
        "",
        "Sources:",
        "",
        *[f"- {text}" for source, text in SOURCES.items() if source in sources],
    ]
    return "\n".join(lines) + "\n"


def _with_error(score: Score) -> str:
    return f"{score.value:.2f}" if score.stderr is None else f"{score.value:.2f} ± {score.stderr:.2f}"


def _detail(score: Score) -> str:
    limited = f"; only {score.rows} of {score.available} rows" if score.rows < score.available else ""
    return score.detail + limited


# ------------------------------------------------------------------------------------------------------------- picture


def draw(results: Sequence[SuiteResult], model: str) -> bytes:
    """Bars of each suite's average, as PNG; of a single suite its other averages and its tasks too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = make_figure(results, model)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    return picture.getvalue()


def make_figure(results: Sequence[SuiteResult], model: str) -> "Figure":
    """The picture as a figure: a container of bars for the model, one for each column of published scores.

    MT-Bench is drawn times ten, so that all bars have one axis. Bars of derived and unconfirmed scores are hatched.
    """
    from matplotlib.figure import Figure

    rows = []
    for result in results:
        scale, times = (10, " x 10") if result.suite == MT_BENCH else (1, "")
        for score in (*result.averages, *result.members) if len(results) == 1 else result.averages[:1]:
            name = result.title if score is result.averages[0] else score.name
            rows.append((name + times, scale, score, _published(result.suite, score)))
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(rows)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / (1 + len(COLUMNS))
    values = [scale * score.value for _, scale, score, _ in rows]
    errors = [scale * (score.stderr or 0) for _, scale, score, _ in rows]
    bars = axis.barh(range(len(rows)), values, height, xerr=errors, color="tab:blue", label=model)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize="x-small")
    for index, (column, color) in enumerate(zip(COLUMNS, ("lightgrey", "silver", "darkgrey")), 1):
        found = [(row, scale, known[column]) for row, (_, scale, _, known) in enumerate(rows) if column in known]
        places = [row + index * height for row, _, _ in found]
        values = [scale * published.value for _, scale, published in found]
        hatches = ["////" if published.note else "" for *_, published in found]
        bars = axis.barh(places, values, height, color=color, edgecolor="white", hatch=hatches, label=column)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize="x-small")
    axis.set_yticks([row + 1.5 * height for row in range(len(rows))], [name for name, *_ in rows])
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), xlabel="percent; black: ± one standard error; hatched: derived or unconfirmed")
    figure.legend(fontsize="small", loc="outside upper center", ncols=1 + len(COLUMNS))
    return figure
