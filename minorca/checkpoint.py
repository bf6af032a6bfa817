"""Checkpoints: complete or absent, verified before they are read, no code in them.

OUTPUT/checkpoints/step-00000100/ holds the adapter in PEFT's format, optimizer.safetensors (AdamW's moments under the same
names), state.json (step, and the settings that define the run) and, written last, MANIFEST.json with every file's size and
SHA-256. It is written under another name and renamed; a published one is never written into again.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minorca.architecture import read_json
from minorca.config import Config
from minorca.data.store import TokenStore
from minorca.errors import UserError
from minorca.files import publish, sha256, write_manifest
from minorca.lora import LoRASettings, adapter_parameters, load_adapter, save_adapter
from minorca.model import Mistral
from minorca.parallel import World, whole
from minorca.weights import fill_rows, open_safetensors

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = re.compile(r"step-(\d{8})")


def identity(config: Config, store: TokenStore) -> dict:
    """What a run's numbers follow from: its rows, and all settings but where and how often it writes, and on what it runs."""
    values = {f"{s}.{k}": v for s, keys in dataclasses.asdict(config).items() for k, v in keys.items() if s != "parallel"}
    for key in ("output", "checkpoint_every", "keep", "eval_every", "log_every", "resume"):
        del values[f"train.{key}"]
    return json.loads(json.dumps(values | {"the rows' sha256": store.sha256()}))


def save(directory: Path, model: Mistral, optimizer: torch.optim.Optimizer, step: int, run: dict, config: Config, settings: LoRASettings, world: World) -> None:
    """Publishes the checkpoint of a finished step under `directory` and removes all but the newest `keep`. Every rank calls it."""
    parameters = adapter_parameters(model)
    adapter = {name: whole(p) for name, p in parameters.items()}
    moments = {f"{m}.{name}": whole(optimizer.state[p][m]) for m in MOMENTS for name, p in parameters.items()}

    def write(temporary: Path) -> None:
        save_adapter(temporary, adapter, settings, config.model.path)
        save_file(moments, temporary / "optimizer.safetensors")
        state = {"step": step, "run": run}
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        write_manifest(temporary)

    if world.rank == 0:
        publish(directory / f"step-{step:08d}", write)
        for old in published(directory)[: -config.train.keep]:
            shutil.rmtree(old)
    torch.distributed.barrier()


def sweep(output: Path) -> None:
    """Removes what a killed run had begun to write."""
    for leftover in (*output.glob("*.tmp-*"), *output.glob("checkpoints/*.tmp-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def published(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    names = directory.iterdir() if directory.is_dir() else []
    return sorted(path for path in names if STEP.fullmatch(path.name) and (path / "MANIFEST.json").is_file())


def verify(directory: Path) -> dict:
    """A checkpoint's state.json, after every file has the size and SHA-256 its manifest says.

    Raises:
        UserError: naming the file, what was expected and what was found.
    """
    if not (directory / "MANIFEST.json").is_file():
        raise UserError(f"{directory}: no MANIFEST.json; expected a complete checkpoint")
    for name, expected in read_json(directory / "MANIFEST.json").items():
        path = directory / name
        if name != path.name or not path.is_file():
            raise UserError(f"{path}: named by the checkpoint's manifest, and not there; remove {directory} to fall back to an older one")
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if found != expected:
            raise UserError(f"{path}: is not what was saved (expected {expected}, found {found}); remove {directory} to fall back to an older one")
    return read_json(directory / "state.json")


def find(config: Config) -> Path | None:
    """The checkpoint `train.resume` asks for, or None to start afresh."""
    directory = Path(config.train.output) / "checkpoints"
    if config.train.resume == "never":
        if published(directory):
            raise UserError(f"{directory}: holds checkpoints and train.resume is never; remove them, or choose another train.output")
        return None
    if config.train.resume == "auto":
        return (published(directory) or [None])[-1]
    path = Path(config.train.resume)
    if not path.is_dir():
        raise UserError(f"train.resume is {config.train.resume}; expected auto, never, or a checkpoint's directory")
    return path


def read_step(directory: Path, now: dict, config: Config) -> int:
    """The step a checkpoint was made after, once its files are verified and it is of this run (`now`, its identity).

    Raises:
        UserError: a damaged file, the settings that differ by name, or later checkpoints that going on would run into.
    """
    state = verify(directory)
    then = state["run"]
    if differing := [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in sorted(now.keys() | then) if now.get(key) != then.get(key)]:
        raise UserError(f"{directory}: made with other settings: {'; '.join(differing)}; set them back, or choose another train.output")
    for later in published(Path(config.train.output) / "checkpoints"):
        if int(STEP.fullmatch(later.name)[1]) > state["step"]:
            raise UserError(f"{later}: is later than {directory.name}; remove it to go back, or choose another train.output")
    return state["step"]


def load(directory: Path, step: int, model: Mistral, optimizer: torch.optim.Optimizer) -> None:
    """Fills adapters and optimizer, sharded or not, from a checkpoint that `read_step` has verified."""
    load_adapter(model, directory)
    moments = open_safetensors(directory / "optimizer.safetensors")
    for name, parameter in adapter_parameters(model).items():
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in MOMENTS:
            values, rows = torch.zeros_like(parameter), moments.get_slice(f"{moment}.{name}")
            fill_rows(values, lambda start, stop: rows[start:stop])
            optimizer.state[parameter][moment] = values
