"""The parts of a training step, each called by every rank."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from minorca.config import Config
from minorca.data.packing import Batch, Step, make_batch
from minorca.data.store import TokenStore
from minorca.model.lora import seed_dropout
from minorca.model.network import Mistral
from minorca.train.build import Learner
from minorca.train.forward import forward
from minorca.train.objectives import Counts, Objective, Sums
from minorca.train.ranks import World


def batch_sums(model: Mistral, objective: Objective, batch: Batch) -> Sums:
    """The objective's sums over a micro-batch, by one forward."""
    return forward(model, batch, objective.head(batch))


def local_batch(store: TokenStore, micro_batches: Step, index: int, device: torch.device) -> Batch:
    """A rank's micro-batch; past the last one, one without targets: every rank takes part in all collectives."""
    batch = make_batch(store, micro_batches[min(index, len(micro_batches) - 1)])
    return (batch if index < len(micro_batches) else batch.without_targets()).to(device)


def forward_backward(
    learner: Learner,
    batch: Batch,
    counts: Counts,
    last: bool,
    clock: Callable[[str], None] = lambda phase: None,
) -> Sums:
    """Adds a micro-batch's gradients; returns its sums, detached.

    last: the step's last micro-batch of this rank, with which FSDP reduces gradients over all ranks.
    """
    clock("forward")
    if isinstance(learner.model, FSDPModule):
        learner.model.set_requires_gradient_sync(last or learner.reduce_each)
        learner.model.set_requires_all_reduce(last)
    sums = batch_sums(learner.model, learner.objective, batch)
    clock("backward")
    learner.objective.loss(sums, counts).backward()
    return {name: value.detach() for name, value in sums.items()}


def locate_nonfinite(
    learner: Learner, store: TokenStore, micro_batches: Step, step: int, config: Config, world: World
) -> str:
    """Where a NaN or infinite loss or gradient came from: runs the step's micro-batches again, each alone."""
    counts = learner.objective.counts(store, np.concatenate(micro_batches))
    found = []
    for index, rows in enumerate(micro_batches):
        learner.optimizer.zero_grad()
        seed_dropout(learner.model, config.train.seed, step, index)
        rank = index % world.size
        batch = make_batch(store, rows)
        batch = (batch if world.rank == rank else batch.without_targets()).to(world.device)
        sums = forward_backward(learner, batch, counts, last=True)
        (loss,) = world.sum([learner.objective.loss(sums, counts).item()])
        learner.trainable.sum_gradients(world)
        norm = learner.trainable.clip_gradients(config.optim.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            places = ", ".join(map(store.locate, rows))
            found.append(f"rank {rank}, loss {loss}, gradient norm {norm}, rows {places}")
    return "; ".join(found) or "no micro-batch alone reproduces it: a fault of the hardware, or of their sum"
