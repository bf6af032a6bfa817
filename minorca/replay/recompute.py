"""Steps of a run, computed again: the run itself, from one of its checkpoints on, in a temporary directory.

What it writes there is compared with the run's files as it comes: every number of metrics.jsonl that does not depend on
the machine's speed, and the tensors of every checkpoint by the SHA-256 of their files. On the same kind of machine all
of them are equal to the bit. On another one, or with other versions, numbers are compared within a tolerance, and
tensors are not.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minorca import receipts
from minorca.errors import UserError
from minorca.files.safe_io import quote
from minorca.host import is_first_rank
from minorca.receipts import CHAIN
from minorca.replay.recorded_run import RecordedRun, Stretch, kind_of
from minorca.train import checkpoint
from minorca.train.metrics import MEASURED
from minorca.train.run import train

# of numbers on another kind of machine, relative; and of gradient norms, whose sums round more
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}
NORM_TOLERANCE = 10


def recompute(run: RecordedRun, first: int, last: int) -> None:
    """Computes steps first + 1 to last again, and compares. Every rank calls it.

    Raises:
        UserError: the first thing that differs, or that the steps cannot be computed from what is there.
    """
    is_first = is_first_rank()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    start = _start(run, first, last)
    begin = checkpoint.verify(start).step if start else 0
    parts = [part for part in run.stretches() if part.first < last and part.last > begin]
    if ranks > 1 and len(parts) > 1:
        # each rank has a directory of its own, and the second part goes on from what the first has written
        message = f"the run resumed after step {parts[1].first} with other settings or on another machine"
        raise UserError(f"{message}; give steps on one side of it, or use one rank", field="--steps")
    if is_first:
        print(f"from {start.name if start else 'the start'} to step {last}")
    with tempfile.TemporaryDirectory(prefix="minorca-replay-") as folder:
        comparison = Comparison(run, Path(folder, "run"))
        for part in parts:
            torch.set_num_threads(part.state["machine"]["threads"])
            differences = _differences(part.state, ranks)
            comparison.exact = not differences
            comparison.tolerance = TOLERANCES[part.state["settings"]["model.dtype"]]
            if is_first and differences:
                print(f"up to step {part.last}, not the same kind of machine: {'; '.join(differences)}")
                print(f"so numbers are compared within a relative {comparison.tolerance:g}, tensors not at all")
            _compute(run, part, min(last, part.last), start, comparison)
            start = None
    if is_first:
        print(f"steps {begin + 1} to {last} are the run's, {comparison.verdict}")


def _start(run: RecordedRun, first: int, last: int) -> Path | None:
    """The newest checkpoint up to step `first`; None where there is none and the run's beginning is known.

    Raises:
        UserError: there is neither, or the run has no step `last`.
    """
    begin, end = run.lines[0]["step"], run.lines[-1]["step"]
    if last > end:
        raise UserError(f"has steps up to {end}; expected no later one", path=run.output / CHAIN, field="--steps")
    steps = {int(path.name.removeprefix("step-")): path for path in checkpoint.published(run.output / "checkpoints")}
    recorded = [step for step, kind in run.steps() if kind == "loss"]
    if recorded and first + 1 < min(recorded):
        message = f"begins with step {first + 1}, and metrics.jsonl with step {min(recorded)}: it was moved away once"
        raise UserError(message, field="--steps")
    known = [step for step in steps if step <= first and (step == begin or run.checkpoint_line(step))]
    if not known and begin:
        message = f"the run's receipt begins after step {begin}, and no checkpoint is of a step from there to {first}"
        listed = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f"{message}; checkpoints are of steps {listed}", field="--steps")
    return steps[max(known)] if known else None


def _differences(state: dict[str, Any], ranks: int) -> list[str]:
    """In what this process is another kind of machine than the run's."""
    now = receipts.versions() | receipts.machine(ranks)
    then = state["versions"] | state["machine"]
    names = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    return [f"{key} was {quote(then.get(key))}, is {quote(now.get(key))}" for key in names]


