"""Low-rank adapters on a model's projections: trained ones, and the choice among several by row (row_lora.py).

Sources: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732). Axes: T tokens, K in, N out.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from minorca.model.layout import TARGETS, Matrix, ProjectionSpec, Target, matrix_peft_names
from minorca.model.vocabulary import TrainedRows, VocabularyLoRA, VocabularyMatrix
from minorca_kernels import (
    Adapter,
    DenseWeight,
    Factors,
    FrozenWeight,
    PaddedWeight,
    fill_rows,
    is_sharded,
    lora_linear,
    norm_lora_linear,
    padding_pays,
    write_update,
)
from minorca_kernels.operator import uses_triton

# the network imports this file
if TYPE_CHECKING:
    from minorca.model.network import Mistral, RMSNorm


class PartSettings(NamedTuple):
    """What one projection's adapter is made of and multiplied by."""

    rank: int
    scale: float


@dataclass(frozen=True)
class LoRASettings:
    """What defines an adapter besides its numbers. `dropout` is for training only.

    Attributes:
        parts: by layer and projection, where an adapter that was read differs from `rank` and `scale`; matrices of the
            vocabulary have layer 0.
        partial: whether only `parts` have adapters, instead of the targets in every layer.
        modules_to_save: the matrices of the vocabulary that are trained whole.
        token_ids: whose rows are trained in those that are not.
    """

    rank: int
    alpha: float
    targets: tuple[Target | Matrix, ...] = TARGETS
    dropout: float = 0.0
    rslora: bool = False
    parts: Mapping[tuple[int, str], PartSettings] = field(default_factory=dict)
    partial: bool = False
    modules_to_save: tuple[Matrix, ...] = ()
    token_ids: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        return lora_scale(self.rank, self.alpha, self.rslora)

    def of_projections(self) -> LoRASettings:
        """Without what concerns the vocabulary."""
        targets = tuple(target for target in self.targets if target in TARGETS)
        return replace(self, targets=targets, modules_to_save=(), token_ids=())

    def part(self, layer: int, projection: str) -> PartSettings | None:
        """Of one projection; None where it has no adapter."""
        if projection not in self.targets:
            return None
        return self.parts.get((layer, projection), None if self.partial else PartSettings(self.rank, self.scale))


