"""The model, what is trained of it, and the optimizer, ready for the first step."""

from dataclasses import dataclass

import torch

from minorca.config import Config
from minorca.errors import UserError
from minorca.files.adapters import load_adapter, read_adapter_settings
from minorca.files.weights import ModelFiles, load_weights
from minorca.model.build import build_model
from minorca.model.lora import LoRASettings, add_adapters, init_adapters, pad_for_adapters
from minorca.model.network import Mistral
from minorca.train import parallel
from minorca.train.objectives import OBJECTIVES, Objective
from minorca.train.optim import adamw
from minorca.train.ranks import World
from minorca.train.trainable import Adapters, TrainableSet


@dataclass
class Learner:
    """What learns: the model, the parameters that are trained, what they minimize, and the optimizer."""

    model: Mistral
    trainable: TrainableSet
    objective: Objective
    optimizer: torch.optim.Optimizer


def build(config: Config, base: ModelFiles, world: World, resumed: bool = False) -> Learner:
    """Meta device, adapters, activation checkpointing, sharding, then weights into what each rank stores.

    Args:
        resumed: a checkpoint will be loaded, so `lora.init` is not read again.
    """
    settings = lora_settings(config)
    init = None if resumed else config.lora.init
    if init:
        check_init(init, settings, base.arch.layers)
    model = build_model(base.arch, getattr(torch, config.model.dtype), base.quantization)
    add_adapters(model, settings)
    parallel.checkpoint_activations(model, config.parallel.activation_checkpointing)
    if parallel.shards(model, config.parallel, world):
        parallel.shard(model, config.parallel, world)
    pad_for_adapters(model, world.device)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
    load_weights(model, base)
    init_adapters(model, config.train.seed)
    if init:
        load_adapter(model, init)
    trainable = TrainableSet([Adapters(model, settings, config.model.path)])
    optimizer = adamw(trainable.parameters.values(), config.optim)
    return Learner(model, trainable, OBJECTIVES[config.train.objective](), optimizer)


def lora_settings(config: Config) -> LoRASettings:
    lora = config.lora
    return LoRASettings(lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.rslora)


def check_init(init: str, ours: LoRASettings, layers: int) -> None:
    """Raises UserError where the adapter to start from is of another shape or scale."""
    theirs = read_adapter_settings(init)
    for key in ("rank", "alpha", "targets", "rslora"):
        here, there = getattr(ours, key), getattr(theirs, key)
        same = set(here) == set(there) if key == "targets" else here == there
        if not same:
            raise UserError(f"is {here}, and the adapter {init} has {there}; set them equal", field=f"lora.{key}")
    if any(theirs.part(i, target) != ours.part(i, target) for i in range(layers) for target in ours.targets):
        raise UserError(
            f"is {init}, whose rank or scale is not the same in every layer, or which leaves layers out; training "
            f"starts from uniform adapters alone: merge it (minorca.export), and train the result",
            field="lora.init",
        )
