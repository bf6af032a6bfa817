"""Checkpoints: complete or absent, verified before they are read and before an older one is removed; no code in them.

OUTPUT/checkpoints/step-00000100/ holds what is trained (adapters in PEFT's format; all weights as a Hugging Face
directory in fp32), minorca.json (the template of training, as beside an adapter), optimizer.safetensors (AdamW's
moments under the names of the parameters), best.safetensors (what was trained up to the best evaluation, where
train.keep_best), state.json (format, step, updates, the best evaluation, what wrote it, and what defines the run) and,
written last, MANIFEST.json with every file's size and SHA-256. Tensors over 5 GB are split into several files. It is
written under another name and renamed; a published one is never written into again. There is no random state to store:
the order of the data and dropout are functions of the seed and step.
"""

import dataclasses
import json
import logging
import math
import re
import shutil
import typing
import uuid
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from minorca.config import Config, defaults
from minorca.config_file import settings
from minorca.data.store import TokenStore
from minorca.errors import UserError, raise_problems
from minorca.files.adapters import adapter_file
from minorca.files.atomic import (
    MANIFEST,
    publish,
    sha256,
    sha256_each,
    temporary_path,
    verify_manifest,
    write_files,
    write_manifest,
)
from minorca.files.safe_io import quote, read_json, user_path
from minorca.files.tensor_files import FLOATS, open_exactly, write_tensors
from minorca.model.architecture import Architecture
from minorca.progress import progress
from minorca.train.best import Best
from minorca.train.optim import Optimizer
from minorca.train.ranks import World
from minorca.train.trainable import TrainableSet, gather, take_part
from minorca_kernels import fill_rows

log = logging.getLogger(__name__)

# The format of a checkpoint's files and of the identity in it. A setting that a later version adds needs no new number,
# nor does a field of `State`: a checkpoint without it means the default (`changes`, `verify`). A version that changes
# a default does need one.
FORMAT = 1
MOMENTS = "optimizer.safetensors"
BEST = "best.safetensors"
_NAME = re.compile(r"step-(\d{8})")
# settings that no number of a run follows from: where files are that the identity holds by their content, where and how
# often it writes, and on what it runs
PLACES = {"model.path", "data.train", "data.eval", "data.store", "lora.init", "dpo.reference"}
_FREE = PLACES | {"dpo.precompute"}
_FREE |= {
    f"train.{key}"
    for key in (
        "output",
        "checkpoint_every",
        "keep",
        "eval_every",
        "log_every",
        "resume",
        "nonfinite",
        "deterministic",
        "wandb",
    )
}
_FREE |= {key for key in settings() if key.startswith("eval.")}
# settings that a resumed run may change, for the order of its rows does not follow from them
_CHANGEABLE = {f"train.{key}" for key in ("steps", "epochs", "keep_best", "early_stopping")} | {"lora.dropout"}
_CHANGEABLE |= {key for key in settings() if key.startswith("optim.")} - {"optim.name"}


class OtherVersion(UserError):
    """A checkpoint, undamaged, that another version of minorca wrote."""


def identity(
    config: Config, arch: Architecture, weights: list[Path], store: TokenStore, held_out: TokenStore | None
) -> dict:
    """What a run's numbers follow from: its settings, its rows and its base model, files by their SHA-256 wherever they
    lie.
    """
    sections = dataclasses.asdict(config).items()
    values = {f"{s}.{k}": value for s, keys in sections for k, value in keys.items() if s != "parallel"}
    values = {key: value for key, value in values.items() if key not in _FREE}
    sources = zip(store.source_ranges, config.data.sources(config.data.train))
    values["data.train's rows and weights"] = [(stop - first, source.weight) for (first, stop), source in sources]
    values["data.eval's fraction"] = config.data.eval if isinstance(config.data.eval, float) else None
    values["the rows' sha256"] = store.sha256()
    values["the held-out rows' sha256"] = held_out.sha256() if held_out else None
    init = config.lora.init
    values["the initial adapter's sha256"] = sha256(adapter_file(init)) if init else None
    directory = config.adapters.get("dpo.reference")
    reference = sha256(adapter_file(directory)) if directory else config.dpo.reference
    values["the reference"] = reference if config.has_reference else None
    values |= {f"the base's {key}": value for key, value in dataclasses.asdict(arch).items()}
    digests = sha256_each(weights, "reading the base's checksums")
    values |= {f"the base's {path.name}'s sha256": digest for path, digest in zip(weights, digests)}
    return json.loads(json.dumps(values))


