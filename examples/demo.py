"""`make demo`: fine-tunes SmolLM2-135M on examples/data and shows what it learned.

Before and after, 32 held-out questions are answered greedily, all together, and scored by a program.
"""

import json
import time
from pathlib import Path

from make_data import extract_answer

import minorca
from minorca import cli
from minorca.generate import generate
from minorca.model.build import fast_dtype
from minorca.train import __main__ as train_command

HERE = Path(__file__).parent
MODEL = HERE / "model"
RUN = HERE.parent / "runs" / "quickstart"
QUESTIONS = 32
MAX_NEW_TOKENS = 64


def answers(rows: list[dict], adapter: Path | None) -> list[str]:
    """The model's answers to the rows' questions, through its chat template."""
    tok = minorca.load_tokenizer(MODEL)
    model = minorca.load_model(MODEL, fast_dtype(), adapter=adapter)
    prompts = []
    for row in rows:
        system = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
        prompts.append(minorca.render_chat(tok, [*system, {"role": "user", "content": row["question"]}]))
    return [tok.decode(ids) for ids in generate(model, prompts, MAX_NEW_TOKENS, stop_ids=tok.stop_ids)]


def score(rows: list[dict], texts: list[str]) -> int:
    """The number of texts whose answer is that of the row."""
    return sum(extract_answer(text) == extract_answer(row["response"]) for row, text in zip(rows, texts))


def main(argv: list[str]) -> None:
    started = time.time()
    rows = [json.loads(line) for line in (HERE / "data" / "eval.jsonl").open(encoding="utf-8")][:QUESTIONS]
    before = answers(rows, None)
    print(f"before: {score(rows, before)} of {QUESTIONS} held-out answers right", flush=True)
    dtype = str(fast_dtype()).removeprefix("torch.")
    train_command.main(
        [
            "--config",
            str(HERE.parent / "configs" / "quickstart.yaml"),
            "--model.path",
            str(MODEL),
            "--model.dtype",
            dtype,
            "--train.output",
            str(RUN),
        ]
    )
    after = answers(rows, RUN / "adapter")
    losses = [line["eval_loss"] for line in map(json.loads, (RUN / "metrics.jsonl").open()) if "eval_loss" in line]

    def improved(n: int) -> bool:
        return score([rows[n]], [after[n]]) > score([rows[n]], [before[n]])

    shown = next(filter(improved, range(QUESTIONS)), 0)
    print(f"\nquestion: {rows[shown]['question']}\n\nbefore: {before[shown]}\n\nafter: {after[shown]}\n")
    print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after")
    print(f"right answers: {score(rows, before)} of {QUESTIONS} before, {score(rows, after)} after")
    print(
        f"{time.time() - started:.0f} seconds; the adapter is in {RUN / 'adapter'}, the curves in {RUN / 'curves.png'}"
    )
    print(f"chat with it: .venv/bin/python -m minorca.generate --model {MODEL} --adapter {RUN / 'adapter'} --chat")


if __name__ == "__main__":
    cli.run(main)
