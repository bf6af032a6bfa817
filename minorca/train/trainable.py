"""What a run trains, as a set: name -> parameter, in one place, with saving, loading, summing and clipping.

A member is one kind of trained thing; adapters are the first. The loop, checkpoints and parallelism know the set alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minorca.files.adapters import load_adapter, save_adapter
from minorca.model.lora import LoRASettings, adapter_parameters
from minorca.model.network import Mistral
from minorca.train.optim import clip_gradients
from minorca.train.ranks import World


class Trainable(Protocol):
    """One kind of thing that a run trains, and its files."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in files -> parameter, in a fixed order; names are unique in the run."""
        ...

    def save(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the values of `parameters`, whole and on the host, into an existing directory."""
        ...

    def load(self, directory: Path) -> None:
        """Fills the parameters, sharded or not, from what `save` wrote. Raises UserError: a file that does not fit."""
        ...


class Adapters:
    """LoRA adapters, in PEFT's format."""

    def __init__(self, model: Mistral, settings: LoRASettings, base_model: str):
        self.model = model
        self.settings = settings
        self.base_model = base_model

    def parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.model)

    def save(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        save_adapter(directory, tensors, self.settings, self.base_model)

    def load(self, directory: Path) -> None:
        load_adapter(self.model, directory)


class TrainableSet:
    """Everything that a run trains.

    Attributes:
        parameters: name -> parameter of all members, in a fixed order.
    """

    def __init__(self, members: list[Trainable]):
        self.members = members
        self.parameters: dict[str, nn.Parameter] = {}
        for member in members:
            parameters = member.parameters()
            if repeated := self.parameters.keys() & parameters.keys():
                raise ValueError(f"trained twice: {', '.join(sorted(repeated))}")
            self.parameters |= parameters

    @property
    def count(self) -> int:
        """The number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def gather(self, world: World) -> dict[str, Tensor]:
        """The values, whole and on the host of rank 0; nothing on the others. Every rank calls it."""
        return gather(self.parameters, world)

    def snapshot(self, world: World) -> dict[str, Tensor]:
        """As `gather`, but values that further steps do not change."""
        return {name: tensor.clone() for name, tensor in self.gather(world).items()}

    def save(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Writes what `gather` gave rank 0 into an existing directory."""
        for member in self.members:
            member.save(directory, {name: tensors[name] for name in member.parameters()})

    def load(self, directory: Path) -> None:
        """Fills the parameters from what `save` wrote. Raises UserError: a file that does not fit."""
        for member in self.members:
            member.load(directory)

    def sum_gradients(self, world: World) -> None:
        """Adds up over the ranks what FSDP does not: the gradients of unsharded parameters, in one all-reduce."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None and not isinstance(p, DTensor)]
        if world.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def clip_gradients(self, max_norm: float) -> float:
        """Scales all gradients so that their common norm is at most max_norm; returns the norm before."""
        return clip_gradients(self.parameters.values(), max_norm)


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Tensors, sharded or not, whole on the host of rank 0; nothing on the others. Every rank calls it."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.rank == 0:
            gathered[name] = tensor.detach().cpu()
    return gathered