@dataclasses.dataclass
class State:
    """What a checkpoint holds beside tensors.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        updates: of the optimizer; a skipped step makes none.
        threads: of each rank; on the CPU, sums depend on how they are split.
        run: the run's identity.
        metrics_bytes, metrics_sha256: of metrics.jsonl up to here; -1 where an earlier version wrote the checkpoint.
        receipt: the digest of the last line of receipt.jsonl; empty where an earlier version wrote the checkpoint.
        best_step, best_loss, since_best, evaluated_step: the fields of `Best`; the loss is 0 where there is none.
    """

    format: int
    step: int
    updates: int
    ranks: int
    threads: int
    torch: str
    run: dict
    best_step: int = -1
    best_loss: float = 0.0
    since_best: int = 0
    evaluated_step: int = -1
    metrics_bytes: int = -1
    metrics_sha256: str = ""
    receipt: str = ""

    @property
    def best(self) -> Best:
        loss = self.best_loss if self.best_step >= 0 else math.inf
        return Best(self.best_step, loss, self.since_best, self.evaluated_step)


def save(
    directory: Path,
    trainable: TrainableSet,
    optimizer: Optimizer,
    state: State,
    keep: int,
    world: World,
    best: dict[str, Tensor] | None = None,
    files: dict[str, bytes] | None = None,
    run_id: str = "",
) -> None:
    """Publishes the checkpoint of a finished step under `directory`, and then removes what is older than the newest
    `keep` that verify. Every rank calls it.

    best: what was trained up to the best evaluation, where it is kept.
    files: further files, by name.
    run_id: part of the names of what is not complete.
    """
    trained = gather(trainable.parameters.items(), world)
    moments = gather(_moments(trainable, optimizer), world)
    best_tensors = gather((best or {}).items(), world)

    def write(temporary: Path) -> None:
        trainable.save(temporary, trained)
        write_tensors(temporary / MOMENTS, progress(moments, "saving the optimizer", unit="tensors"))
        if best:
            write_tensors(temporary / BEST, best_tensors)
        write_files(temporary, files or {})
        (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
        write_manifest(temporary)

    if world.rank == 0:
        publish(path_of(directory, state.step), write, run_id)
        prune(directory, keep, run_id)
    else:
        take_part(trained, moments, best_tensors)
    world.barrier_without_timeout(f"after the checkpoint of step {state.step}")


def _moments(trainable: TrainableSet, optimizer: Optimizer) -> Iterable[tuple[str, Tensor]]:
    """The optimizer's moments and their names in files, one parameter after the other."""
    for name, parameter in trainable.parameters.items():
        for moment, tensor in optimizer.moments(parameter).items():
            yield f"{moment}.{name}", tensor


def prune(directory: Path, keep: int, run_id: str = "") -> None:
    """Removes the checkpoints older than the newest `keep` that verify; a damaged one does not count, and is logged.
    One that holds what its manifest does not list, or is a link, is left where it is.
    """
    verified = 0
    for path in reversed(published(directory)):
        if verified == keep:
            if foreign := _not_in_manifest(path):
                log.warning("%s: holds %s, and is not removed", path, foreign)
            elif not path.is_symlink():
                # renamed first: a checkpoint's own name never stands for half of one
                shutil.rmtree(path.rename(temporary_path(path, run_id)))
            continue
        try:
            verify(path)
            verified += 1
        except UserError as error:
            log.warning("%s", error)


def _not_in_manifest(directory: Path) -> str | None:
    """A file of a checkpoint's directory that its manifest does not list, if there is one."""
    try:
        listed = {MANIFEST, *read_json(directory / MANIFEST)}
    except UserError:
        listed = set()
    return next((path.name for path in sorted(directory.iterdir()) if path.name not in listed), None)


def published(directory: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))


