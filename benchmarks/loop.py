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


def train_quickstart(output: Path, steps: int, *settings: str) -> list[dict]:
    """Trains the quickstart's model for some steps without evaluations, and returns the lines of metrics.jsonl."""
    options = [f"--train.steps={steps}", "--data.eval=null", "--train.eval_every=0", f"--train.output={output}"]
    train_command.main([f"--config={ROOT / 'configs' / 'quickstart.yaml'}", *options, *settings])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.loop", description="The time of a run by phase.")
    options.add_argument("--steps", type=int, default=20, metavar="N", help="at least 4 (default: 20)")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON and the trace there too")
    args, settings = options.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        lines = train_quickstart(run, args.steps, "--train.checkpoint_every=100", "--profile", *settings)[3:]
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
