"""What a run trains, as a set: name -> parameter, in one place, with saving, loading, summing and clipping.

A member is one kind of trained thing: adapters, or all weights. The loop, checkpoints and parallelism know the set
alone.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minorca.files.adapters import load_adapter, save_adapter
from minorca.files.tensor_files import write_tensors
from minorca.files.weights import load_weights, open_model
from minorca.model.layout import source_tensors
from minorca.model.lora import LoRASettings, adapter_parameters
from minorca.model.network import Mistral
from minorca.progress import progress
from minorca.train.optim import clip_gradients
from minorca.train.ranks import World
from minorca_kernels import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Trainable(Protocol):
    """One kind of thing that a run trains, and its files."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in files -> parameter, in a fixed order; names are unique in the run."""
        ...

    def save(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the values of `parameters`, in their order, each whole and on the host, into an existing directory."""
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

    def save(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        save_adapter(directory, dict(tensors), self.settings, self.base_model)

    def load(self, directory: Path) -> None:
        load_adapter(self.model, directory)


class Weights:
    """All weights of a model, as a Hugging Face directory has them; projections that the network stacks are one
    parameter.
    """

    def __init__(self, model: Mistral):
        self.model = model
        self.layout = source_tensors(model.arch, "huggingface")

    def parameters(self) -> dict[str, nn.Parameter]:
        named = self.model.named_parameters()
        weights = {name.removesuffix(".weight").removesuffix(".base"): parameter for name, parameter in named}
        return {name: weights[name] for name in self.layout}

    def save(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        def split() -> Iterator[tuple[str, Tensor]]:
            for module, tensor in tensors:
                parts = self.layout[module]
                yield from zip([part.name for part in parts], tensor.split([part.rows for part in parts]))

        write_tensors(directory / "model.safetensors", progress(split(), "saving weights", unit="tensors"))

    def load(self, directory: Path) -> None:
        load_weights(self.model, open_model(directory))


class TrainableSet:
    """Everything that a run trains.

    Attributes:
        parameters: name -> parameter of all members, in a fixed order.
        final_dtype: of what a finished run leaves; None: that of the parameters.
    """

    def __init__(self, members: list[Trainable], final_dtype: torch.dtype | None = None):
        self.members = members
        self.final_dtype = final_dtype
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

    def final(self) -> Iterator[tuple[str, Tensor]]:
        """The values in `final_dtype`, sharded as the parameters."""
        return ((name, p.detach().to(self.final_dtype or p.dtype)) for name, p in self.parameters.items())

    def snapshot(self) -> dict[str, Tensor]:
        """As `final`, but values that further steps do not change, each rank's part on its host."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.final()}

    def save(self, directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Writes values of the parameters, in their order, each whole and on the host, into an existing directory."""
        for member in self.members:
            member.save(directory, islice(tensors, len(member.parameters())))

    def load(self, directory: Path) -> None:
        """Fills the parameters from what `save` wrote. Raises UserError: a file that does not fit."""
        for member in self.members:
            member.load(directory)

    def sum_gradients(self, world: World) -> None:
        """Adds up over the ranks what FSDP does not: the gradients of unsharded parameters, in one all-reduce."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None and not is_sharded(p)]
        if world.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def clip_gradients(self, max_norm: float) -> float:
        """Scales all gradients so that their common norm is at most max_norm; returns the norm before."""
        return clip_gradients(self.parameters.values(), max_norm)


def gather(tensors: Iterable[tuple[str, Tensor]], world: World) -> Iterator[tuple[str, Tensor]]:
    """Tensors, sharded or not, one after the other whole on the host of rank 0: it never holds all of a large model.

    Every rank iterates to the end.
    """
    for name, tensor in tensors:
        whole = tensor.detach()
        if is_sharded(whole):
            # parts in host memory are sent from the device
            whole = cast("DTensor", whole.to(world.device)).full_tensor()
        yield name, whole.cpu() if world.rank == 0 else whole


def take_part(*gathered: Iterator[tuple[str, Tensor]]) -> None:
    """What the other ranks do while rank 0 writes these."""
    for tensors in gathered:
        deque(tensors, maxlen=0)
