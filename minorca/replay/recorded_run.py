"""A run as its files record it: its receipt, and what metrics.jsonl says."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minorca.config import Config
from minorca.config_file import read_config
from minorca.errors import UserError
from minorca.receipts import CHAIN, read_lines
from minorca.train.checkpoint import PLACES
from minorca.train.receipt import last_state


class Stretch(NamedTuple):
    """Steps that a run computed with the same settings on the same machine, after `first` up to `last`.

    Attributes:
        state: what the receipt says of them, see `last_state`.
    """

    first: int
    last: int
    state: dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """The files of a run.

    Attributes:
        lines: of its receipt.
        places: settings that say where files are that have moved.
    """

    output: Path
    lines: list[dict[str, Any]]
    places: dict[str, Any]

    def config(self, state: dict[str, Any], **others: object) -> Config:
        """The settings of a stretch, with places as they are now.

        Raises:
            UserError: a setting that this version does not know, or whose value it refuses.
        """
        return read_config(None, state["settings"] | self.places | others)

    @property
    def state(self) -> dict[str, Any]:
        """What the receipt says at its end."""
        return last_state(self.lines)

    def state_at(self, n: int) -> dict[str, Any]:
        """What the receipt says when it has the first n lines."""
        return last_state(self.lines[:n])

    def stretches(self) -> list[Stretch]:
        """From its beginning to its end, each with settings or a machine that the one before did not have."""
        found: list[Stretch] = []
        for n, line in enumerate(self.lines, 1):
            step = line["step"]
            if line["kind"] == "start" or (line["kind"] == "resume" and _is_other(line)):
                if found and found[-1].first == step:
                    found.pop()
                found.append(Stretch(step, step, self.state_at(n)))
            elif found:
                found[-1] = found[-1]._replace(last=step)
        return found

    def checkpoint_line(self, step: int) -> tuple[int, dict[str, Any]] | None:
        """The last line of a checkpoint of this step, and its number."""
        numbered = enumerate(self.lines, 1)
        lines = [(n, line) for n, line in numbered if line["kind"] == "checkpoint" and line["step"] == step]
        return lines[-1] if lines else None

    def metrics(self) -> list[bytes]:
        """The lines of metrics.jsonl."""
        path = self.output / "metrics.jsonl"
        return path.read_bytes().splitlines(keepends=True) if path.exists() else []

    def steps(self) -> dict[tuple[int, str], tuple[int, dict[str, Any]]]:
        """(step, what of it) -> the number of a line of metrics.jsonl, and what it says; of verified lines."""
        found = {}
        for n, line in enumerate(self.metrics(), 1):
            values = json.loads(line)
            found[values["step"], kind_of(values)] = n, values
        return found


def _is_other(resume: dict[str, Any]) -> bool:
    """Whether a run resumed with other settings, or on another machine."""
    kept = PLACES | {"train.resume", "train.output"}
    return bool(resume["settings"].keys() - kept or resume["identity"] or resume["versions"] or resume["machine"])


def kind_of(values: dict[str, Any]) -> str:
    """Of what a line of metrics.jsonl is."""
    return next((kind for kind in ("loss", "eval_loss") if kind in values), "tasks")


def read_run(output: Path, places: dict[str, Any]) -> RecordedRun:
    """Raises UserError: a line of the receipt that is not as the run wrote it."""
    lines, error = read_lines(output / CHAIN)
    if error:
        raise error
    if not lines:
        message = "has no whole line: the run is about to write its first, or was stopped before"
        raise UserError(message, path=output / CHAIN)
    return RecordedRun(output, [line.values for line in lines], places)
