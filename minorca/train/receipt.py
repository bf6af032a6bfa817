"""The receipt of a run, OUTPUT/receipt.jsonl: what its numbers follow from, and the digests of all that it wrote.

The first line has the settings, the base model, the rows, the renderer, the versions and the machine; another one says
what of these is different where the run resumed. Every checkpoint has a line with the SHA-256 of its files and a digest
of every line that metrics.jsonl has had since the line before; so has what was trained at the end. The line of a
checkpoint is written once it is published, and its state.json names the line before. A run that resumes removes lines
of later steps, and writes the one that it was killed before.
"""

import contextlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minorca import receipts
from minorca.config import Config
from minorca.data.rendering import RENDERER_VERSION
from minorca.data.store import TokenStore
from minorca.errors import UserError
from minorca.files.atomic import manifest_digests
from minorca.receipts import CHAIN, FORMAT, Line, make_line, read_lines, short_digest
from minorca.train import checkpoint
from minorca.train.inputs import Inputs

log = logging.getLogger("minorca.train")

# row digests at most, each of as many consecutive rows as that takes
BLOCKS = 1024


def kept_receipt(output: Path, found: Path | None, state: checkpoint.State | None) -> list[Line]:
    """The lines that stay of a run's receipt when it resumes from `found`, which says `state`; of a new run, none.

    Raises:
        UserError: a line up to the checkpoint is missing, or not as the run wrote it.
    """
    path = output / CHAIN
    is_own = found is not None and found.resolve().parent == (output / "checkpoints").resolve()
    if not (found and state and is_own and state.receipt and path.exists()):
        return []
    lines, error = read_lines(path)
    digests = [line.values["sha256"] for line in lines]
    if state.receipt not in digests:
        error = error or UserError(f"lines are missing: {found.name} names one that is not there", path=path)
        error.advice = (
            f"put the file back as it was, or move it away to go on without the lines up to step {state.step}"
        )
        raise error
    end = digests.index(state.receipt) + 1
    while end < len(lines) and lines[end].values["step"] <= state.step:
        end += 1
    return lines[:end]


