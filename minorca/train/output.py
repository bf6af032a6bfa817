"""The directory of a run: whose it is, what the run makes in it, and that no other run writes there.

OUTPUT/run.json says what is the run's: the names that it makes there, the SHA-256 of the config.yaml that it wrote, and
a random id, which is part of the name of whatever is not complete yet. Nothing else is written, renamed or removed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from minorca.config import Config
from minorca.config_file import config_text, is_config_text, write_config
from minorca.errors import UserError
from minorca.files.atomic import MANIFEST, is_lock, lock, sha256, write_file
from minorca.files.safe_io import quote, read_json
from minorca.train import checkpoint

log = logging.getLogger("minorca.train")

FORMAT = 1
FILE = "run.json"
LOCK = ".lock"
# where the resolved settings are written if a person has edited config.yaml
RESOLVED = "config.resolved.yaml"


@dataclasses.dataclass
class RunFiles:
    """What run.json says.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        id: 32 random hexadecimal digits.
        made: the names in the directory that are the run's.
        config_sha256: of the config.yaml that it wrote last, and of the one before.
    """

    format: int
    id: str
    made: list[str]
    config_sha256: list[str]


def check_output(config: Config, profile: bool = False) -> None:
    """Changes nothing.

    Raises:
        UserError: the output directory cannot be made or written to, or holds what no run, or not this one, has made.
    """
    output = config.output
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"is {output}, but {parent} is not a writable directory; choose another", field="train.output")
    if output.is_dir():
        _read(output, _names(config, profile))


def _names(config: Config, profile: bool) -> set[str]:
    """What a run with these settings makes in its directory."""
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "tensorboard", config.outcome.name}
    names |= {"profile"} if profile else set()
    return names | ({"wandb", "wandb-id"} if config.train.wandb else set())


def _read(output: Path, names: set[str]) -> RunFiles:
    """What run.json says, `names` added to what is the run's; as much for a run of an earlier version, without it."""
    present = {path.name for path in output.iterdir()}
    if FILE in present:
        run = _parse(output / FILE)
    elif present - {LOCK} and not _is_of_earlier_version(output):
        run = None
    else:
        run = RunFiles(FORMAT, uuid.uuid4().hex, sorted(names), [])
    if run is None or (LOCK in present and not is_lock(output / LOCK)):
        message = "is not empty, and what it holds is no run of minorca"
        raise UserError(f"{message}: {_listed(present)}; choose another train.output", path=output)
    if foreign := (names - set(run.made)) & present:
        message = f"holds {_listed(foreign)}, which this run has not made"
        raise UserError(f"{message}; move it away, or choose another train.output", path=output)
    return dataclasses.replace(run, made=sorted(names | set(run.made)))


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(name if name.isprintable() else quote(name) for name in shown) + more


def _parse(path: Path) -> RunFiles | None:
    """None where the file is another tool's."""
    try:
        run = RunFiles(**read_json(path))
        names = all(isinstance(text, str) for text in (*run.made, *run.config_sha256))
        return run if names and run.format == FORMAT and re.fullmatch("[0-9a-f]{32}", run.id) else None
    # other keys, or of another type
    except (UserError, TypeError):
        return None


def _is_of_earlier_version(output: Path) -> bool:
    """Whether a run of a version without run.json has written there: a checkpoint, or at first its settings."""
    if any((path / MANIFEST).is_file() for path in checkpoint.published(output / "checkpoints")):
        return True
    return (output / LOCK).is_file() and _is_unedited(output / "config.yaml", [])


def _is_unedited(path: Path, written_sha256: list[str]) -> bool:
    """Whether config.yaml is what the run wrote. An earlier version has not recorded that, but wrote it in one form."""
    if not path.is_file():
        return False
    return sha256(path) in written_sha256 if written_sha256 else is_config_text(path.read_bytes())


def claim(config: Config, profile: bool) -> str:
    """Readies the output directory, of which this process has the lock: removes what the run had begun to write or to
    remove when it was killed, and writes its settings.

    Returns:
        The run's id.

    Raises:
        UserError: as `check_output`.
    """
    output = config.output
    run = _read(output, _names(config, profile))
    path = output / "config.yaml"
    if path.exists() and not _is_unedited(path, run.config_sha256):
        log.warning("%s: was edited and is left as it is; the run's settings are in %s", path, RESOLVED)
        path = output / RESOLVED
        run.made = sorted({*run.made, RESOLVED})
    else:
        # the former one too: the process may be killed before the new one is written
        before = [sha256(path)] if path.exists() else []
        run.config_sha256 = [hashlib.sha256(config_text(config).encode()).hexdigest(), *before]
    write_file(output / FILE, json.dumps(dataclasses.asdict(run), indent=2) + "\n")
    write_config(config, path)
    (output / "checkpoints").mkdir(exist_ok=True)
    for leftover in (*output.glob(f"*.tmp-{run.id}*"), *output.glob(f"checkpoints/*.tmp-{run.id}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    return run.id


def set_outcome_aside(outcome: Path, step: int) -> None:
    """Renames what lies where the run's result is to be: it would say that the run is finished."""
    if outcome.exists():
        name = f"{outcome.name}-before-step-{step + 1:08d}"
        aside = outcome.with_name(name)
        if aside.exists():
            aside = outcome.with_name(f"{name}-{uuid.uuid4().hex[:8]}")
        outcome.rename(aside)
        log.info("%s: the run goes on; its %s is now %s", outcome.parent, outcome.name, aside.name)


@contextlib.contextmanager
def create_output(output: Path) -> Iterator[None]:
    """Within it the directory exists, and no other run can write to it."""
    output.mkdir(parents=True, exist_ok=True)
    with output_lock(output):
        if checkpoint.published(output / "checkpoints"):
            raise UserError("another run wrote here while this one was starting; start this one again", path=output)
        yield


@contextlib.contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Within it no other run can write to the output directory."""
    path = output / LOCK
    file = lock(path)
    if file is None:
        holder = path.read_text().strip() or "which has just started"
        raise UserError(
            f"is {output}, where another run writes ({holder}); wait for it, or choose another train.output",
            field="train.output",
        )
    with file:
        yield