def lora_scale(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


# -------------------------------------------------------------------------------------------------- trained adapters


class LoRA(nn.Module):
    """The trained adapters of a projection: A [r, K] and B [out, r], PEFT's shapes, for each of the parts that has
    one.
    """

    def __init__(
        self,
        parts: dict[ProjectionSpec, PartSettings],
        dropout: float,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()

        def empty(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))

        self.parts = list(parts)
        self.scales = {part.name: scale for part, (_, scale) in parts.items()}
        self.scale = max(self.scales.values(), key=abs) or 1.0
        self.dropout = dropout
        self.a = nn.ParameterDict({part.name: empty(rank, part.in_features) for part, (rank, _) in parts.items()})
        self.b = nn.ParameterDict({part.name: empty(part.out_features, rank) for part, (rank, _) in parts.items()})
        # of the next forward's dropout
        self.seeds = {part.name: 0 for part in parts}
        # what keeps the matrices rounded; None: every call rounds them
        self.rounded: RoundedAdapters | None = None

    def forward(self, x: Tensor, base: FrozenWeight, gated_input: bool) -> Tensor:
        """x [T, K], or [T, 2K] with gated input -> [T, N]."""
        return lora_linear(x, base, *self._update(), of_swiglu=gated_input, factors=self._factors())

    def of_norm(self, norm: RMSNorm, x: Tensor, update: Tensor | None, base: FrozenWeight) -> tuple[Tensor, Tensor]:
        """x and update [T, K] -> their sum, and of its norm [T, N]."""
        return norm_lora_linear(x, update, norm.weight, norm.eps, base, *self._update(), factors=self._factors())

    def _update(self) -> tuple[list[Adapter], float, float]:
        """The adapters, their scale and dropout."""
        adapters = [
            Adapter(part.start, part.stop, self.a[part.name], self._scaled_b(part.name), self.seeds[part.name])
            for part in self.parts
        ]
        return adapters, self.scale, self.dropout if self.training else 0.0

    def _factors(self) -> Factors | None:
        # a compiler cannot trace what keeps them
        return None if self.rounded is None or torch.compiler.is_compiling() else self.rounded.of(self)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """A of all parts, then B of all."""
        # a ParameterDict has an order of its own
        return [matrices[part.name] for matrices in (self.a, self.b) for part in self.parts]

    @property
    def ranks(self) -> list[int]:
        return [len(self.a[part.name]) for part in self.parts]

    def _scaled_b(self, name: str) -> Tensor:
        """B for an operator that multiplies all parts by `scale`, where this one may have another."""
        b = self.b[name]
        return b if self.scales[name] == self.scale else b.float() * (self.scales[name] / self.scale)


def add_adapters(model: Mistral, settings: LoRASettings, dtype: torch.dtype = torch.float32) -> None:
    """Adds adapters, their values not yet set, to the targeted projections of every layer, and to the matrices of the
    vocabulary what is trained of them.
    """
    device = model.embedding.weight.device
    for layer, projection in model.projections():
        parts = {part: settings.part(layer, part.name) for part in projection.parts}
        if adapted := {part: chosen for part, chosen in parts.items() if chosen}:
            projection.lora = LoRA(adapted, settings.dropout, dtype, device)
    for matrix, weight in vocabulary(model):
        if matrix in settings.modules_to_save:
            weight.train_whole()
        elif part := settings.part(0, matrix):
            ids, hidden = weight.out_features, weight.in_features
            # PEFT drops nothing of embedded tokens
            sizes, dropout = ((ids, hidden), 0.0) if matrix == "embed" else ((hidden, ids), settings.dropout)
            weight.lora = VocabularyLoRA(sizes, part.rank, part.scale, dropout, dtype, device)
        elif settings.token_ids:
            weight.rows = TrainedRows(settings.token_ids[0], len(settings.token_ids), weight.in_features, device)


def vocabulary(model: Mistral) -> Iterator[tuple[Matrix, VocabularyMatrix]]:
    """The embedding and, where it is another matrix that can be trained, the head."""
    yield "embed", model.embedding
    if isinstance(model.head, VocabularyMatrix):
        yield "head", model.head


def adapters(model: Mistral) -> Iterator[tuple[int, LoRA]]:
    """The layer and the adapters of every projection that has some, in a fixed order."""
    for layer, projection in model.projections():
        if projection.lora is not None:
            yield layer, projection.lora


@functools.cache
def _count_optimizer_steps() -> None:
    """Has autograd count the changes that optimizers make: torch's fused kernels leave that out."""

    def count(optimizer: torch.optim.Optimizer, *_) -> None:
        increment_version(parameter for group in optimizer.param_groups for parameter in group["params"])

    register_optimizer_step_post_hook(count)


class RoundedAdapters:
    """Adapters of a model in the dtype of its products, kept from call to call: forward and backward of all
    micro-batches of a step read the same copies.

    Autograd counts the changes of every tensor, be they an optimizer's, a file's or a person's. The first adapters that
    find theirs changed have all of the model's rounded again, so that a step takes few launches.
    """

    def __init__(self, bases: dict[LoRA, FrozenWeight], dtype: torch.dtype):
        self.bases = bases
        self.dtype = dtype
        self.factors: dict[LoRA, Factors] = {}
        self.versions: dict[LoRA, list[int]] = {}

    def of(self, lora: LoRA) -> Factors:
        if self.versions.get(lora) != [matrix._version for matrix in lora.matrices]:
            self._round()
        return self.factors[lora]

    # a backward pass may come to read what generation has made
    @torch.inference_mode(False)
    @torch.no_grad()
    def _round(self) -> None:
        self.factors = self.factors or {lora: self._empty(lora, base) for lora, base in self.bases.items()}
        copies = [copy for lora, (a, b, _) in self.factors.items() for copy in (*a.split(lora.ranks), *b)]
        matrices: list[Tensor] = [matrix for lora in self.factors for matrix in lora.matrices]
        torch._foreach_copy_(copies, matrices)  # pyright: ignore[reportPrivateImportUsage]
        for lora, factors in self.factors.items():
            base = self.bases[lora]
            if isinstance(base, PaddedWeight):
                write_update(factors.b, [part.start for part in lora.parts], lora.scale, base.scratch)
            self.versions[lora] = [matrix._version for matrix in lora.matrices]

    def _empty(self, lora: LoRA, base: FrozenWeight) -> Factors:
        copies = [torch.empty_like(matrix, dtype=self.dtype) for matrix in lora.matrices]
        parts = len(lora.parts)
        if isinstance(base, PaddedWeight):
            base.scratch.zero_()
        return Factors(torch.cat(copies[:parts]), copies[parts:], isinstance(base, PaddedWeight))


def pad_for_adapters(model: Mistral, device: torch.device | str | None = None) -> None:
    """Where Triton runs, and weights and adapters are whole on this rank: keeps the adapters rounded, and gives weights
    scratch columns for them where that is faster.

    Args:
        device: where the model will be; best before it is there, so that its weights are loaded beside their scratch
            columns.
    """
    weight = model.embedding.weight
    if is_sharded(weight) or not uses_triton(torch.empty(0, device=device or weight.device)):
        return
    bases = {}
    for _, projection in model.projections():
        base, lora = projection.base, projection.lora
        if lora is None:
            continue
        if isinstance(base, DenseWeight):
            ranks, in_place = sum(lora.ranks), projection.gated_input or projection.normed_input
            if padding_pays(base.out_features, base.in_features, ranks, in_place):
                projection.base = PaddedWeight(base.weight.detach(), ranks)
        # parts of different scales are scaled anew in every call
        if len(set(lora.scales.values())) == 1:
            bases[lora] = projection.base
    _count_optimizer_steps()
    rounded = RoundedAdapters(bases, model.dtype)
    for lora in bases:
        lora.rounded = rounded


def adapter_parameters(model: Mistral) -> dict[str, nn.Parameter]:
    """PEFT's tensor name -> parameter, in a fixed order."""
    parameters = {
        part.peft_name(layer, matrix): values[part.name]
        for layer, lora in adapters(model)
        for part in lora.parts
        for matrix, values in (("A", lora.a), ("B", lora.b))
    }
    for matrix, weight in vocabulary(model):
        names = matrix_peft_names(matrix)
        if weight.dtype is not None:
            parameters[names["whole"]] = weight.weight
        if weight.rows is not None:
            parameters[names["rows"]] = weight.rows.values_NH
        if weight.lora is not None:
            parameters |= {names["A"]: weight.lora.a, names["B"]: weight.lora.b}
    return parameters


def seed_of(*parts) -> int:
    """64 bits that depend on every part, the same on every machine and rank."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def init_adapters(model: Mistral, seed: int) -> None:
    """PEFT's initial values: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero; of the embedding, A zero and
    B standard normal. Rows and matrices of the vocabulary come with the weights.

    They are a function of seed and name alone, so any sharding of one model starts from the same numbers.
    """
    for name, parameter in adapter_parameters(model).items():
        if "lora_" not in name:
            continue
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.zeros_(parameter)
            continue
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        bound = parameter.shape[1] ** -0.5
        whole = torch.empty(parameter.shape)
        if "lora_embedding_B" in name:
            whole.normal_(generator=generator)
        else:
            whole.uniform_(-bound, bound, generator=generator)
        fill_rows(parameter, lambda start, stop, whole=whole: whole[start:stop])


def seed_dropout(model: Mistral, *parts: int) -> None:
    """Fixes the next forward's dropout masks as a function of parts (seed, step, micro-batch), layer and projection."""
    for layer, lora in adapters(model):
        if lora.dropout:
            lora.seeds = {part.name: seed_of(*parts, layer, part.name) for part in lora.parts}
    for matrix, weight in vocabulary(model):
        if weight.lora is not None and weight.lora.dropout:
            weight.lora.seed = seed_of(*parts, matrix)


# ------------------------------------------------------------------------------------------ adapters chosen by row

NO_ADAPTER = -1  # the index of rows that use none


class AdapterChoice:
    """Several adapters' names, and which of them the rows of the next forward use.

    Attributes:
        names: by index, those of adapters that were removed too, so that no other adapter ever has their name or index.
        removed: the names of these.
    """

    def __init__(self, names: list[str], device: torch.device):
        self.names = names
        self.removed: set[str] = set()
        # whether any row uses one
        self.in_use = False
        # what rows multiply the columns of a product by, which is the same in many layers
        self.factors: dict[tuple, Tensor] = {}
        self.index_T1 = torch.full((1, 1), NO_ADAPTER, device=device)

    def index(self, name: str | None) -> int:
        return NO_ADAPTER if name is None else self.names.index(name)

    def choose(self, index_T: Tensor, in_use: bool) -> None:
        """index [T], or [1] for all rows: what `index` gave. in_use: whether any row uses an adapter."""
        self.index_T1 = index_T[:, None]
        self.in_use = in_use
        self.factors.clear()
