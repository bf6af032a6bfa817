"""Adapters merged into a model's weights: what one adds, and how several are combined.

An adapter's delta of a projection is scale B A. Several are combined delta by delta, whole, one tensor at a time, which
is what the papers define; PEFT's add_weighted_adapter applies the same functions to A and B each.

linear     the weighted sum of the deltas (task arithmetic, arXiv:2212.04089)
ties       of each the largest `density` of its values is kept; at each place a sign is elected, that of the sum, and
           the mean is taken of the weighted values that have it (TIES, arXiv:2306.01708)
dare       of each a random `density` of its values is kept and divided by `density`, then the weighted sum (DARE,
           arXiv:2311.03099)
dare_ties  dropped as in dare, combined as in ties
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minorca.errors import UserError
from minorca.files.adapters import check_finite, open_adapter, read_adapter_settings
from minorca.files.hub import name_of, parse_id
from minorca.files.safe_io import quote
from minorca.model.architecture import Architecture
from minorca.model.build import build_model
from minorca.model.layout import projections
from minorca.model.lora import adapter_parameters, add_adapters, seed_of

METHODS = ("linear", "ties", "dare", "dare_ties")
# of the methods that leave out values
DEFAULT_DENSITY = 0.5


class WeightedAdapter(NamedTuple):
    """An adapter's directory, and what its deltas are multiplied by."""

    directory: str | Path
    weight: float = 1.0

    def __str__(self) -> str:
        return str(self.directory) if self.weight == 1 else f"{self.weight:g} x {self.directory}"


@dataclass(frozen=True)
class Merge:
    """Which adapters are merged, and how.

    Attributes:
        density: the part of its values that each delta keeps, of the methods other than linear.
        seed: of the values that dare keeps, which depend on the adapter's position and the tensor's name too.
    """

    adapters: tuple[WeightedAdapter, ...]
    method: str = "linear"
    density: float = DEFAULT_DENSITY
    seed: int = 0

    @staticmethod
    def of(adapter: "str | Path | Merge | None") -> "Merge | None":
        """A merge of one adapter, or the merge itself."""
        if adapter is None or isinstance(adapter, Merge):
            return adapter
        return Merge((WeightedAdapter(adapter),))

    def without_paths(self) -> str:
        """As `str`, for what may be published: of a directory, its name alone."""
        named = [
            adapter if parse_id(adapter.directory) else adapter._replace(directory=name_of(adapter.directory))
            for adapter in self.adapters
        ]
        return str(replace(self, adapters=tuple(named)))

    def __str__(self) -> str:
        names = " and ".join(map(str, self.adapters))
        how = {"linear": "", "ties": f" by ties, density {self.density:g}"}
        return names + how.get(self.method, f" by {self.method}, density {self.density:g}, seed {self.seed}")


def parse_merge(
    adapters: list[str], method: str | None = None, density: float | None = None, seed: int | None = None
) -> Merge | None:
    """From the options of a command: --adapter DIR[=WEIGHT], as often as there are adapters; None without any.

    Raises:
        UserError: a weight or density that is not valid, or an option that changes nothing.
    """
    for option, value in (("--merge", method), ("--density", density), ("--seed", seed)):
        if value is not None and not adapters:
            raise UserError("needs --adapter", field=option)
    if density is not None and not 0 < density <= 1:
        raise UserError(f"is {density:g}; expected a number over 0, at most 1", field="--density")
    if density is not None and method in (None, "linear"):
        raise UserError("changes nothing in a linear merge; give --merge ties or dare with it", field="--density")
    if seed is not None and method not in ("dare", "dare_ties"):
        raise UserError("changes nothing without --merge dare or dare_ties", field="--seed")
    chosen = density or DEFAULT_DENSITY
    found = tuple(map(_weighted, adapters))
    return Merge(found, method or "linear", chosen, seed or 0) if found else None