def path_of(directory: Path, step: int) -> Path:
    """Where under `directory` the checkpoint of a step is published."""
    return directory / f"step-{step:08d}"


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None where it has another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def verify(directory: Path) -> State:
    """What a checkpoint says of itself, after every file has the size and SHA-256 its manifest says.

    Raises:
        UserError: naming the file, what was expected and what was found.
    """
    if not (directory / MANIFEST).is_file():
        raise UserError(f"missing {MANIFEST}; expected a complete checkpoint", path=directory)
    verify_manifest(directory)
    path = directory / "state.json"
    values = read_json(path)
    kinds = typing.get_type_hints(State)
    if values.get("format") != FORMAT or values.keys() - kinds:
        raise OtherVersion(_other_version(values, kinds), path=path)
    added = {key.name: key.default for key in dataclasses.fields(State) if key.default is not dataclasses.MISSING}
    values = added | values
    if {name: type(value) for name, value in values.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise UserError(f"expected {expected}; got {', '.join(values)}", path=path)
    state = State(**values)
    if (
        not 0 <= state.updates <= state.step
        or max(state.best_step, state.evaluated_step) > state.step
        or _step_of(directory) not in (None, state.step)
    ):
        raise UserError(
            f"says step {state.step} with {state.updates} updates, in {directory.name}; was it renamed?", path=path
        )
    return state


_REMEDY = "finish the run with the version that began it, or choose another train.output"


def _other_version(values: dict, known: Iterable[str]) -> str:
    """Of the content of a state.json."""
    found = values.get("format")
    if found is None:
        return f"the checkpoint has no format number: an earlier version of minorca wrote it; {_REMEDY}"
    what = f"has {quote(sorted(values.keys() - known))}, unknown to this version"
    if found != FORMAT:
        what = f"has format {quote(found)}; this version of minorca reads format {FORMAT}"
    return f"a newer version of minorca wrote the checkpoint: it {what}; {_REMEDY}"


def find(config: Config) -> Path | None:
    """The checkpoint that `train.resume` asks for, or None to start afresh.

    Raises:
        UserError: there are some and none is to be used, or none can be; there is no fallback unless asked for.
    """
    directory = config.output / "checkpoints"
    resume = config.train.resume
    existing = published(directory)
    if resume == "never":
        if existing:
            message = "holds checkpoints and train.resume is never; remove them, or choose another train.output"
            raise UserError(message, path=directory)
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "last-good":
        return _last_undamaged(directory, existing)
    path = user_path(resume)
    # it started this run, which has checkpoints of its own since
    if existing and path.resolve().parent != directory.resolve():
        log.info("%s: has checkpoints of its own; %s was their start", directory, path)
        return existing[-1]
    if not path.is_dir():
        message = f"is {resume}; expected auto, last-good, never, or a checkpoint's directory"
        raise UserError(message, field="train.resume")
    return path


def _last_undamaged(directory: Path, existing: list[Path]) -> Path | None:
    for path in reversed(existing):
        try:
            verify(path)
            return path
        except OtherVersion:
            raise
        except UserError as error:
            log.warning("skipped: %s", error)
    if existing:
        raise UserError(
            f"none of its {len(existing)} checkpoints is undamaged; remove them to start over, or choose another "
            "train.output",
            path=directory,
        )
    return None


def read_state(directory: Path, now: dict, config: Config) -> State:
    """What a checkpoint says, once its files are verified and it is of this run (`now`, its identity).

    Raises:
        UserError: a damaged file, what differs by name and may not, or later checkpoints that the run would collide
            with.
    """
    try:
        state = verify(directory)
    except OtherVersion:
        raise
    except UserError as error:
        if config.train.resume == "auto":
            error.advice = "to resume from the newest undamaged checkpoint, set train.resume to last-good"
        raise
    differences = changes(state.run, now)
    # files of the base have names of their own
    if unknown := [key for key in differences if key not in now and not key.endswith("'s sha256")]:
        what = f"it has {', '.join(unknown)}, unknown to this version"
        raise OtherVersion(f"a newer version of minorca wrote the checkpoint: {what}; {_REMEDY}", path=directory)
    raise_problems(
        _refusal(directory, config.start_key, key, *values)
        for key, values in differences.items()
        if key not in _CHANGEABLE
    )
    if config.train.resume != "last-good" and (later := _later(state, config)):
        raise UserError(
            f"is later than {directory.name}; remove it to go back, or choose another train.output", path=later[0]
        )
    return state


def changes(then: dict, now: dict) -> dict[str, tuple[object, object]]:
    """In what this run differs from the one that wrote a checkpoint: key -> before, now.

    A key that the checkpoint lacks was added by a later version than wrote it, and had its default: that of a setting,
    or None.
    """
    absent = defaults()
    before = {key: then.get(key, absent.get(key)) for key in sorted(now.keys() | then.keys())}
    return {key: (value, now.get(key)) for key, value in before.items() if now.get(key) != value}


def _refusal(directory: Path, start_key: str, key: str, before: object, after: object) -> UserError:
    message = f"was {before!r} in the checkpoint and is {after!r} now; set it back"
    advice = "or choose another train.output"
    # an adapter fits a network and settings of its own alone
    if not key.startswith(("model.", "lora.", "the base's", "the initial", "train.full", "train.new_tokens")):
        advice = f"or start another run from what was trained: another train.output, and {start_key} {directory}"
    return UserError(f"{message}, {advice}", path=directory, field=key)


def _later(state: State, config: Config) -> list[Path]:
    return [path for path in published(config.output / "checkpoints") if (_step_of(path) or 0) > state.step]


def set_damaged_aside(state: State, config: Config) -> None:
    """Renames what `last-good` passed over, out of the way of what is to come; a person may want to look at it."""
    for path in _later(state, config):
        aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        log.warning("%s: now %s", path, aside.name)


def load(directory: Path, state: State, trainable: TrainableSet, optimizer: Optimizer) -> None:
    """Fills what is trained and the optimizer, sharded or not, from a checkpoint that `read_state` has verified."""
    trainable.load(directory)
    shapes = {name: tuple(tensor.shape) for name, tensor in _moments(trainable, optimizer)}
    moments = open_exactly(directory / MOMENTS, shapes, FLOATS | {"U8"})
    for name, parameter in trainable.parameters.items():
        values = optimizer.moments(parameter)
        for moment, tensor in values.items():
            stored = f"{moment}.{name}"
            fill_rows(tensor, lambda start, stop, stored=stored: moments.read(stored, start, stop))
        optimizer.set_moments(parameter, values, state.updates)


def has_best(directory: Path) -> bool:
    """Whether a checkpoint holds what was trained up to the best evaluation."""
    return any(directory.glob(f"{Path(BEST).stem}*"))


def load_best(directory: Path, trainable: TrainableSet) -> dict[str, Tensor]:
    """What was trained up to the best evaluation, as `TrainableSet.snapshot`, from a verified checkpoint that holds
    it.
    """
    best = trainable.snapshot()
    file = open_exactly(directory / BEST, {name: tuple(tensor.shape) for name, tensor in best.items()})
    for name, tensor in best.items():
        fill_rows(tensor, lambda start, stop, name=name: file.read(name, start, stop))
    return best
