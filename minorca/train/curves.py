"""A run's curves.png, from its metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

# of runs of preferences: title, metrics
PREFERENCES: dict[str, Sequence[str]] = {
    "rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "pairs with a positive margin": ("rewards/accuracies",),
    "log-probability of an answer": ("logps/chosen", "logps/rejected"),
    "KL, entropy (nats per token)": ("kl", "entropy"),
}
COLORS = ("tab:blue", "tab:red", "tab:green")


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss (training, smoothed, held-out), learning rate and tokens/s over the steps of a metrics.jsonl; of
    preferences also rewards, log-probabilities, KL and entropy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train, held_out = ([line for line in lines if line.get(key) is not None] for key in ("loss", "eval_loss"))
    steps = [line["step"] for line in train]
    names = {name for line in train for name in line}
    shown = {title: [n for n in group if n in names] for title, group in PREFERENCES.items() if names & {*group}}
    figure = Figure(figsize=(12, 7 if shown else 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    first, *second = figure.subfigures(2 if shown else 1, 1, squeeze=False)[:, 0]
    loss, rate, speed = first.subplots(1, 3)
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
    of_loss = "loss" if shown else "loss (nats per trained token)"
    for axis, title in ((loss, of_loss), (rate, "learning rate"), (speed, "tokens per second")):
        axis.set(title=title, xlabel="step")
        # the loss `robust` may be negative
        if axis.dataLim.y0 >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if shown:
        for axis, (title, group) in zip(second[0].subplots(1, len(shown), squeeze=False)[0], shown.items()):
            _draw_group(axis, title, group, train, held_out)
    figure.savefig(picture, dpi=110)


def _draw_group(axis, title: str, names: Sequence[str], train: list[dict], held_out: list[dict]) -> None:
    """Metrics of the same unit: lines in training, points of held-out rows."""
    for name, color in zip(names, COLORS):
        for lines, key, style in ((train, name, "-"), (held_out, f"eval_{name}", "o")):
            known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            label = name.rpartition("/")[2] + (", held out" if style == "o" else "")
            if known:
                axis.plot(*zip(*known), style, color=color, alpha=0.7, label=label)
    axis.set(title=title, xlabel="step")
    axis.title.set_fontsize("medium")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