def _weighted(text: str) -> WeightedAdapter:
    directory, separator, weight = text.rpartition("=")
    # a directory's name may have the sign
    if not separator or Path(text).is_dir():
        return WeightedAdapter(text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not directory:
        raise UserError(f"is {text}, with the weight {quote(weight)}; expected DIR=NUMBER", field="--adapter")
    return WeightedAdapter(directory, value)


class Deltas:
    """What a merge adds to the weights of a model's projections, by Hugging Face's names.

    Raises:
        UserError: what is wrong with which file of an adapter.
    """

    def __init__(self, arch: Architecture, merge: Merge):
        self.merge = merge
        self.adapters = [_Opened(arch, adapter) for adapter in merge.adapters]

    def add(self, name: str, weight: Tensor) -> Tensor:
        """weight + the combined deltas, in fp32; the weight itself where no adapter acts on it.

        The weight is not changed: it may be a mapped file.
        """
        found = [(n, adapter) for n, adapter in enumerate(self.adapters) if name in adapter.scales]
        if not found:
            return weight
        total = weight.float()
        if self.merge.method == "linear":
            for _, adapter in found:
                total = total.add(adapter.product(name), alpha=adapter.scales[name] * adapter.weight)
            return total
        deltas = [self._sparse(name, n, adapter.product(name).mul_(adapter.scales[name])) for n, adapter in found]
        combine = sum_of if self.merge.method == "dare" else elect
        return total.add(combine(deltas, [adapter.weight for _, adapter in found]))

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [R, K] and B [N, R] of a linear merge, in fp32, whose product B A is what `add` adds; None where no adapter
        acts on the weight.
        """
        found = [adapter for adapter in self.adapters if name in adapter.scales]
        if not found:
            return None
        pairs = [adapter.factors(name) for adapter in found]
        scales = [adapter.scales[name] * adapter.weight for adapter in found]
        return torch.cat([a for a, _ in pairs]), torch.cat([b * scale for (_, b), scale in zip(pairs, scales)], 1)

    def _sparse(self, name: str, position: int, delta: Tensor) -> Tensor:
        """A delta with the part of its values that the method keeps."""
        density = self.merge.density
        if density == 1:
            return delta
        if self.merge.method == "ties":
            return trim(delta, density)
        return drop(delta, density, seed_of(self.merge.seed, position, name))


class _Opened:
    """An adapter, opened and checked.

    Attributes:
        scales: of B A, by Hugging Face's name of the projection's weight.
    """

    def __init__(self, arch: Architecture, adapter: WeightedAdapter):
        settings = read_adapter_settings(adapter.directory).of_projections()
        model = build_model(arch, torch.float32)
        add_adapters(model, settings)
        parts = {
            part.tensor_name(layer, "huggingface"): (layer, part)
            for layer in range(arch.layers)
            for parts in projections(arch).values()
            for part in parts
        }
        chosen = {name: settings.part(layer, part.name) for name, (layer, part) in parts.items()}
        self.directory, self.weight = adapter
        self.scales = {name: settings.scale for name, settings in chosen.items() if settings}
        self._files = open_adapter(adapter.directory, adapter_parameters(model))
        self._names = {
            name: [part.peft_name(layer, matrix) for matrix in "AB"] for name, (layer, part) in parts.items()
        }

    def factors(self, name: str) -> list[Tensor]:
        """A and B of a projection, in fp32.

        Raises:
            UserError: they contain NaN or infinite values.
        """
        matrices = {matrix: self._files.whole(matrix).float() for matrix in self._names[name]}
        for matrix, value in matrices.items():
            check_finite(value, self.directory, matrix)
        return list(matrices.values())

    def product(self, name: str) -> Tensor:
        """B A."""
        a, b = self.factors(name)
        return b @ a


# ------------------------------------------------------------------------------- the functions, as PEFT's merge_utils


def trim(delta: Tensor, density: float) -> Tensor:
    """A delta without all but the largest `density` of its values, in place; of equal ones at the border, all."""
    kept = int(density * delta.numel())
    if kept == 0:
        return delta.zero_()
    # topk sorts what it keeps, which takes five times as long
    magnitudes = delta.abs().flatten().numpy()
    magnitudes.partition(delta.numel() - kept)
    return delta.masked_fill_(delta.abs() < float(magnitudes[delta.numel() - kept]), 0)


def drop(delta: Tensor, density: float, seed: int) -> Tensor:
    """A delta of which a random `density` of the values is kept, divided by `density`; in place."""
    drawn = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed))
    return delta.masked_fill_(drawn >= density, 0).div_(density)


def sum_of(deltas: list[Tensor], weights: list[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        total.add_(delta, alpha=weight)
    return total


def elect(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """The mean, at each place, of the weighted values whose sign is that of the sum of the values as they are."""
    is_negative = sum_of(deltas, [1.0] * len(deltas)) < 0
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        agrees = torch.where(is_negative, delta < 0, delta > 0)
        total.add_(delta.where(agrees, 0), alpha=weight)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))
