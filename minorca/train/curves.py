"""A run's curves.png, from its metrics.jsonl."""

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

# of runs of preferences: title, metrics
PREFERENCES: dict[str, Sequence[str]] = {
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "pairs with a positive margin": ("rewards/accuracies",),
    "log-probability of an answer": ("logps/chosen", "logps/rejected"),
    "KL, entropy (nats per token)": ("kl", "entropy"),
}
COLORS = ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


class Curve(NamedTuple):
    """A metric by step, with matplotlib's style and color."""

    label: str
    style: str
    color: str
    points: list[tuple[int, float]]


def is_of_tasks(line: dict) -> bool:
    """Whether a line of metrics.jsonl is one of evaluation tasks, neither of a step nor of held-out rows."""
    return line.keys().isdisjoint(("loss", "eval_loss"))


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss (training, smoothed, held-out), learning rate, tokens/s and perplexity over the steps of a metrics.jsonl; in
    a second row evaluation tasks, and of preferences rewards, log-probabilities, KL and entropy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train, held_out = ([line for line in lines if line.get(key) is not None] for key in ("loss", "eval_loss"))
    steps = [line["step"] for line in train]
    panels, perplexity = _second_row(lines), _perplexity(lines)
    figure = Figure(figsize=(15 if perplexity else 12, 7 if panels else 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    first, *second = figure.subfigures(2 if panels else 1, 1, squeeze=False)[:, 0]
    loss, rate, speed, *rest = first.subplots(1, 4 if perplexity else 3)
    # an exponential average over about a tenth of the run
    decay = max(0, 1 - 10 / max(1, len(train)))
    smoothed = []
    for line in train:
        smoothed.append(decay * smoothed[-1] + (1 - decay) * line["loss"] if smoothed else line["loss"])
    loss.plot(steps, [line["loss"] for line in train], color="tab:blue", alpha=0.35, label="training")
    loss.plot(steps, smoothed, color="tab:blue", label="training, smoothed")
    if held_out:
        loss.plot(
            [line["step"] for line in held_out],
            [line["eval_loss"] for line in held_out],
            "o-",
            color="tab:orange",
            label="held out",
        )
    loss.legend()
    rate.plot(steps, [line["lr"] for line in train])
    speed.plot(steps, [line["tokens_per_second"] for line in train])
    of_loss = "loss" if panels.keys() & PREFERENCES.keys() else "loss (nats per trained token)"
    for axis, title in ((loss, of_loss), (rate, "learning rate"), (speed, "tokens per second")):
        axis.set(title=title, xlabel="step")
        # the loss `robust` may be negative
        if axis.dataLim.y0 >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in rest:
        _draw_panel(axis, "perplexity of held-out rows", perplexity)
    if panels:
        for axis, (title, curves) in zip(second[0].subplots(1, len(panels), squeeze=False)[0], panels.items()):
            _draw_panel(axis, title, curves)
    figure.savefig(picture, dpi=110)


def _second_row(lines: list[dict]) -> dict[str, list[Curve]]:
    """Title -> metrics of the same unit: lines in training, points of evaluations."""
    panels = {}
    for title, group in PREFERENCES.items():
        labels = {name: name.rpartition("/")[2] for name in group}
        panels[title] = [
            *_curves(lines, labels, "-"),
            *_curves(lines, {f"eval_{name}": f"{label}, held out" for name, label in labels.items()}, "o"),
        ]
    of_tasks = filter(is_of_tasks, lines)
    tasks = {name: name.removeprefix("eval_") for line in of_tasks for name in line if name != "step"}
    panels["evaluation tasks"] = _curves(lines, tasks, "o-")
    return {title: curves for title, curves in panels.items() if curves}


def _perplexity(lines: list[dict]) -> list[Curve]:
    names = (name for line in lines for name in line)
    return _curves(lines, {n: n.removeprefix("eval_") for n in names if n.startswith("eval_perplexity")}, "o-")


def _curves(lines: list[dict], labels: dict[str, str], style: str) -> list[Curve]:
    """Those of the named metrics that have a value."""
    curves = [
        Curve(label, style, color, [(line["step"], line[name]) for line in lines if line.get(name) is not None])
        for (name, label), color in zip(labels.items(), cycle(COLORS))
    ]
    return [curve for curve in curves if curve.points]


def _draw_panel(axis, title: str, curves: Sequence[Curve]) -> None:
    for label, style, color, points in curves:
        axis.plot(*zip(*points), style, color=color, alpha=0.7, label=label)
    axis.set(title=title, xlabel="step")
    axis.title.set_fontsize("medium")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
