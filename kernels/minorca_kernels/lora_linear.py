"""A frozen projection and its low-rank adapters as one differentiable operation. Source: Hu et al. 2021 (arXiv:2106.09685).

A projection may stack several of the model's by rows (q, k and v), each with an adapter of its own or none. Its input may
be the SwiGLU of a buffer, which is then recomputed in backward instead of being stored.

There are four strategies to add the update (`STRATEGIES`), two of which touch the output once; `python -m
benchmarks.kernels` compares them. Axes: T tokens, N out, K in, R ranks of all adapters side by side.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca_kernels.frozen_weight import FrozenWeight
from minorca_kernels.low_rank_gradients import low_rank_gradients
from minorca_kernels.low_rank_matmul import low_rank_matmul
from minorca_kernels.operator import operator, uses_triton
from minorca_kernels.swiglu import swiglu, swiglu_backward, swiglu_definition, swiglu_into


class Adapter(NamedTuple):
    """The update scale * B A to rows [start, stop) of a projection's weight."""

    start: int
    stop: int
    a_RK: Tensor
    b_NR: Tensor
    seed: int = 0  # of this adapter's dropout in this call


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted dropout of x by a mask that is a function of (seed, shape, device), so that backward can make it again."""
    if not dropout:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, device=x.device, generator=generator) >= dropout
    return x * keep / (1 - dropout)


def lora_linear_definition(
    x_TK: Tensor, w_NK: Tensor, adapters: list[Adapter], scale: float, dropout: float = 0.0, of_swiglu: bool = False
) -> Tensor:
    """x [T, K], W [N, K] -> x W^T [T, N], plus scale * drop(x) A^T B^T in each adapter's rows.

    of_swiglu: x is a buffer [T, 2K] of gate and up, and its SwiGLU takes the place of x.
    """
    x_TK = swiglu_definition(x_TK) if of_swiglu else x_TK
    y = F.linear(x_TK, w_NK)
    updates = [
        F.pad(F.linear(F.linear(_dropped(x_TK, dropout, seed), a), b) * scale, (start, w_NK.shape[0] - stop))
        for start, stop, a, b, seed in adapters
    ]
    return y + sum(updates) if updates else y


# ------------------------------------------------------------------------------------------------------- strategies
# x [T, K], W [N, K], s [T, R], b: an adapter's B [N_i, R_i] for the rows from each of starts, their columns side by side
# in s -> x W^T + scale * s b^T


class _Factor(NamedTuple):
    """W, or its transpose in backward, as the second factor of a product."""

    storage: type[FrozenWeight]
    tensors: list[Tensor]
    transposed: bool
    rows: int

    def product(self, x: Tensor) -> Tensor:
        product = self.storage.transposed_product if self.transposed else self.storage.product
        return product(x, self.tensors)

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the product to y in place."""
        add = self.storage.add_transposed_product if self.transposed else self.storage.add_product
        return add(y, x, self.tensors)

    @property
    def matrix(self) -> Tensor:
        """The factor of a kind that is stored as a matrix."""
        return self.tensors[0].t() if self.transposed else self.tensors[0]


def _whole_rows(t: Tensor) -> Tensor:
    """A slice of columns as an operand of a matrix product, whose rows must not be read past their end.

    On CPUs with AMX, oneDNN reads bf16 rows in blocks of 32 elements and multiplies what lies behind a shorter row by
    zero, which gives NaN where that is NaN or infinite (oneDNN#5717).
    """
    return t.contiguous() if t.device.type == "cpu" and t.shape[-1] % 32 else t


def _own_columns(columns: Tensor, b: list[Tensor]) -> list[Tensor]:
    """Each adapter's columns of a tensor [M, R]."""
    return [_whole_rows(part) for part in columns.split([b_i.shape[1] for b_i in b], dim=1)]


