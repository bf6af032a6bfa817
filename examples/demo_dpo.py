"""`make demo-dpo`: tunes the model of `make demo` to prefer right worked answers to wrong and careless ones.

Before and after it, the same questions as in demo.py are answered, and three numbers are taken of held-out rows: how
often the chosen answer of a pair is more probable than the rejected one, the same of the log-ratios to the reference,
and the loss of fine-tuning.
"""

import json
import logging
import time
from pathlib import Path

import demo

from minorca import cli
from minorca.train import __main__ as train_command
from minorca.train.build import build
from minorca.train.evaluation import evaluate
from minorca.train.inputs import read_inputs
from minorca.train.ranks import init_distributed

CONFIG = demo.HERE.parent / "configs" / "demo-dpo.yaml"
RUN = demo.HERE.parent / "runs" / "demo-dpo"


def evaluate_adapter(adapter: Path, config: Path, **settings) -> dict[str, float]:
    """What a run by a configuration that starts from this adapter would say before its first step."""
    logging.getLogger("minorca").setLevel(logging.WARNING)
    arguments = demo.options(config, **{"lora.init": adapter} | settings)
    _, parsed = cli.parse_config(cli.config_parser("demo_dpo", ""), arguments)
    with init_distributed(parsed.parallel.timeout) as world:
        inputs = read_inputs(parsed)
        return evaluate(build(parsed, inputs.base, world), inputs.held_out, parsed, world)


def measure(adapter: Path) -> dict[str, float]:
    """Preferences by the adapter's own log-probabilities, which are cpo's rewards, and the loss of fine-tuning."""
    preferences = evaluate_adapter(adapter, CONFIG, **{"train.objective": "cpo", "dpo.sft_weight": 0.0})
    return {
        "preferred": preferences["eval_rewards/accuracies"],
        "loss": evaluate_adapter(adapter, demo.CONFIG)["eval_loss"],
    }


def main(argv: list[str]) -> None:
    started = time.time()
    reference = demo.RUN / "adapter"
    if not reference.is_dir():
        demo.fine_tune()
    rows = demo.held_out_questions()
    answers, before = demo.answer(rows, reference), measure(reference)
    train_command.main(demo.options(CONFIG, **{"lora.init": reference, "train.output": RUN}))
    after = measure(RUN / "adapter")
    demo.compare(rows, answers, demo.answer(rows, RUN / "adapter"))
    with (RUN / "metrics.jsonl").open() as file:
        rewarded = [line["eval_rewards/accuracies"] for line in map(json.loads, file) if "eval_loss" in line][-1]
    print(f"the chosen answer is the more probable one in {before['preferred']:.1%} of held-out pairs before", end=", ")
    print(f"{after['preferred']:.1%} after; it gained more than the rejected one in {rewarded:.1%}")
    print(f"held-out loss of fine-tuning: {before['loss']:.4f} before, {after['loss']:.4f} after")
    print(f"{time.time() - started:.0f} seconds; {RUN} has the adapter and the curves")


if __name__ == "__main__":
    cli.run(main)
