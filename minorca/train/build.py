"""The model, what is trained of it, and the optimizer, ready for the first step."""

from dataclasses import dataclass

import torch

from minorca.config import Config
from minorca.errors import UserError
from minorca.files.adapters import load_adapter, read_adapter_settings
from minorca.files.weights import ModelFiles, load_weights
from minorca.model.build import build_model
from minorca.model.layout import MATRICES
from minorca.model.lora import LoRASettings, add_adapters, init_adapters, pad_for_adapters
from minorca.model.network import Mistral
from minorca.train import parallel
from minorca.train.objectives import OBJECTIVES, Objective
from minorca.train.optim import Optimizer, adamw
from minorca.train.ranks import World
from minorca.train.trainable import Adapters, TrainableSet, Weights


@dataclass
class Learner:
    """What learns: the model, the parameters that are trained, what they minimize, and the optimizer.

    Attributes:
        reduce_each: FSDP reduces gradients after every micro-batch, not once a step: until then they are whole on each
            rank, which is little for adapters alone.
    """

    model: Mistral
    trainable: TrainableSet
    objective: Objective
    optimizer: Optimizer
    reduce_each: bool = False


def build(config: Config, base: ModelFiles, world: World, resumed: bool = False) -> Learner:
    """Meta device, adapters, activation checkpointing, sharding, then weights into what each rank stores.

    Args:
        resumed: a checkpoint will be loaded, so `lora.init`, or of all weights the base, is not read again.
    """
    full = config.train.full
    dtype = getattr(torch, config.model.dtype)
    settings = lora_settings(config, base.new_ids)
    init = None if resumed else config.lora.init
    if init:
        check_init(init, settings, base.arch.layers)
    model = build_model(base.arch, torch.float32 if full else dtype)
    if full:
        model.requires_grad_(True)
    else:
        add_adapters(model, settings)
    parallel.checkpoint_activations(model, config.parallel.activation_checkpointing)
    # of weights that are trained, FSDP makes the copies in `dtype` that are multiplied, also on one rank
    if full or parallel.shards(model, config.parallel, world):
        parallel.shard(model, config.parallel, world, dtype)
    pad_for_adapters(model, world.device)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
    # a checkpoint of all weights needs no others
    if not (full and resumed):
        load_weights(model, base)
    init_adapters(model, config.train.seed)
    if init:
        load_adapter(model, init)
    adapters = Adapters(model, settings, config.model.path)
    trainable = TrainableSet([Weights(model)], dtype) if full else TrainableSet([adapters])
    optimizer = adamw(trainable.parameters.values(), config.optim)
    return Learner(model, trainable, OBJECTIVES[config.train.objective](), optimizer, reduce_each=full)


def lora_settings(config: Config, new_ids: range = range(0)) -> LoRASettings:
    """new_ids: whose rows are trained where the whole matrix is not."""
    lora = config.lora
    whole = tuple(lora.modules_to_save)
    ids = tuple(new_ids) if len(whole) < len(MATRICES) else ()
    return LoRASettings(
        lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.rslora, modules_to_save=whole, token_ids=ids
    )


def check_init(init: str, ours: LoRASettings, layers: int) -> None:
    """Raises UserError where the adapter to start from is of another shape or scale."""
    theirs = read_adapter_settings(init)
    for key in ("rank", "alpha", "targets", "rslora", "modules_to_save"):
        here, there = getattr(ours, key), getattr(theirs, key)
        same = set(here) == set(there) if isinstance(here, tuple) else here == there
        if not same:
            raise UserError(f"is {here}, and the adapter {init} has {there}; set them equal", field=f"lora.{key}")
    if ours.token_ids != theirs.token_ids:
        here, there = list(ours.token_ids), list(theirs.token_ids)
        message = f"gives rows of the ids {here}, and the adapter {init} has rows of {there}; set them equal"
        raise UserError(message, field="train.new_tokens")
    if any(theirs.part(i, target) != ours.part(i, target) for i in range(layers) for target in ours.targets):
        raise UserError(
            f"is {init}, whose rank or scale is not the same in every layer, or which leaves layers out; training "
            f"starts from uniform adapters alone: merge it (minorca.export), and train the result",
            field="lora.init",
        )