@dataclass
class Receipt:
    """The receipt of a run, to which lines are added.

    Attributes:
        output: the directory of the run.
        about: what every line of a start or resume has: settings, identity, renderer, versions, machine.
        head: the digest of the last line; None: there is none.
        bytes: how much of metrics.jsonl the lines cover.
        lines: how many lines these bytes are.
    """

    output: Path
    about: dict[str, Any]
    head: str | None = None
    bytes: int = 0
    lines: int = 0

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a line of these values, see `write`."""
        self.write(self._line(kind, step, values))

    def _line(self, kind: str, step: int, values: dict[str, Any]) -> Line:
        return make_line({"format": FORMAT, "kind": kind, "step": step, **values}, self.head)

    def write(self, line: Line) -> None:
        """Adds a line, and waits until it is on the disk."""
        with (self.output / CHAIN).open("ab") as file:
            file.write(line.raw)
            file.flush()
            os.fsync(file.fileno())
        self.head = line.values["sha256"]

    def checkpoint(self, step: int, directory: Path, size: int = -1) -> None:
        """Adds the line of a checkpoint that was published when metrics.jsonl had `size` bytes; -1: that it has."""
        files = manifest_digests(directory)
        self.add("checkpoint", step, {"files": files, "metrics": self._new_lines(size)})

    def outcome(self, step: int, directory: Path, name: str) -> None:
        """Adds the line of what was trained, and writes receipt.json into its directory, which has all other files and
        is going to be called `name`.
        """
        files = receipts.sha256_in(directory)
        line = self._line("outcome", step, {"name": name, "files": files, "metrics": self._new_lines()})
        about = {key: self.about[key] for key in ("identity", "renderer", "versions", "machine")}
        receipts.write_receipt(directory, {"run": line.values["sha256"], "steps": step, **about}, files)
        # last, for it says that all else is there
        self.write(line)

    def _new_lines(self, size: int = -1) -> dict[str, Any]:
        """Digests of the lines of metrics.jsonl, up to `size` bytes, that no line of the receipt covers."""
        lines: list[bytes] = []
        # what was trained is written all the same
        with contextlib.suppress(FileNotFoundError), (self.output / "metrics.jsonl").open("rb") as file:
            file.seek(self.bytes)
            lines = file.read(size if size < 0 else max(size - self.bytes, 0)).splitlines(keepends=True)
        first = self.lines + 1
        self.bytes += sum(map(len, lines))
        self.lines += len(lines)
        return {"first": first, "lines": [short_digest(line) for line in lines]}


def open_receipt(
    config: Config,
    inputs: Inputs,
    ranks: int,
    found: Path | None,
    state: checkpoint.State | None,
    metrics: bytes,
) -> Receipt:
    """Opens the receipt of the output directory, of which this process has the lock, and adds the line of this start.

    metrics: what stays of metrics.jsonl.
    """
    kept = kept_receipt(config.output, found, state)
    with (config.output / CHAIN).open("ab") as file:
        file.truncate(sum(len(line.raw) for line in kept))
    about = {
        "settings": config.flat(),
        "identity": inputs.identity,
        "renderer": RENDERER_VERSION,
        "versions": receipts.versions(),
        "machine": receipts.machine(ranks),
    }
    receipt = Receipt(config.output, about)
    step = state.step if state else 0
    if not (kept and found and state):
        if state:
            log.info("%s: has no lines up to step %d; it begins after it", config.output / CHAIN, step)
        receipt.add("start", step, about | {"rows": row_digests(inputs.store, inputs.held_out)})
        return receipt
    receipt.head = kept[-1].values["sha256"]
    covered = metrics_digests(line.values for line in kept)
    lines = metrics.splitlines(keepends=True)
    # moved away, the file has begun anew
    if covered == [short_digest(line) for line in lines[: len(covered)]]:
        receipt.lines, receipt.bytes = len(covered), sum(map(len, lines[: len(covered)]))
    # the run was killed after it had published the checkpoint
    if not any(line.values["kind"] == "checkpoint" and line.values["step"] == step for line in kept):
        receipt.checkpoint(step, found, state.metrics_bytes)
    changed = _changed(about, last_state(line.values for line in kept))
    if covered and not receipt.lines:
        changed["metrics"] = {"first": 1, "lines": []}
    receipt.add("resume", step, changed)
    return receipt


def metrics_digests(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The digests of the lines of metrics.jsonl that the lines of a receipt cover."""
    digests: list[str] = []
    for values in lines:
        if covered := values.get("metrics"):
            digests[covered["first"] - 1 :] = covered["lines"]
    return digests


# of these, the line of a resume has what is different
_STATE = ("settings", "identity", "versions", "machine")


def last_state(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the last line of a start or resume says, and what it leaves out for not being different."""
    state: dict[str, Any] = {}
    for values in lines:
        if values["kind"] == "start":
            state = {key: values[key] for key in (*_STATE, "renderer")}
        elif values["kind"] == "resume":
            state = {key: state[key] | values[key] for key in _STATE} | {"renderer": values["renderer"]}
    return state


def _changed(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What of a run's state is different than before its resume."""
    changed: dict[str, Any] = {}
    for name in _STATE:
        changed[name] = {key: value for key, value in now[name].items() if before[name].get(key, ...) != value}
    return changed | {"renderer": now["renderer"]}


def row_digests(rows: TokenStore, held_out: TokenStore | None) -> dict[str, list[str]]:
    """Digests of all rows that were read, by which a row that was changed is found; a fraction that is held out is
    among the rows.
    """
    found = {"rows": _block_digests(rows)}
    if held_out and held_out.offsets is not rows.offsets:
        found["held-out rows"] = _block_digests(held_out)
    return found


def rows_in_block(store: TokenStore) -> int:
    """How many consecutive rows a digest of `row_digests` covers."""
    return -(-(len(store.offsets) - 1) // BLOCKS)


def _block_digests(store: TokenStore) -> list[str]:
    size, rows = rows_in_block(store), len(store.offsets) - 1

    def block(first: int) -> str:
        last = min(first + size, rows)
        start, end = store.offsets[[first, last]]
        arrays = [store.tokens[start:end], store.trained[start:end], store.offsets[first : last + 1] - start]
        if store.has_branches:
            begin, stop = store.branch_offsets[[first, last]]
            arrays += [store.branch_starts[begin:stop], store.branch_scores[begin:stop]]
        return short_digest(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(block, range(0, rows, size)))
