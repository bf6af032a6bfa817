"""The reference's log-probabilities of all rows: computed once, before the first step, and kept beside the rows.

They lie in STORE.reference-KEY/, complete or absent. KEY is a hash of everything that they follow from: the rows, the
base, the adapter, dtype, torch and device. What belongs to another reference is thereby never read.
"""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from minorca.config import Config
from minorca.data.packing import plan_epoch
from minorca.data.store import TokenStore
from minorca.errors import UserError
from minorca.files.atomic import MANIFEST, publish, remove_unfinished, verify_manifest, write_manifest
from minorca.progress import progress
from minorca.train.inputs import Inputs
from minorca.train.ranks import World
from minorca.train.reference import Reference
from minorca.train.step import local_batch

log = logging.getLogger("minorca.train")

FORMAT = 1
VALUES = "logps.bin"
# of a run's identity, what the reference follows from; the rows come from the store
_SECTIONS = ("the base's", "the initial", "the reference", "model.", "lora.", "train.new_tokens", "train.full")


def with_reference(inputs: Inputs, reference: Reference, config: Config, world: World) -> Inputs:
    """The inputs, their rows with the reference's log-probabilities. Every rank calls it before the first step."""
    world.set_status("computing the reference's log-probabilities")

    what = reference, config, inputs.identity, world
    held_out = inputs.held_out and _measured(inputs.held_out, *what)
    return replace(inputs, store=_measured(inputs.store, *what), held_out=held_out)


def _measured(store: TokenStore, reference: Reference, config: Config, identity: dict, world: World) -> TokenStore:
    directory = _directory(store, identity, world)
    values = _read(directory) if directory else None
    if world.sum([values is not None])[0] < world.size:
        log.info("computing the reference's log-probabilities of %d rows", len(store))
        values = _compute(store, reference, config, world)
        if directory and world.rank == 0:
            _write(directory, values)
    return replace(store, reference=values)


def _directory(store: TokenStore, identity: dict, world: World) -> Path | None:
    """None for rows that lie in memory alone."""
    if store.path is None:
        return None
    key = {name: value for name, value in identity.items() if name.startswith(_SECTIONS)}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    key |= {"format": FORMAT, "rows": store.sha256(), "torch": torch.__version__, "device": device}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return store.path.with_name(f"{store.path.name}.reference-{digest}")


def _read(directory: Path) -> np.ndarray | None:
    if not directory.is_dir():
        return None
    try:
        verify_manifest(directory)
        values = np.fromfile(directory / VALUES, np.float32)
    except (UserError, OSError) as error:
        log.warning("%s; the reference's log-probabilities are computed again", error)
        return None
    log.info("the reference's log-probabilities are those of %s", directory)
    return values


def _compute(store: TokenStore, reference: Reference, config: Config, world: World) -> np.ndarray:
    capacity = config.train.micro_batch_tokens
    values = torch.zeros(int(store.trained_counts.sum()), device=world.device)
    plan = plan_epoch(store.lengths, capacity, world.size, config.data.packing, seed=0, epoch=0)
    for micro_batches in progress(plan, "reference", unit="micro-batches"):
        batch = local_batch(store, micro_batches, world.rank, world.device)
        logps = reference.of(batch)
        if world.rank < len(micro_batches):
            rows = micro_batches[world.rank]
            for row, of_row in zip(rows, logps.split(store.trained_counts[rows].tolist())):
                values[store.trained_span(row)] = of_row
    if world.size > 1:
        dist.all_reduce(values)
    return values.cpu().numpy()


def _write(directory: Path, values: np.ndarray) -> None:
    # a damaged one
    remove_unfinished(directory, {VALUES, MANIFEST})

    def write(temporary: Path) -> None:
        values.tofile(temporary / VALUES)
        write_manifest(temporary)

    publish(directory, write)
