"""The directory of a run: whose it is, what the run makes in it, and that no other run writes there.

OUTPUT/run.json says what is the run's: the names that it makes there, the SHA-256 of the settings that it wrote, and a
random id, which is part of the name of whatever is not complete yet. Nothing else is written, renamed or removed.
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
from minorca.config_file import config_text, is_config_text
from minorca.errors import UserError
from minorca.files.atomic import MANIFEST, is_lock, lock, sha256, write_file
from minorca.files.safe_io import quote, read_json
from minorca.receipts import CHAIN
from minorca.train import checkpoint

log = logging.getLogger("minorca.train")

FORMAT = 1
FILE = "run.json"
LOCK = ".lock"
# where the resolved settings are written if a person has edited config.yaml
RESOLVED = "config.resolved.yaml"
# what a run may make there
DIRECTORIES = {"checkpoints", "tensorboard", "profile", "wandb", "adapter", "model"}
FILES = {"config.yaml", "metrics.jsonl", CHAIN, "curves.png", "wandb-id"}
# what file systems, schedulers and `| tee` may have put where a run is to begin
HARMLESS = re.compile(r"\..*|lost\+found|.*\.(log|out|err)")
# what is left of a run that was killed while it wrote its first run.json
UNFINISHED = re.compile(re.escape(FILE) + r"\.tmp-([0-9a-f]{32}){1,2}")


@dataclasses.dataclass
class RunFiles:
    """What run.json says.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        id: 32 random hexadecimal digits.
        made: the names in the directory that are the run's.
        config_sha256: of the config.yaml that it wrote last, and of the one before.
        resolved_sha256: the same of config.resolved.yaml.
        revisions: hub ids as the settings gave them, data sets' after datasets/ -> the same at the commits that the run
            uses.
        rows: what became of the rows to train on: source -> outcome -> how many.
    """

    format: int
    id: str
    made: list[str]
    config_sha256: list[str]
    resolved_sha256: list[str] = dataclasses.field(default_factory=list)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def check_output(config: Config, profile: bool = False) -> None:
    """Changes nothing.

    Raises:
        UserError: the output directory cannot be made or written to, or holds what no run, or not this one, has made.
    """
    output = config.output
    parent = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"is {output}, but {parent} is not a writable directory; choose another", field="train.output")
    if output.is_dir():
        _read(output, _names(config, profile))


def _names(config: Config, profile: bool) -> set[str]:
    """What a run with these settings makes in its directory."""
    unused = {"adapter", "model"} - {config.outcome.name}
    unused |= set() if profile else {"profile"}
    unused |= set() if config.train.wandb else {"wandb", "wandb-id"}
    return (DIRECTORIES | FILES) - unused


def _read(output: Path, names: set[str]) -> RunFiles:
    """What run.json says, `names` added to what is the run's; as much for a run of an earlier version, without it."""
    present = {path.name for path in output.iterdir()}
    others = {name for name in present if not HARMLESS.fullmatch(name)}
    if LOCK in present:
        others = {name for name in others if not UNFINISHED.fullmatch(name)}
    if FILE in present:
        run = _parse(output)
    elif _is_of_earlier_version(output):
        # which may have made any of them
        run = RunFiles(FORMAT, uuid.uuid4().hex, sorted(DIRECTORIES | FILES), [])
    else:
        run = None if others else RunFiles(FORMAT, uuid.uuid4().hex, sorted(names), [])
    is_locked = LOCK not in present or is_lock(output / LOCK)
    if run is None or not is_locked:
        message = "is not empty, and what it holds is no run of minorca"
        listed = _listed(others | (set() if is_locked else {LOCK}))
        raise UserError(f"{message}: {listed}; choose another train.output", path=output)
    if foreign := (names - set(run.made)) & present:
        message = f"holds {_listed(foreign)}, which this run has not made"
        raise UserError(f"{message}; move it away, or choose another train.output", path=output)
    for name in sorted(names & present):
        path, is_directory = output / name, name in DIRECTORIES
        if not (path.is_dir() if is_directory else path.is_file()):
            kind = "directory" if is_directory else "file"
            raise UserError(f"is not a {kind}, which a run makes there; move it away", path=path)
    return dataclasses.replace(run, made=sorted(names | set(run.made)))


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(name if name.isprintable() else quote(name) for name in shown) + more


def _parse(output: Path) -> RunFiles | None:
    """None where run.json is another tool's, and there is no run.

    Raises:
        UserError: it is a link, of a newer version, or damaged.
    """
    path = output / FILE
    if path.is_symlink():
        raise UserError("is a link, and a run would write what it leads to; put the file itself there", path=path)
    try:
        values = read_json(path)
    except UserError:
        values = {}
    if isinstance(values.get("id"), str) and re.fullmatch("[0-9a-f]{32}", values["id"]):
        known = {key.name for key in dataclasses.fields(RunFiles)}
        if values.get("format", FORMAT) != FORMAT or values.keys() - known:
            message = "was written by a newer version of minorca; go on with that one, or choose another train.output"
            raise UserError(message, path=path)
        # keys are missing, or of another type
        with contextlib.suppress(TypeError, AttributeError):
            run = RunFiles(**values)
            texts = (*run.made, *run.config_sha256, *run.resolved_sha256, *run.revisions, *run.revisions.values())
            if all(isinstance(text, str) for text in texts):
                return run
    if _is_of_earlier_version(output):
        raise UserError("is damaged, or another tool's; move it away, and the run goes on", path=path)
    return None


