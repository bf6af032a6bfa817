"""The parts of a training step, each called by every rank."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from minorca.config import Config
from minorca.data.packing import Batch, Step, make_batch
from minorca.data.store import TokenStore
from minorca.model.attention import PackedAttention
from minorca.model.lora import seed_dropout
from minorca.model.network import Mistral
from minorca.train.build import Learner
from minorca.train.objectives import Objective, Outcome
from minorca.train.ranks import World


def batch_outcome(model: Mistral, objective: Objective, batch: Batch, normalizer: float) -> Outcome:
    """What a micro-batch is worth, by one forward."""
    # made here, not from cu_seqlens inside: FSDP moves a forward's tensors to the GPU, and reading them back would
    # stall it
    attend = PackedAttention(batch.cu_seqlens, len(batch.tokens), model.arch.window, batch.tokens.device)
    return model(batch.tokens, attend=attend, head=objective.head(batch, normalizer))


def local_batch(store: TokenStore, micro_batches: Step, index: int, device: torch.device) -> Batch:
    """A rank's micro-batch; past the last one, one without targets: every rank takes part in all collectives."""
    batch = make_batch(store, micro_batches[min(index, len(micro_batches) - 1)])
    return (batch if index < len(micro_batches) else batch.without_targets()).to(device)


def forward_backward(
    learner: Learner,
    batch: Batch,
    normalizer: float,
    last: bool,
    clock: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Adds a micro-batch's gradients; returns what it gave, detached.

    last: the step's last micro-batch of this rank, with which FSDP reduces gradients over all ranks.
    """
    clock("forward")
    if isinstance(learner.model, FSDPModule):
        learner.model.set_requires_gradient_sync(last or learner.reduce_each)
        learner.model.set_requires_all_reduce(last)
    outcome = batch_outcome(learner.model, learner.objective, batch, normalizer)
    clock("backward")
    outcome.loss.backward()
    return Outcome(outcome.loss.detach(), {name: value.detach() for name, value in outcome.sums.items()})


def locate_nonfinite(
    learner: Learner, store: TokenStore, micro_batches: Step, step: int, config: Config, world: World
) -> str:
    """Where a NaN or infinite loss or gradient came from: runs the step's micro-batches again, each alone."""
    normalizer = learner.objective.normalizer(store, np.concatenate(micro_batches))
    found = []
    for index, rows in enumerate(micro_batches):
        learner.optimizer.zero_grad()
        seed_dropout(learner.model, config.train.seed, step, index)
        rank = index % world.size
        batch = make_batch(store, rows)
        batch = (batch if world.rank == rank else batch.without_targets()).to(world.device)
        outcome = forward_backward(learner, batch, normalizer, last=True)
        (loss,) = world.sum([outcome.loss.item()])
        learner.trainable.sum_gradients(world)
        norm = learner.trainable.clip_gradients(config.optim.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            places = ", ".join(map(store.locate, rows))
            found.append(f"rank {rank}, loss {loss}, gradient norm {norm}, rows {places}")
    return "; ".join(found) or "no micro-batch alone reproduces it: a fault of the hardware, or of their sum"
