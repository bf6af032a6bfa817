"""What a run's receipt costs: python -m benchmarks.receipts [--steps N] [--every N] [--output FOLDER]
[--section.key VALUE ...]

Runs minorca.train on the quickstart's model and rows, and times what the receipt does within the steps: a line at each
checkpoint, with the digests of the lines of metrics.jsonl since the one before. The share is that of the time of all
steps; it is the largest that checkpoints every N steps can have, for SmolLM2 is small. What is done once, at the start,
is listed apart: the digests of the source files and of the rows.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import report
from benchmarks.loop import train_quickstart
from minorca import receipts
from minorca.train import receipt, run
from minorca.train.receipt import Receipt


def timed(function, seconds: list[float]):
    """The function; the seconds of each call are added to a list."""

    def call(*arguments, **options):
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    return call


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.receipts", description="What a run's receipt costs.")
    options.add_argument("--steps", type=int, default=20, metavar="N", help="default: 20")
    options.add_argument("--every", type=int, default=5, metavar="N", help="steps between checkpoints; default: 5")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args, settings = options.parse_known_args()
    lines: list[float] = []
    starts: list[float] = []
    rows: list[float] = []
    Receipt.checkpoint = timed(Receipt.checkpoint, lines)
    run.open_receipt = timed(run.open_receipt, starts)
    receipt.row_digests = timed(receipt.row_digests, rows)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        steps = train_quickstart(output, args.steps, f"--train.checkpoint_every={args.every}", *settings)
        size = (output / receipts.CHAIN).stat().st_size
    seconds = [line["seconds"] for line in steps]
    result = {
        "steps": len(steps),
        "checkpoint_every": args.every,
        "step_seconds": statistics.median(seconds),
        "checkpoint_seconds": sum(line["checkpoint_seconds"] for line in steps) / len(lines),
        "receipt_seconds_a_checkpoint": statistics.median(lines),
        "share_of_steps": sum(lines) / sum(seconds),
        "start_seconds": starts[0],
        "of_it_rows": rows[0],
        "receipt_bytes": size,
    }
    report(result, "receipts", args.output)


if __name__ == "__main__":
    main()