def read_run(output: Path) -> RunFiles | None:
    """What run.json says; None where there is none. Raises UserError: it is damaged, or of a newer version."""
    return _parse(output) if os.path.lexists(output / FILE) else None


def _is_of_earlier_version(output: Path) -> bool:
    """Whether a run of a version without run.json has written there: a checkpoint, or at first its settings."""
    if any((path / MANIFEST).is_file() for path in checkpoint.published(output / "checkpoints")):
        return True
    return (output / LOCK).is_file() and _is_unedited(output / "config.yaml", [])


def _is_unedited(path: Path, written_sha256: list[str]) -> bool:
    """Whether a file of settings is what the run wrote. An earlier version has not recorded that, but wrote it in one
    form.
    """
    # what a link leads to is a person's
    if path.is_symlink() or not path.is_file():
        return False
    return sha256(path) in written_sha256 if written_sha256 else is_config_text(path.read_bytes())


def written_settings(output: Path) -> Path:
    """The file of the settings that the run wrote last: config.yaml, or config.resolved.yaml where a person had edited
    that one.

    Raises:
        UserError: run.json is damaged.
    """
    run = _parse(output) if (output / FILE).exists() else None
    path, resolved = output / "config.yaml", output / RESOLVED
    if run and RESOLVED in run.made and resolved.exists() and not _is_unedited(path, run.config_sha256):
        return resolved
    return path


def check_settings(config: Config) -> None:
    """Raises UserError: the settings of a run that goes on would replace a file that a person has edited."""
    if config.output.is_dir():
        _settings_file(config.output, _read(config.output, set()))


def _settings_file(output: Path, run: RunFiles) -> Path:
    """Where settings are written: config.yaml, or where a person has edited it a file beside it."""
    path, resolved = output / "config.yaml", output / RESOLVED
    if not os.path.lexists(path) or _is_unedited(path, run.config_sha256):
        return path
    if os.path.lexists(resolved) and not (RESOLVED in run.made and _is_unedited(resolved, run.resolved_sha256)):
        message = "is not as the run wrote it, and its settings go there, for config.yaml was edited too; move it away"
        raise UserError(message, path=resolved)
    return resolved


def claim(
    config: Config,
    profile: bool,
    revisions: dict[str, str] | None = None,
    rows: dict[str, dict[str, int]] | None = None,
) -> str:
    """Readies the output directory, of which this process has the lock: says in run.json what is the run's, and removes
    what it had begun to write or to remove when it was killed.

    Args:
        revisions: what `pin` made of which hub id of the settings.
        rows: what became of the rows of each source.

    Returns:
        The run's id.

    Raises:
        UserError: as `check_output` and `check_settings`.
    """
    output = config.output
    run = _read(output, _names(config, profile))
    path = _settings_file(output, run)
    # the former one too: the process may be killed before the new one is written
    digests = [hashlib.sha256(config_text(config).encode()).hexdigest(), *([sha256(path)] if path.exists() else [])]
    if path.name == RESOLVED:
        log.warning("%s: config.yaml was edited and is left as it is; the run's settings are in %s", output, RESOLVED)
        run.made = sorted({*run.made, RESOLVED})
        run.resolved_sha256 = digests
    else:
        run.config_sha256 = digests
    run.revisions |= revisions or {}
    run.rows = rows or run.rows
    write_file(output / FILE, json.dumps(dataclasses.asdict(run), indent=2) + "\n", run.id)
    (output / "checkpoints").mkdir(exist_ok=True)
    unfinished = [path for path in output.iterdir() if UNFINISHED.fullmatch(path.name) and path.is_file()]
    for leftover in (*unfinished, *output.glob(f"*.tmp-{run.id}*"), *output.glob(f"checkpoints/*.tmp-{run.id}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return run.id


def write_settings(config: Config, run_id: str) -> None:
    """Writes the settings of the run, which has claimed its directory; its receipt says them already."""
    write_file(_settings_file(config.output, _read(config.output, set())), config_text(config), run_id)


def set_outcome_aside(outcome: Path, step: int) -> None:
    """Renames what lies where the run's result is to be: it would say that the run is finished."""
    # a link that leads nowhere too
    if os.path.lexists(outcome):
        name = f"{outcome.name}-before-step-{step + 1:08d}"
        aside = outcome.with_name(name)
        if os.path.lexists(aside):
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
