"""Whether files are those that a receipt vouches for, by their digests alone: the first that is not is named."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minorca import receipts
from minorca.config_file import read_config
from minorca.data.rendering import RENDERER_VERSION
from minorca.errors import UserError
from minorca.files.atomic import manifest_digests, sha256
from minorca.files.safe_io import find_file, quote, read_small, unique_keys
from minorca.receipts import CHAIN, FILE, read_receipt, short_digest
from minorca.replay.recorded_run import RecordedRun, read_run
from minorca.train import checkpoint
from minorca.train.inputs import Inputs, read_inputs
from minorca.train.output import written_settings
from minorca.train.receipt import metrics_digests, row_digests, rows_in_block

MAX_SCORES_BYTES = 2**31
ADAPTER = "adapter_model.safetensors"
# of a run's identity, see `checkpoint.identity`
_BASE = re.compile("the base's (.*)'s sha256")
# what programs read of a model's or adapter's directory wherever it is there
LOADED = ("*.safetensors", "*.index.json", "*.jinja", "*config.json", "*token*.json", "params.json")


def verify_run(run: RecordedRun) -> str:
    """What of a run was verified, in words.

    Raises:
        UserError: the first thing that is not as its receipt says: a setting, a line of metrics.jsonl, a file of a
            checkpoint or of what was trained, of the base model, or a row.
    """
    while True:
        try:
            return _verify(run)
        except (UserError, FileNotFoundError):
            # a run that goes on has written more since, and removed older checkpoints
            now = read_run(run.output, run.places)
            if now.lines == run.lines:
                raise
            run = now


def _verify(run: RecordedRun) -> str:
    _verify_settings(run)
    lines = _verify_metrics(run)
    checkpoints = _verify_checkpoints(run)
    outcome = _verify_outcome(run)
    _verify_inputs(run)
    verified = ["settings", "base model", "rows", f"{lines} lines of metrics.jsonl", f"{checkpoints} checkpoints"]
    listed = ", ".join([*verified, *outcome])
    return f"{listed} are as the receipt says, in {len(run.lines)} lines from step {run.lines[0]['step']} on"


def _verify_settings(run: RecordedRun) -> None:
    path, recorded = written_settings(run.output), run.state["settings"]
    # where it resumes or starts, it writes them after the line
    is_last = run.lines[-1]["kind"] in ("start", "resume")
    if is_last and len(run.lines) == 1 and not path.exists():
        return
    now = json.loads(json.dumps(read_config(path, {}).flat()))
    if is_last and len(run.lines) > 1 and not _differing(now, run.state_at(len(run.lines) - 1)["settings"]):
        return
    for key in _differing(now, recorded):
        raise UserError(f"is {quote(now[key])}; the run had {quote(recorded[key])}", path=path, field=key)


def _differing(now: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Which settings are not as recorded; those that a later version has added have their defaults."""
    return [key for key, value in now.items() if key in recorded and recorded[key] != value]


def _verify_metrics(run: RecordedRun) -> int:
    """The number of lines that are verified."""
    path, expected = run.output / "metrics.jsonl", metrics_digests(run.lines)
    lines = run.metrics()
    for n, (line, known) in enumerate(zip(lines, expected), 1):
        if short_digest(line) != known:
            raise UserError("is not as the run wrote it", path=path, where=f"line {n}")
    if len(lines) < len(expected):
        raise UserError(f"lines {len(lines) + 1} to {len(expected)} are missing", path=path)
    # a run that goes on has written more since
    if len(lines) > len(expected) and run.lines[-1]["kind"] == "outcome":
        where = f"line {len(expected) + 1}"
        raise UserError("is not the run's, which has written no more", path=path, where=where)
    return len(expected)


