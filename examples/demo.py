"""`make demo`: fine-tunes SmolLM2-135M on examples/data and shows what it learned.

32 held-out questions are answered greedily, all together, before and after training, and scored by a program.
"""

import json
import time
from pathlib import Path

from tasks import extract_answer

import minorca
from minorca import cli
from minorca.generate import generate
from minorca.model.build import fast_dtype
from minorca.train import __main__ as train_command

HERE = Path(__file__).parent
MODEL = HERE / "model"
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
RUN = HERE.parent / "runs" / "quickstart"
QUESTIONS = 32
MAX_NEW_TOKENS = 64


def held_out_questions() -> list[dict]:
    with (HERE / "data" / "eval.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][:QUESTIONS]


def answer(rows: list[dict], adapter: Path | None) -> list[str]:
    """The model's answers to the rows' questions, through its chat template."""
    tok = minorca.load_tokenizer(MODEL)
    model = minorca.load_model(MODEL, fast_dtype(), adapter=adapter)
    prompts = []
    for row in rows:
        system = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
        prompts.append(minorca.render_chat(tok, [*system, {"role": "user", "content": row["question"]}]))
    return [tok.decode(ids) for ids in generate(model, prompts, MAX_NEW_TOKENS, stop_ids=tok.stop_ids)]


def is_right(row: dict, text: str) -> bool:
    """Whether a text ends in the row's own answer."""
    return extract_answer(text) == extract_answer(row["response"])


def options(config: Path, **settings) -> list[str]:
    """The command line of a run of the example's model by a configuration."""
    settings = {"model.dtype": str(fast_dtype()).removeprefix("torch."), "model.path": MODEL} | settings
    return ["--config", str(config), *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def fine_tune() -> None:
    train_command.main(options(CONFIG, **{"train.output": RUN}))


def compare(rows: list[dict], before: list[str], after: list[str]) -> None:
    """Prints an answer that training put right, and how many are right."""
    right_before, right_after = ([is_right(row, text) for row, text in zip(rows, texts)] for texts in (before, after))
    learned = [n for n in range(QUESTIONS) if right_after[n] and not right_before[n]]
    example = learned[0] if learned else 0
    print(f"\nquestion: {rows[example]['question']}\n\nbefore: {before[example]}\n\nafter: {after[example]}\n")
    print(f"right answers: {sum(right_before)} of {QUESTIONS} before, {sum(right_after)} after")


def main(argv: list[str]) -> None:
    started = time.time()
    rows = held_out_questions()
    before = answer(rows, None)
    right = sum(is_right(row, text) for row, text in zip(rows, before))
    print(f"before: {right} of {QUESTIONS} held-out answers right", flush=True)
    fine_tune()
    compare(rows, before, answer(rows, RUN / "adapter"))
    with (RUN / "metrics.jsonl").open() as file:
        losses = [line["eval_loss"] for line in map(json.loads, file) if "eval_loss" in line]
    print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after")
    print(f"{time.time() - started:.0f} seconds; {RUN} has the adapter and the curves")
    print(f"chat with it: .venv/bin/python -m minorca.generate --model {MODEL} --adapter {RUN / 'adapter'} --chat")


if __name__ == "__main__":
    cli.run(main)