def _compute(run: RecordedRun, part: Stretch, until: int, start: Path | None, comparison: "Comparison") -> None:
    """Computes a part, from a checkpoint of the run, or from what is in the temporary directory: nothing at first."""
    others = {
        "train.output": str(comparison.output),
        "train.resume": str(start) if start else "auto",
        "train.keep": 1,
        "train.wandb": None,
        "eval.tasks": [],
    }
    train(run.config(part.state, **others), until=until, after_step=comparison.update)
    comparison.update()


@dataclass
class Comparison:
    """What a replay writes to `output`, beside the run's own.

    Attributes:
        exact: whether all is equal to the bit.
        tolerance: relative, of numbers, where it is not.
        read: how many bytes of each file were compared.
        largest: the largest relative difference so far.
    """

    run: RecordedRun
    output: Path
    exact: bool = True
    tolerance: float = 0.0

    def __post_init__(self):
        self.recorded = self.run.steps()
        self.read = {"metrics.jsonl": 0, CHAIN: 0}
        self.lines = self.checkpoints = 0
        self.largest = 0.0

    @property
    def verdict(self) -> str:
        how = "to the bit" if self.largest == 0 else f"within a relative {self.largest:.1e}"
        tensors = f", and the tensors of their checkpoints ({self.checkpoints})" if self.exact else ""
        return f"{how}: {self.lines} lines of metrics.jsonl{tensors}"

    def update(self) -> None:
        """Compares what was written since the last time; on other ranks than the first, nothing was.

        Raises:
            UserError: the first thing that differs.
        """
        for line in self._new("metrics.jsonl"):
            self._compare_line(json.loads(line))
        for line in self._new(CHAIN):
            values = json.loads(line)
            if self.exact and values["kind"] in ("checkpoint", "outcome"):
                self._compare_tensors(values)

    def _new(self, name: str) -> list[bytes]:
        path = self.output / name
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self.read[name])
            content = file.read()
        self.read[name] += len(content)
        return content.splitlines()

    def _compare_line(self, values: dict[str, Any]) -> None:
        step, kind, path = values["step"], kind_of(values), self.run.output / "metrics.jsonl"
        # without the lines before it was moved away, and the evaluation after the last step of a run that was stopped
        if (step, kind) not in self.recorded:
            return
        n, recorded = self.recorded[step, kind]
        for key in sorted((values.keys() | recorded.keys()) - MEASURED):
            before, now = recorded.get(key), values.get(key)
            difference = _relative(before, now)
            if difference > (0 if self.exact else self.tolerance * (NORM_TOLERANCE if key == "grad_norm" else 1)):
                message = f"is {quote(before)}; step {step}, computed again, has {quote(now)}"
                raise UserError(message, path=path, where=f"line {n}", field=key)
            self.largest = max(self.largest, difference)
        self.lines += 1

    def _compare_tensors(self, values: dict[str, Any]) -> None:
        step, kind = values["step"], values["kind"]
        lines = [(n, line) for n, line in enumerate(self.run.lines, 1) if (line["kind"], line["step"]) == (kind, step)]
        if not lines:
            return
        n, recorded = lines[-1]
        for name, digest in values["files"].items():
            if name.endswith(".safetensors") and recorded["files"].get(name) != digest:
                message = f"has {quote(recorded['files'].get(name))}; step {step}, computed again, gives {digest}"
                raise UserError(message, path=self.run.output / CHAIN, where=f"line {n}", field=f"files, {name},")
        self.checkpoints += kind == "checkpoint"


def _relative(before: object, now: object) -> float:
    """The relative difference of two numbers; infinite where they are none or integers, and differ."""
    if before == now:
        return 0.0
    if not (isinstance(before, float) and isinstance(now, float)):
        return float("inf")
    return abs(before - now) / max(abs(before), abs(now))
