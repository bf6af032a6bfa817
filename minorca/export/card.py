"""A model card, README.md: how the weights were made, what they score, and how to run them.

Its header is that of the hub (https://huggingface.co/docs/hub/model-cards). It has nothing of this machine: of paths
the last part alone, and no environment.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minorca.config_file import config_text
from minorca.errors import UserError
from minorca.export.adapter import named_base
from minorca.export.run_commands import run_commands
from minorca.export.run_record import RunRecord, last_part, read_run_record
from minorca.files.atomic import write_file
from minorca.files.hub import HubId, local_directory, name_of, parse_id, pinned
from minorca.files.safe_io import read_json

CARD = "README.md"


@dataclass(frozen=True)
class Score:
    """One number of minorca.evaluate: of which task, with how many examples, and its standard error."""

    task: str
    shots: int | None
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True)
class Origin:
    """What a card says, known before anything is written.

    Attributes:
        base: of the hub, or None.
        base_name: what to call it.
        adapter_name: what is merged in, or is exported alone; None: nothing.
        alone: the adapter is exported alone.
        quantized: the weights are written in 4 bits.
        run: that of the adapter, or of the model.
    """

    base: HubId | None
    base_name: str
    adapter_name: str | None
    alone: bool
    quantized: bool
    run: RunRecord | None
    scores: list[Score]

    @property
    def relation(self) -> str | None:
        """The hub's base_model_relation."""
        if self.alone:
            return "adapter"
        if self.adapter_name or self.run:
            return "finetune"
        return "quantized" if self.quantized else None


def read_origin(
    model: str | None, adapters: Sequence[str], alone: bool, quantized: bool, scores: Sequence[str] = ()
) -> Origin:
    """What is known of the weights that `model` and `adapters` make.

    Args:
        model: None: of an adapter alone, the base that it names.
        scores: files of minorca.evaluate.

    Raises:
        UserError: what is wrong with which file; or an adapter alone would name a directory of this machine as its
            base.
    """
    # that of several adapters would be several runs'
    adapter = adapters[0] if len(adapters) == 1 else None
    trained = adapter or (None if adapters else model)
    run = read_run_record(local_directory(trained)) if trained and parse_id(trained) is None else None
    base = None
    if model:
        # no more than the name is needed beside an adapter alone
        base = parse_id(model) if alone else pinned(model)
    if base is None and adapter:
        base = named_base(adapter)
    elif base is None and run:
        base = run.base
    if alone and base is None:
        message = (
            "names a directory of this machine as its base; give the hub id of that with --model ORG/NAME@REVISION"
        )
        raise UserError(message, path=adapter)
    name = base.repository if base else last_part(str(Path(model or "").resolve()))
    found = [score for file in scores for score in read_scores(Path(file))]
    return Origin(base, name, " and ".join(map(name_of, adapters)) or None, alone, quantized, run, found)


def read_scores(path: Path) -> list[Score]:
    """The scores in a file that minorca.evaluate has written, in lm_eval's form.

    Raises:
        UserError: it has none.
    """
    values = read_json(path)
    results, shots = values.get("results"), values.get("n-shot")
    if not isinstance(results, dict) or "minorca" not in values:
        raise UserError("holds no results; expected a file of minorca.evaluate --output", path=path)
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items() if isinstance(metrics, dict) else ():
            metric, _, way = key.partition(",")
            if type(value) in (int, float) and way and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{way}")
                count = shots.get(task) if isinstance(shots, dict) else None
                metric = metric if way == "none" else f"{metric} ({way})"
                known = error if type(error) is float else None
                found.append(Score(task, count if type(count) is int else None, metric, value, known))
    return found


def write_card(origin: Origin, directory: Path, repository: str) -> None:
    """Writes README.md into a directory that was exported, and the curves of its training.

    Raises:
        UserError: it cannot be written.
    """
    if origin.run and origin.run.curves:
        shutil.copy(origin.run.curves, directory / "curves.png")
    write_file(directory / CARD, card_text(origin, directory, repository))