def _added(x: Tensor, weight: _Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Reads and writes the output once more: 13% of the time of a product 4096 deep on an H100, by its bytes."""
    y = weight.product(x)
    for start, s_i, b_i in zip(starts, _own_columns(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), alpha=scale)
    return y


def _accumulated(x: Tensor, weight: _Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Writes the update first, and lets the large product add to it where it is about to write."""
    covered = sum(map(len, b)) == weight.rows
    y = x.new_empty(len(x), weight.rows) if covered else x.new_zeros(len(x), weight.rows)
    for start, s_i, b_i in zip(starts, _own_columns(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), beta=0, alpha=scale)
    return weight.add_product(y, x)


def _augmented(x: Tensor, weight: _Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """[x | s] [W | scale b]^T, one product a little deeper: x and W have scratch columns after each row.

    The product takes rows with all of their scratch columns, the unused ones zero: it reads nothing that is not written.
    """
    # .data: no element of W itself changes, so what autograd has saved of it stays valid
    w = weight.matrix.data
    k, depth = w.shape[1], w.stride(0)
    x, w = (t.as_strided((len(t), depth), (depth, 1)) for t in (x, w))
    x[:, k : k + s.shape[1]] = s
    _block_diagonal(b, starts, scale, w[:, k:])
    return F.linear(x, w)


def _fused(x: Tensor, weight: _Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Triton's product, whose last step in depth is the update."""
    update = weight.matrix.new_empty(weight.rows, s.shape[1])
    return low_rank_matmul(x, weight.matrix, s, _block_diagonal(b, starts, scale, update))


def _block_diagonal(b: list[Tensor], starts: list[int], scale: float, out: Tensor) -> Tensor:
    """Writes every scale * B into its own rows and columns of out [N, R or more], and zeros elsewhere."""
    out.zero_()
    column = 0
    for start, b_i in zip(starts, b):
        torch.mul(b_i, scale, out=out[start : start + len(b_i), column : column + b_i.shape[1]])
        column += b_i.shape[1]
    return out


STRATEGIES = {"added": _added, "accumulated": _accumulated, "augmented": _augmented, "fused": _fused}
# Below so many tokens launches cost more than memory traffic: generation takes one token a sequence.
MIN_TOKENS_AUGMENTED = 256


def padding_pays(out_features: int, in_features: int, of_swiglu: bool) -> bool:
    """Whether the augmented strategy is faster on a GPU.

    x must be copied next to its products, unless it is a SwiGLU, which is written there in the first place; the copy must
    move fewer bytes than writing and reading an update of the output's size.
    """
    return of_swiglu or out_features > in_features


def _has_padding(w: Tensor, columns: int) -> bool:
    """Whether W still has its scratch columns: a copy made on the way here, by a compiler or a check, has none."""
    n, stride = len(w), w.stride(0)
    end = w.storage_offset() + n * stride
    fits = stride >= w.shape[1] + columns and end * w.element_size() <= w.untyped_storage().nbytes()
    return w.stride(1) == 1 and fits


# -------------------------------------------------------------------------------------------- forward and backward


def _padded_input(x: Tensor, w: Tensor, of_swiglu: bool) -> Tensor:
    """x, or its SwiGLU, as a view of rows that have as many scratch columns as those of W; they are zero."""
    k = w.shape[1]
    rows = x.new_empty(len(x), w.stride(0))
    rows[:, k:] = 0
    if of_swiglu:
        swiglu_into(x, rows[:, :k])
    else:
        rows[:, :k] = x
    return rows[:, :k]


def _inner(x: Tensor, a: list[Tensor], dropout: float, seeds: list[int]) -> Tensor:
    """drop(x) A^T of every adapter, side by side: [T, R]."""
    if not dropout:
        return F.linear(x, torch.cat(a))
    return torch.cat([F.linear(_dropped(x, dropout, seed), a_i) for a_i, seed in zip(a, seeds)], dim=1)


def _forward(
    x: Tensor,
    w: list[Tensor],
    kind: str,
    out_features: int,
    a: list[Tensor],
    b: list[Tensor],
    starts: list[int],
    scale: float,
    dropout: float,
    seeds: list[int],
    of_swiglu: bool,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    weight = _Factor(FrozenWeight.kinds[kind], w, False, out_features)
    if strategy == "augmented" and not _has_padding(w[0], sum(map(len, a))):
        strategy = "accumulated"
    if strategy == "augmented":
        x = _padded_input(x, w[0], of_swiglu)
    elif of_swiglu:
        x = swiglu(x)
    s = _inner(x, a, dropout, seeds)
    return STRATEGIES[strategy](x, weight, s, b, starts, scale), s


def _backward(
    gradients: Callable,
    dy: Tensor,
    x: Tensor,
    w: list[Tensor],
    kind: str,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    starts: list[int],
    scale: float,
    dropout: float,
    seeds: list[int],
    of_swiglu: bool,
    strategy: str,
    x_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dy_rows = [_whole_rows(dy[:, start : start + len(b_i)]) for start, b_i in zip(starts, b)]
    of_b = [gradients(dy_i, b_i, s_i) for dy_i, b_i, s_i in zip(dy_rows, b, _own_columns(s, b))]
    ds = torch.cat([(ds_i * scale).to(dy.dtype) for ds_i, _ in of_b], dim=1)
    db = [(db_i * scale).to(b_i.dtype) for (_, db_i), b_i in zip(of_b, b)]

    weight = _Factor(FrozenWeight.kinds[kind], w, True, a[0].shape[1])
    dx = x.new_empty(0)
    if x_gradient and dropout:
        dx = weight.product(dy)
        for ds_i, a_i, seed in zip(_own_columns(ds, b), a, seeds):
            dx += _dropped(ds_i @ a_i, dropout, seed)
    elif x_gradient:
        # the same sum of two products as in forward; a transposed W has no scratch columns
        strategy = "accumulated" if strategy == "augmented" else strategy
        dx = STRATEGIES[strategy](dy, weight, ds, [torch.cat(a).t()], [0], 1.0)
    if of_swiglu and x_gradient:
        dx, x = swiglu_backward(dx, x, True)
    elif of_swiglu:
        x = swiglu(x)

    if not dropout:
        return dx, ds.t() @ x, db
    da = [ds_i.t() @ _dropped(x, dropout, seed) for ds_i, seed in zip(_own_columns(ds, b), seeds)]
    return dx, torch.cat(da), db


def _gradients_torch(dy: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return dy @ b, dy.t() @ s


_lora_linear = operator(
    "lora_linear(Tensor x, Tensor[] w, str kind, int out_features, Tensor[] a, Tensor[] b, int[] starts, float scale,"
    " float dropout, int[] seeds, bool of_swiglu, str strategy) -> (Tensor, Tensor)",
    cuda=_forward,
    cpu=_forward,
    fake=lambda x, w, kind, out_features, a, *_: (
        x.new_empty(x.shape[0], out_features),
        x.new_empty(x.shape[0], sum(a_i.shape[0] for a_i in a)),
    ),
)
_lora_linear_backward = operator(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor[] w, str kind, Tensor[] a, Tensor[] b, Tensor s, int[] starts,"
    " float scale, float dropout, int[] seeds, bool of_swiglu, str strategy, bool x_gradient)"
    " -> (Tensor, Tensor, Tensor[])",
    cuda=functools.partial(_backward, low_rank_gradients),
    cpu=functools.partial(_backward, _gradients_torch),
    fake=lambda dy, x, w, kind, a, b, s, *rest: (
        x.new_empty(x.shape if rest[-1] else 0),
        x.new_empty(s.shape[1], a[0].shape[1]),
        [b_i.new_empty(b_i.shape) for b_i in b],
    ),
)


class _LoRALinear(torch.autograd.Function):
    """Saves x once for the whole group and its [T, R] products; a frozen weight has no gradient."""

    @staticmethod
    def forward(ctx, x, kind, out_features, settings, tensors, *w_ab):
        w, ab = w_ab[:tensors], w_ab[tensors:]
        y, s = _lora_linear(x, w, kind, out_features, ab[0::2], ab[1::2], *settings)
        ctx.save_for_backward(x, s, *w_ab)
        ctx.kind, ctx.settings, ctx.tensors = kind, settings, tensors
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, s, *w_ab = ctx.saved_tensors
        w, ab = w_ab[: ctx.tensors], w_ab[ctx.tensors :]
        a, b = ab[0::2], ab[1::2]
        needs_dx = ctx.needs_input_grad[0]
        dx, da, db = _lora_linear_backward(dys[0], x, w, ctx.kind, a, b, s, *ctx.settings, needs_dx)
        gradients = [g for pair in zip(da.split([len(a_i) for a_i in a]), db) for g in pair]
        return dx if needs_dx else None, *(None for _ in range(4 + len(w))), *gradients


def lora_linear(
    x_TK: Tensor,
    weight: FrozenWeight,
    adapters: list[Adapter],
    scale: float,
    dropout: float = 0.0,
    of_swiglu: bool = False,
    strategy: str | None = None,
) -> Tensor:
    """`lora_linear_definition` for a frozen weight of any kind and one adapter or more; A and B have x's dtype.

    Args:
        strategy: one of `STRATEGIES`, for benchmarks and tests; by default what suits the device, the weight and the number
            of tokens. "augmented" needs a `PaddedWeight`, "fused" a dense one.
    """
    if strategy is None:
        strategy = "accumulated" if uses_triton(x_TK) else "added"
        if weight.kind == "padded" and len(x_TK) >= MIN_TOKENS_AUGMENTED:
            strategy = "augmented"
    settings = (
        [adapter.start for adapter in adapters],
        scale,
        dropout,
        [adapter.seed for adapter in adapters],
        of_swiglu,
        strategy,
    )
    tensors = weight.tensors()
    ab = [t for adapter in adapters for t in (adapter.a_RK, adapter.b_NR)]
    return _LoRALinear.apply(x_TK, weight.kind, weight.out_features, settings, len(tensors), *tensors, *ab)
