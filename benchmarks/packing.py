"""The data path at OpenOrca's size: python -m benchmarks.packing [--rows N] [--rendered N] [--template NAME]
[--output FOLDER]

Planning: OpenOrca has 4,233,923 rows, of which no token statistics are published; SlimOrca, a part of it, is counted at
408 and at 461 tokens a row and 8,212 in the longest. The rows' lengths here are drawn from a log-normal distribution of
median 270 and sigma 0.9, clipped to 8 to 4,096 tokens: a mean of 403, one row in a hundred over 2,200. An epoch's plan
includes the counting of its steps.

Rendering: `minorca.data prepare` on examples/data, whose rows are repeated with other questions, on one core and on
all. Memory is the process's largest resident set, Python and torch included.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT, report, spread
from minorca.data.packing import BatchSchedule
from minorca.train.metrics import peak_memory_bytes

# Mistral-7B-OpenOrca's steps had 48 times 4,096 tokens.
CAPACITY = 4096
MICRO_BATCHES = 48


def planning(rows: int, epochs: int = 3) -> dict:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(270), 0.9, rows), 8, CAPACITY).astype(np.int64)
    before = peak_memory_bytes(torch.device("cpu"))
    seconds = []
    for seed in range(epochs):
        start = time.perf_counter()
        schedule = BatchSchedule(lengths, CAPACITY, MICRO_BATCHES, packing=True, seed=seed)
        steps = schedule.steps(1)
        schedule.step(1)
        seconds.append(time.perf_counter() - start)
    micro_batches = [rows for n in range(1, steps + 1) for rows in schedule.step(n)]
    once = np.array_equal(np.sort(np.concatenate(micro_batches)), np.arange(rows))
    fullest = max(int(lengths[rows].sum()) for rows in micro_batches)
    if not once or fullest > CAPACITY:
        raise SystemExit(f"wrong plan: every row once is {once}, the fullest micro-batch has {fullest} tokens")
    return {
        "rows": rows,
        "mean_tokens": float(lengths.mean()),
        "seconds": spread(seconds),
        "rows_per_second": rows / spread(seconds)["median"],
        "micro_batches": len(micro_batches),
        "fill": int(lengths.sum()) / (len(micro_batches) * CAPACITY),
        "memory_before_bytes": before,
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
    }


def rendering(rows: int, template: str) -> dict:
    """Rows per second of `minorca.data prepare` on one core and on all, its start and its files' checksums included."""
    records = [json.loads(line) for line in (ROOT / "examples" / "data" / "train.jsonl").open()]
    results = {}
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.jsonl"
        with file.open("w") as out:
            for n, record in zip(range(rows), itertools.cycle(records)):
                out.write(json.dumps(record | {"id": f"t0.{n}", "question": f"{n}: {record['question']}"}) + "\n")
        options = [
            "--model.path",
            ROOT / "examples" / "model",
            "--data.template",
            template,
            "--data.train",
            file,
            "--data.eval",
            "null",
            "--train.eval_every",
            "0",
        ]
        for name, used in (("one core", cores[:1]), ("all cores", cores)):
            command = [sys.executable, "-m", "minorca.data", "prepare", *options, "--data.store", f"{directory}/{name}"]
            start = time.perf_counter()
            subprocess.run(
                command,
                preexec_fn=lambda used=used: os.sched_setaffinity(0, used),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds = time.perf_counter() - start
            (meta,) = Path(directory, name).glob("*/meta.json")
            results[name] = {
                "cores": len(used),
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "sha256": json.loads(meta.read_text())["sha256"],
            }
    if len({result["sha256"] for result in results.values()}) > 1:
        raise SystemExit("rows rendered in parallel differ from those rendered serially")
    return {"template": template, "rows": rows, **results}


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.packing", description="Rows planned and rendered per second."
    )
    options.add_argument("--rows", type=int, default=4_200_000, metavar="N", help="to plan; default 4,200,000")
    options.add_argument("--rendered", type=int, default=60_000, metavar="N", help="rows to render; default 60,000")
    options.add_argument(
        "--template", choices=("chatml", "jinja"), default="chatml", help="to render with; default chatml"
    )
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args = options.parse_args()
    report(
        {"planning": planning(args.rows), "rendering": rendering(args.rendered, args.template)}, "packing", args.output
    )


if __name__ == "__main__":
    main()