def card_text(origin: Origin, directory: Path, repository: str) -> str:
    """The card of a directory that is pushed to a repository of the hub."""
    body = "\n\n".join(_sections(origin, directory, repository))
    return f"---\n{_header(origin, directory, repository)}\n---\n\n{body}\n"


def _header(origin: Origin, directory: Path, repository: str) -> str:
    """The YAML of a card; what is not known, as the license, is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    run = origin.run
    tags = ["minorca", *(["lora"] if origin.alone else []), *([run.settings.train.objective] if run else [])]
    library = "peft" if origin.alone else "transformers" if (directory / "config.json").exists() else None
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric.partition(" ")[0],
            metric_name=score.metric,
            metric_value=score.value,
        )
        for score in origin.scores
    ]
    data: dict[str, Any] = {"base_model_relation": origin.relation} if origin.base and origin.relation else {}
    header = ModelCardData(
        base_model=origin.base.repository if origin.base else None,
        datasets=(run.datasets if run else None) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=tags,
        model_name=repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **data,
    )
    return header.to_yaml()


# ----------------------------------------------------------------------------------------------------------- markdown


def plain(text: object) -> str:
    """Text that stands for itself in markdown, in one line: no markup, no HTML, no end of a table's cell."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!:@])", r"\\\1", line)


def code_block(text: str, language: str = "") -> str:
    """Text as it is: its fence is longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sections(origin: Origin, directory: Path, repository: str) -> Iterator[str]:
    yield f"# {plain(repository.rpartition('/')[2])}"
    yield _summary(origin)
    if origin.run:
        yield from _training(origin.run)
    if origin.scores:
        yield "## Scores"
        rows = [(s.task, "" if s.shots is None else s.shots, s.metric, _value(s)) for s in origin.scores]
        yield table(["task", "examples", "metric", "value"], rows)
    yield "## How to run it"
    for engine, language, text in run_commands(directory, repository, origin.base, origin.alone):
        yield f"{engine}:"
        yield code_block(text, language)


def _value(score: Score) -> str:
    return f"{score.value:.4g}" if score.error is None else f"{score.value:.4g} ± {score.error:.2g}"


def _summary(origin: Origin) -> str:
    base = plain(origin.base_name)
    if origin.base:
        base = f"[{base}](https://huggingface.co/{origin.base.repository})"
        if origin.base.revision:
            base += f", revision `{origin.base.revision}`"
    if origin.alone:
        what = f"A LoRA adapter for {base}."
    elif origin.adapter_name:
        what = f"{base}, with {plain(origin.adapter_name)} merged in."
    else:
        what = f"All weights of {base}, fine-tuned." if origin.run else f"The weights of {base}."
    return what + (" The weights are quantized to 4 bits (NF4)." if origin.quantized else "")


def _training(run: RunRecord) -> Iterator[str]:
    """What was trained on, how, and how it went."""
    yield "## Training"
    settings = run.settings
    yield (
        f"Objective {settings.train.objective}, {run.steps:,} steps of {settings.train.batch_tokens:,} tokens at most: "
        f"{run.tokens:,} tokens, of which {run.trained_tokens:,} were trained. All settings:"
    )
    yield f"<details><summary>config.yaml</summary>\n\n{code_block(config_text(settings), 'yaml')}\n\n</details>"
    if run.rows:
        rows = [(source, what, f"{count:,}") for source, counts in run.rows for what, count in counts.items()]
        yield table(["data", "rows or tokens", "number"], rows)
    if run.losses:
        best = min(run.losses, key=lambda pair: pair[1])
        if settings.train.keep_best:
            yield f"The weights are those after step {best[0]:,}, of the lowest held-out loss."
        named = (("first", run.losses[0]), ("best", best), ("last", run.losses[-1]))
        yield table(["held-out loss", "step", "value"], [(name, step, f"{loss:.4f}") for name, (step, loss) in named])
    if run.curves:
        yield "![Loss, learning rate and tokens a second by step](curves.png)"
