"""The lines of metrics.jsonl, checked when a run resumes.

A checkpoint says how many bytes the file had when it was written, and their SHA-256; an earlier version's does not, and
the steps alone are compared. What follows these lines the run computes again, and it is removed, a last line that was
cut among it; but a line of an evaluation and one of tasks after the checkpoint's step are kept: neither is repeated.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minorca.errors import UserError
from minorca.train.checkpoint import State
from minorca.train.curves import is_of_tasks

log = logging.getLogger("minorca.train")

FOREIGN = "is not a line of a run"


@dataclass(frozen=True)
class Kept:
    """What of a file stays.

    Attributes:
        content: its first bytes, whole lines.
        removed: how many lines follow.
        evaluated: the loss of the evaluation after the checkpoint's step, NaN where it was none; None without its line.
        has_tasks: whether there is a line of tasks after that step.
    """

    content: bytes = b""
    removed: int = 0
    evaluated: float | None = None
    has_tasks: bool = False


def kept_lines(output: Path, found: Path | None, state: State | None) -> Kept:
    """What stays of a run's metrics.jsonl when it resumes from `found`, which says `state`; of a new run, nothing.

    Raises:
        UserError: lines are missing, surplus or other than those that the run wrote, with the first that is.
    """
    path = output / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if not (found and state):
        return Kept(removed=len(lines))
    step, end = state.step, 0
    # of another run, whose lines are not here
    if found.resolve().parent == (output / "checkpoints").resolve():
        end = _vouched_for(path, lines, state)
    first = end
    while first and (line := _parse(lines[first - 1])) and line["step"] == step:
        first -= 1
    kept, evaluated, kinds = end, None, set()
    for n in range(first, len(lines)):
        line = _parse(lines[n])
        if line is None or line["step"] > step:
            continue
        kind = _kind(line)
        if n >= end:
            if n > kept or line["step"] < step or kind == "step":
                surplus = f"is of step {line['step']}, and follows the lines up to step {step}"
                raise _refused(path, f"line {n + 1}", surplus, step)
            if kind is None or kind in kinds:
                raise _refused(path, f"line {n + 1}", f"is a second line of {kind}" if kind else FOREIGN, step)
            kept += 1
        if kind == "an evaluation":
            evaluated = math.nan if line["eval_loss"] is None else line["eval_loss"]
        kinds.add(kind)
    return Kept(b"".join(lines[:kept]), len(lines) - kept, evaluated, "tasks" in kinds)


def _vouched_for(path: Path, lines: list[bytes], state: State) -> int:
    """How many of the lines the checkpoint vouches for."""
    content = b"".join(lines)
    is_known = state.metrics_bytes >= 0
    if is_known and hashlib.sha256(content[: state.metrics_bytes]).hexdigest() == state.metrics_sha256:
        return len(content[: state.metrics_bytes].splitlines())
    values = [_parse(line) for line in lines]
    known = (n for n, line in enumerate(values) if line and "loss" in line and line["step"] <= state.step)
    end = 1 + max(known, default=-1)
    if not end:
        # a last line may have been cut; a whole one is another's, or was changed
        if lines and lines[0].endswith(b"\n") and values[0] is None:
            raise _refused(path, "line 1", FOREIGN, state.step)
        log.warning("%s: has no lines up to step %d; it begins after it", path, state.step)
        return 0
    number, kinds = -1, set()
    for n, line in enumerate(values[:end]):
        kind = _kind(line) if line else None
        if line is None or kind is None:
            raise _refused(path, f"line {n + 1}", FOREIGN, state.step)
        # evaluations follow their step; the lines of a run that began from another's checkpoint do not begin with 1
        expected = number + (kind == "step") if n else line["step"]
        if line["step"] != expected:
            unexpected = f"is of step {line['step']}; expected step {expected}"
            raise _refused(path, f"line {n + 1}", unexpected, state.step)
        number = expected
        if kind == "step":
            kinds.clear()
        if kind in kinds:
            raise _refused(path, f"line {n + 1}", f"is a second line of {kind}", state.step)
        kinds.add(kind)
    if number != state.step:
        missing = f"is of step {number}; the lines of steps {number + 1} to {state.step} are missing"
        raise _refused(path, f"line {end}", missing, state.step)
    if is_known:
        last = sum(line is not None and line["step"] <= state.step for line in values)
        raise _refused(path, f"lines 1 to {last}", "are not as the run wrote them", state.step)
    return end


def _parse(line: bytes) -> dict[str, Any] | None:
    """None where it is no whole line with a step as a run writes it, without a byte order mark or a carriage return."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_line = line.endswith(b"}\n") and isinstance(values, dict) and type(values.get("step")) is int
    return values if is_line else None


def _kind(line: dict[str, Any]) -> str | None:
    """Of what a line is: a step, an evaluation or tasks; None where a run writes none like it."""
    if not all(value is None or isinstance(value, int | float) for value in line.values()):
        return None
    if "loss" in line:
        return "step"
    if is_of_tasks(line):
        return "tasks" if all(name.startswith("eval_") for name in line.keys() - {"step"}) else None
    return None if isinstance(line["eval_loss"], int) else "an evaluation"


def _refused(path: Path, where: str, message: str, step: int) -> UserError:
    remedy = f"put the file back as it was, or move it away to go on without the lines up to step {step}"
    return UserError(f"{message}; {remedy}", path=path, where=where)
