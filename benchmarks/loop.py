"""The time of a run by phase: python -m benchmarks.loop [--steps N] [--output FOLDER] [--section.key VALUE ...]

Runs minorca.train on the quickstart's model and rows, with `--profile`. The shares are medians over the steps in
metrics.jsonl, without the first three, the last of which is profiled. The profile is copied to FOLDER; its trace opens
in chrome://tracing or Perfetto.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, report, spread
from minorca.train import __main__ as train_command
from minorca.train.metrics import PHASES


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.loop", description="The time of a run by phase.")
    options.add_argument("--steps", type=int, default=20, metavar="N", help="at least 4 (default: 20)")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON and the trace there too")
    args, settings = options.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train_command.main(
            [
                f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
                f"--train.steps={args.steps}",
                "--data.eval=null",
                "--train.eval_every=0",
                "--train.checkpoint_every=100",
                f"--train.output={run}",
                "--profile",
                *settings,
            ]
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][3:]
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            for path in (run / "profile").iterdir():
                shutil.copy(path, args.output / f"loop-{path.name}")
    phases = {
        phase: statistics.median(line[f"{phase}_seconds"] / line["seconds"] for line in lines) for phase in PHASES
    }
    result = {"steps": len(lines), "step_seconds": spread([line["seconds"] for line in lines]), "shares": phases}
    report(result | {"tokens_per_second": spread([line["tokens_per_second"] for line in lines])}, "loop", args.output)


if __name__ == "__main__":
    main()
