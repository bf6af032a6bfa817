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
from minorca.train.kto import KTO
from minorca.train.objectives import NextToken, Objective
from minorca.train.optim import Optimizer, adamw
from minorca.train.preference_objective import preference, stored
from minorca.train.ranks import World
from minorca.train.reference import Reference
from minorca.train.trainable import Adapters, TrainableSet, Weights


@dataclass
class Learner:
    """What learns: the model, the parameters that are trained, what they minimize, and the optimizer.

    Attributes:
        reduce_each: FSDP reduces gradients after every micro-batch, not once a step: until then they are whole on each
            rank, which is little for adapters alone.
        reference: what preferences are measured against, where the objective needs one.
    """

    model: Mistral
    trainable: TrainableSet
    objective: Objective
    optimizer: Optimizer
    reduce_each: bool = False
    reference: Reference | None = None


def build(config: Config, base: ModelFiles, world: World, resumed: bool = False) -> Learner:
    """Meta device, adapters, activation checkpointing, sharding, then weights into what each rank stores.

    Args:
        resumed: a checkpoint will be loaded, so `lora.init`, or of all weights the base, is not read again unless a
            reference needs it.
    """
    full = config.train.full
    dtype = getattr(torch, config.model.dtype)
    settings = lora_settings(config, base.new_ids)
    measured = config.has_reference
    init = config.lora.init if measured or not resumed else None
    check_adapters(config, settings, base.arch.layers)
    model = build_model(base.arch, torch.float32 if full else dtype, base.quantization)
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
    if not (full and resumed) or measured:
        load_weights(model, base)
    init_adapters(model, config.train.seed)
    if init:
        load_adapter(model, init)
    adapters = Adapters(model, settings, config.model.path)
    trainable = TrainableSet([Weights(model)], dtype) if full else TrainableSet([adapters])
    reference = _reference(config, base, model, trainable) if measured else None
    optimizer = adamw(trainable.parameters.values(), config.optim)
    return Learner(model, trainable, _objective(config, reference), optimizer, full, reference)


def _reference(config: Config, base: ModelFiles, model: Mistral, trainable: TrainableSet) -> Reference:
    """What preferences are measured against. The model holds the values that training starts from, and does again when
    this returns.
    """
    other = config.dpo.reference
    is_start = other == "auto" or (other == "base" and not config.lora.init)
    # computed before the first step, it needs no values of its own
    parameters = [] if is_start and config.dpo.precompute else trainable.parameters.values()
    reference = Reference(model, parameters)
    if not is_start:
        if other == "base":
            load_weights(model, base)
            init_adapters(model, config.train.seed)
        else:
            load_adapter(model, other)
        reference.exchange()
    return reference


def _objective(config: Config, reference: Reference | None) -> Objective:
    name = config.train.objective
    if name == "sft":
        return NextToken()
    if name == "kto" and reference:
        return KTO(config.dpo, reference, config.train.micro_batch_tokens)
    return preference(name, config.dpo, stored if reference is None or config.dpo.precompute else reference.of)


def lora_settings(config: Config, new_ids: range = range(0)) -> LoRASettings:
    """new_ids: whose rows are trained where the whole matrix is not."""
    lora = config.lora
    whole = tuple(lora.modules_to_save)
    ids = tuple(new_ids) if len(whole) < len(MATRICES) else ()
    return LoRASettings(
        lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.rslora, modules_to_save=whole, token_ids=ids
    )


def check_adapters(config: Config, ours: LoRASettings, layers: int) -> None:
    """Raises UserError where an adapter to start from, or to measure against, is of another shape or scale."""
    for key, directory in config.adapters.items():
        _check_adapter(directory, key, ours, layers)


def _check_adapter(directory: str, key: str, ours: LoRASettings, layers: int) -> None:
    theirs = read_adapter_settings(directory)
    for name in ("rank", "alpha", "targets", "rslora", "modules_to_save"):
        here, there = getattr(ours, name), getattr(theirs, name)
        same = set(here) == set(there) if isinstance(here, tuple) else here == there
        if not same:
            message = f"is {here}, and the adapter of {key}, {directory}, has {there}; they must be equal"
            raise UserError(message, field=f"lora.{name}")
    if ours.token_ids != theirs.token_ids:
        here, there = list(ours.token_ids), list(theirs.token_ids)
        message = f"gives rows of the ids {here}, and the adapter of {key}, {directory}, has rows of {there}"
        raise UserError(message, field="train.new_tokens")
    if any(theirs.part(i, target) != ours.part(i, target) for i in range(layers) for target in ours.targets):
        raise UserError(
            f"is {directory}, whose rank or scale is not the same in every layer, or which leaves layers out; only "
            "uniform adapters can be trained or compared with: merge it (minorca.export), and train the result",
            field=key,
        )