def _verify_checkpoints(run: RecordedRun) -> int:
    """The number of checkpoints that are verified."""
    published = checkpoint.published(run.output / "checkpoints")
    count, content = 0, b"".join(run.metrics())
    # from this line on the file has not begun anew
    begin = max((n for n, line in enumerate(run.lines) if line.get("metrics", {}).get("first") == 1), default=0)
    for path in published:
        try:
            state = checkpoint.verify(path)
        except (UserError, FileNotFoundError):
            # a run that goes on has removed it
            if not os.path.lexists(path):
                continue
            raise
        found = run.checkpoint_line(state.step)
        if found is None:
            # the run was killed before it could write the line, and writes it when it resumes
            is_next = path == published[-1] and state.receipt == run.lines[-1]["sha256"]
            # of a run that began without a receipt
            if is_next or state.step <= run.lines[0]["step"]:
                continue
            raise UserError(f"has no line in {CHAIN}", path=path)
        n, line = found
        files = manifest_digests(path)
        _compare_files(path, files, line["files"], f"{CHAIN}, line {n}")
        if state.receipt != line["previous"]:
            message = "does not follow the line that the checkpoint's state.json names"
            raise UserError(message, path=run.output / CHAIN, where=f"line {n}")
        for key, (before, now) in checkpoint.changes(state.run, run.state_at(n)["identity"]).items():
            message = f"is {quote(before)}; {CHAIN} has {quote(now)}"
            raise UserError(message, path=path / "state.json", field=key)
        # the receipt has the lines as they were in the file by then, the checkpoint as the run wrote them
        first = content[: state.metrics_bytes]
        is_known = state.metrics_bytes >= 0 and n > begin
        if is_known and hashlib.sha256(first).hexdigest() != state.metrics_sha256:
            message = f"is not as the run wrote it, as {path.name}/state.json says"
            where = f"lines 1 to {len(first.splitlines())}"
            raise UserError(message, path=run.output / "metrics.jsonl", where=where)
        count += 1
    return count


def _compare_files(directory: Path, found: dict[str, str], expected: dict[str, str], where: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        here, there = found.get(name), expected.get(name)
        if here != there:
            message = f"has the SHA-256 {here}; {where} has {there}"
            raise UserError(message if here else f"is missing; {where} has it", path=directory / name)


def _verify_outcome(run: RecordedRun) -> list[str]:
    """The name of what was trained, where the run is finished."""
    last = run.lines[-1]
    directory = run.config(run.state, **{"train.output": str(run.output)}).outcome
    if not directory.is_dir():
        if last["kind"] == "outcome" and not _was_stopped(directory, last):
            message = "is missing; if it was not moved, the same command that trained writes it again"
            raise UserError(message, path=directory)
        return []
    verify_directory(directory)
    receipt = read_receipt(directory) or {}
    named = [(n, line) for n, line in enumerate(run.lines, 1) if line["sha256"] == receipt.get("run")]
    if not named or named[0][1]["kind"] != "outcome":
        raise UserError(f"names no line of {CHAIN}", path=directory / FILE, field="run")
    ((n, line),) = named
    _compare_files(directory, receipt["files"], line["files"], f"{CHAIN}, line {n}")
    saved = run.checkpoint_line(line["step"])
    # an adapter is written as the last checkpoint has it, unless the best one is kept
    adapter = line["files"].get(ADAPTER)
    if saved and adapter and "best.json" not in line["files"] and adapter != saved[1]["files"].get(ADAPTER):
        raise UserError(f"is not that of the checkpoint of step {line['step']}", path=directory / ADAPTER)
    return [directory.name]


def _was_stopped(outcome: Path, last: dict[str, Any]) -> bool:
    """Whether the run was stopped between the last line, of what was trained, and its publication, or as it went on."""
    aside = outcome.parent.glob(f"{outcome.name}-before-step-*")
    set_aside = any((read_receipt(directory) or {}).get("run") == last["sha256"] for directory in aside)
    return set_aside or any(outcome.parent.glob(f"{outcome.name}.tmp-*"))


def _verify_inputs(run: RecordedRun) -> Inputs:
    """The base model and the rows, as they are now."""
    state = run.state
    inputs = read_inputs(run.config(state))
    differences = checkpoint.changes(state["identity"], inputs.identity)
    for error in _changed_rows(run, inputs) if differences else ():
        raise error
    if differences:
        key, (before, now) = next(iter(differences.items()))
        renderer = state["renderer"]
        other = f"; it had rows of renderer {renderer}, this is {RENDERER_VERSION}" if "rows" in key else ""
        message = f"was {quote(before)} in the run and is {quote(now)} now"
        raise UserError(message + (other if renderer != RENDERER_VERSION else ""), path=run.output, field=key)
    return inputs


def _changed_rows(run: RecordedRun, inputs: Inputs) -> Iterator[UserError]:
    """The first row, by its file and line, that is not one of the run."""
    known, stores = run.lines[0].get("rows", {}), {"rows": inputs.store, "held-out rows": inputs.held_out}
    for name, digests in row_digests(inputs.store, inputs.held_out).items():
        store = stores[name]
        assert store is not None
        size, everything = rows_in_block(store), replace(store, selected=None)
        if name == "rows":
            yield from _other_number(run, inputs, size, len(known.get(name, [])))
        for block, (now, before) in enumerate(zip_longest(digests, known.get(name, []))):
            if now is None:
                yield UserError(
                    "is followed by fewer rows than in the run", path=everything.locate(len(everything) - 1)
                )
            elif now != before:
                which = "is not a row of the run" if size == 1 else f"of {size} rows from here on, one is not the run's"
                yield UserError(which, path=everything.locate(block * size))


def _other_number(run: RecordedRun, inputs: Inputs, size: int, digests: int) -> Iterator[UserError]:
    """The first source that has another number of rows, where a digest is of several: they are not of the same ones
    then.

    Args:
        size: of how many rows a digest is now.
        digests: how many the run has.
    """
    key = "data.train's rows and weights"
    sizes_before = run.state["identity"][key]
    if size == 1 and sum(before for before, _ in sizes_before) <= digests:
        return
    for source, (now, _), (before, _) in zip(inputs.store.sources, inputs.identity[key], sizes_before):
        if now != before:
            yield UserError(f"has {now} rows to train on; the run had {before}", path=source.path)


# ------------------------------------------------------------------------------------------------ directories, scores


def verify_directory(directory: Path) -> str:
    """What of a directory of weights was verified, in words.

    Raises:
        UserError: it has no receipt.json, or a file is missing or is not the one that this names.
    """
    receipt = read_receipt(directory)
    if receipt is None:
        raise UserError(
            f"has neither {CHAIN} nor {FILE}, which a run, an export and an evaluation write", path=directory
        )
    for name, expected in receipt["files"].items():
        path = directory / name
        # a file of a hub's cache is a link out of its directory
        is_inside = path.parent.resolve().is_relative_to(directory.resolve())
        found = find_file(path.parent, path.name) if is_inside else None
        if found is None:
            raise UserError(f"is missing; {FILE} has it", path=path)
        if (now := sha256(found)) != expected:
            raise UserError(f"has the SHA-256 {now}; {FILE} has {quote(expected)}", path=path)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in receipt["files"] and any(path.match(pattern) for pattern in LOADED):
            raise UserError(f"is not in {FILE}, and programs that load what is beside it read it", path=path)
    _verify_base(receipt, directory / FILE)
    return f"{len(receipt['files'])} files are as {FILE} says"


def verify_scores(path: Path) -> str:
    """What of an evaluation's JSON was verified, in words.

    Raises:
        UserError: it has no receipt, or a score or a part of it is not as it was written.
    """
    content = read_small(path, MAX_SCORES_BYTES)
    if content.startswith(b"GGUF"):
        raise UserError(f"is GGUF; give the directory that it was written to, with {FILE}", path=path)
    try:
        # what has no number may be NaN
        written: Any = json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})", path=path) from None
    receipt = written.get("receipt") if isinstance(written, dict) else None
    if not isinstance(receipt, dict) or not isinstance(receipt.get("scores"), dict):
        raise UserError("has no receipt, which minorca.evaluate writes", path=path)
    if not receipts.is_sealed(receipt):
        raise UserError("was changed: its sha256 is not that of its other keys", path=path, field="receipt")
    now, expected = receipts.score_digests(written), receipt["scores"]
    for key in sorted(now.keys() | expected.keys()):
        if key not in now:
            raise UserError("is missing; the receipt has it", path=path, field=key)
        if now[key] != expected.get(key):
            raise UserError("is not as the evaluation wrote it", path=path, field=key)
    _verify_base(receipt, path)
    return f"{len(now)} parts are as the receipt says"


