"""The figure and the table of docs/preference.md: runs of the example that differ in beta or in the learning rate.
python examples/plot_dpo.py, after `make demo`; a quarter of an hour on two CPU cores.
"""

import json
from pathlib import Path

import demo
import demo_dpo
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minorca import cli
from minorca.train import __main__ as train_command

FIGURE = demo.HERE.parent / "docs" / "figures" / "preference.png"
DEFAULTS = {"dpo.beta": 0.1, "optim.lr": 5e-5}
VALUES = {"dpo.beta": (0.02, 0.1, 0.5), "optim.lr": (2e-5, 5e-5, 2e-4)}
CURVES = {
    "rewards/accuracies": "held-out accuracy of rewards",
    "rewards/margins": "held-out margin of rewards",
    "logps/chosen": "held-out log-probability of chosen answers",
}
COLUMNS = [*CURVES, "logps/rejected"]


def run(settings: dict[str, float]) -> tuple[Path, list[dict]]:
    """The output of a run, which is not repeated where it is there, and the lines of its evaluations."""
    name = "-".join(f"{key.partition('.')[2]}-{value:g}" for key, value in settings.items())
    output = demo_dpo.RUN.with_name("demo-dpo-settings") / name
    # without what would hold the chosen answers; the reference's log-probabilities are the same for all runs
    fixed = {"dpo.sft_weight": 0.0, "dpo.precompute": "true", "train.eval_every": 4, "train.output": output}
    train_command.main(demo.options(demo_dpo.CONFIG, **fixed | settings))
    with (output / "metrics.jsonl").open() as file:
        return output, [line for line in map(json.loads, file) if "eval_loss" in line]


def row(settings: dict[str, float], adapter: Path, last: dict) -> str:
    """A row of the table."""
    questions = demo.held_out_questions()
    answers = demo.answer(questions, adapter)
    right = sum(demo.is_right(question, text) for question, text in zip(questions, answers))
    measured = [f"{last[f'eval_{name}']:.2f}" for name in COLUMNS]
    loss = demo_dpo.evaluate_adapter(adapter, demo.CONFIG)["eval_loss"]
    cells = [*(f"{value:g}" for value in settings.values()), *measured, str(right), f"{loss:.3f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    table = {}
    for (key, values), panels in zip(VALUES.items(), figure.subplots(len(VALUES), len(CURVES))):
        for value in values:
            settings = DEFAULTS | {key: value}
            output, lines = run(settings)
            steps = [line["step"] for line in lines]
            for axis, (name, title) in zip(panels, CURVES.items()):
                axis.plot(steps, [line[f"eval_{name}"] for line in lines], "o-", label=f"{key} {value:g}")
                axis.set(title=title, xlabel="step")
                axis.grid(alpha=0.3)
            if output not in table:
                table[output] = row(settings, output / "adapter", lines[-1])
        panels[0].legend()
    figure.savefig(FIGURE, dpi=80)
    print(f"\n| beta | rate | {' | '.join(COLUMNS)} | right answers | held-out loss of fine-tuning |")
    print("| --- " * (len(COLUMNS) + 4) + "|")
    print(*table.values(), sep="\n")


if __name__ == "__main__":
    cli.run(main)