def _verify_base(receipt: dict[str, Any], path: Path) -> None:
    """Raises UserError: an adapter was trained on another base than the one that it was merged into, or evaluated on.

    A base that was exported from the one of the training, as a quantized one, says so in its own receipt.
    """
    bases, base = [], receipt
    while base and isinstance(base.get("base"), dict):
        bases.append(base["base"])
        base = base.get("base_receipt")
    for trained in _bases_of_training(receipt) if bases else ():
        if trained in bases:
            continue
        # of files of other names, as of another format, it is not known
        for name in sorted(trained.keys() & bases[0].keys()):
            if trained[name] != bases[0][name]:
                message = f"is {quote(bases[0][name])}; the adapter was trained on a base with {quote(trained[name])}"
                raise UserError(message, path=path, field=f"base, {name},")


def _bases_of_training(receipt: dict[str, Any]) -> Iterator[dict[str, str]]:
    """For each adapter of a receipt, the digests of the files of its base by name, if its own receipt has them."""
    for adapter in receipt.get("adapters", []):
        own = adapter["receipt"] or {}
        keys = {key: _BASE.fullmatch(key) for key in own.get("identity", {})}
        if base := {match[1]: own["identity"][key] for key, match in keys.items() if match}:
            yield base
        # of an adapter that was exported itself
        yield from _bases_of_training(own)
