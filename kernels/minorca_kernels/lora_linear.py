"""A frozen projection and its low-rank adapters as one differentiable operation. Source: Hu et al. 2021 (arXiv:2106.09685).

One projection may be several of the model's stacked by rows (q, k and v), each with an adapter of its own or none; and it may
be one of SwiGLU's product, which is then made again in backward instead of being kept.

Four ways to add the update are here (`STRATEGIES`), two of which touch the output once; `python -m benchmarks.kernels` compares them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


# ------------------------------------------------------------------------------- ways to add a low-rank product
# x [T, K], w [N, K], s [T, R], b: a [N_i, R_i] for the rows from each of starts, side by side in s -> x w^T, scale * s b^T added


def _beside(columns: Tensor, b: list[Tensor]) -> tuple[Tensor, ...]:
    """Each adapter's own columns of a tensor [M, R]."""
    return columns.split([b_i.shape[1] for b_i in b], dim=1)


def _added(x: Tensor, w: Tensor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """The output is read and written once more: 13 % of the time of a product 4096 deep on an H100, by its bytes."""
    y = F.linear(x, w)
    for start, s_i, b_i in zip(starts, _beside(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), alpha=scale)
    return y


def _accumulated(x: Tensor, w: Tensor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """The update is written first, and the large product reads it where it is about to write: while others still multiply."""
    y = x.new_empty(len(x), len(w)) if sum(map(len, b)) == len(w) else x.new_zeros(len(x), len(w))
    for start, s_i, b_i in zip(starts, _beside(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), beta=0, alpha=scale)
    return y.addmm_(x, w.t())


def _augmented(x: Tensor, w: Tensor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """[x | s] [w | scale b]^T, one product a little deeper, where x and w have room for s and b after each row."""
    k, depth = w.shape[1], w.shape[1] + s.shape[1]
    # .data: no element of w itself changes, so what autograd has kept of w stays valid
    x, w = x.as_strided((len(x), depth), x.stride()), w.data.as_strided((len(w), depth), w.stride())
    x[:, k:] = s
    _block_diagonal(b, starts, scale, w[:, k:])
    return F.linear(x, w)


def _fused(x: Tensor, w: Tensor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Triton's product, whose last step in depth is the update."""
    return low_rank_matmul(x, w, s, _block_diagonal(b, starts, scale, w.new_empty(len(w), s.shape[1])))


def _block_diagonal(b: list[Tensor], starts: list[int], scale: float, out: Tensor) -> Tensor:
    """Writes every scale * B into its own rows and columns of out [N, R], and zeros elsewhere."""
    out.zero_()
    for start, b_i, column in zip(starts, b, _beside(out, b)):
        torch.mul(b_i, scale, out=column[start : start + len(b_i)])
    return out


STRATEGIES = {"added": _added, "accumulated": _accumulated, "augmented": _augmented, "fused": _fused}
FEW = 256  # rows below which launches cost more than traffic: one token a sequence, while generating


def padding_pays(w_NK: Tensor, of_swiglu: bool) -> bool:
    """Whether room is worth having: x must be copied next to its products, unless it is a SwiGLU, written there in the first
    place; and that must move fewer bytes than writing and reading an update of the output's size."""
    return of_swiglu or len(w_NK) > w_NK.shape[1]


def pad_rows(w_NK: Tensor, columns: int) -> Tensor:
    """An empty [N, K] like w with at least so many scratch columns after each row, rows a multiple of 64 elements apart."""
    (n, k), apart = w_NK.shape, -(w_NK.shape[1] + columns) % 64
    return w_NK.new_empty(n, k + columns + apart)[:, :k]


def _has_padding(w: Tensor, columns: int) -> bool:
    """A copy made on the way here, by a compiler or a check, may have lost it."""
    (n, k), apart = w.shape, w.stride(0)
    end = w.storage_offset() + (n - 1) * apart + k + columns
    return w.stride(1) == 1 and apart >= k + columns and end * w.element_size() <= w.untyped_storage().nbytes()


# -------------------------------------------------------------------------------------------- forward and backward


def _inner(x: Tensor, a: list[Tensor], dropout: float, seeds: list[int]) -> Tensor:
    """drop(x) A^T of every adapter, side by side: [T, R]."""
    if not dropout:
        return F.linear(x, torch.cat(a))
    return torch.cat([F.linear(_dropped(x, dropout, seed), a_i) for a_i, seed in zip(a, seeds)], dim=1)


def _forward(
    x: Tensor,
    w: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    starts: list[int],
    scale: float,
    dropout: float,
    seeds: list[int],
    of_swiglu: bool,
    way: str,
) -> tuple[Tensor, Tensor]:
    if way == "augmented" and not _has_padding(w, sum(map(len, a))):
        way = "accumulated"
    if way == "augmented":
        inputs, x = x, x.new_empty(len(x), w.stride(0))[:, : w.shape[1]]
        swiglu_into(inputs, x) if of_swiglu else x.copy_(inputs)
    elif of_swiglu:
        x = swiglu(x)
    s = _inner(x, a, dropout, seeds)
    return STRATEGIES[way](x, w, s, b, starts, scale), s


def _backward(
    gradients: Callable,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    starts: list[int],
    scale: float,
    dropout: float,
    seeds: list[int],
    of_swiglu: bool,
    way: str,
    x_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    of_b = [gradients(dy[:, start : start + len(b_i)], b_i, s_i) for start, b_i, s_i in zip(starts, b, _beside(s, b))]
    ds = torch.cat([(ds_i * scale).to(dy.dtype) for ds_i, _ in of_b], dim=1)
    db = [(db_i * scale).to(b_i.dtype) for (_, db_i), b_i in zip(of_b, b)]

    dx = x.new_empty(0)
    if x_gradient and dropout:
        dx = dy @ w
        for ds_i, a_i, seed in zip(_beside(ds, b), a, seeds):
            dx += _dropped(ds_i @ a_i, dropout, seed)
    elif x_gradient:  # the same sum of two products as forward's; a transposed w has no room
        dx = STRATEGIES["accumulated" if way == "augmented" else way](dy, w.t(), ds, [torch.cat(a).t()], [0], 1.0)
    if of_swiglu and x_gradient:
        dx, x = swiglu_backward(dx, x, True)
    elif of_swiglu:
        x = swiglu(x)

    if not dropout:
        return dx, ds.t() @ x, db
    da = [ds_i.t() @ _dropped(x, dropout, seed) for ds_i, seed in zip(_beside(ds, b), seeds)]
    return dx, torch.cat(da), db


def _gradients_torch(dy: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return dy @ b, dy.t() @ s


_lora_linear = operator(
    "lora_linear(Tensor x, Tensor w, Tensor[] a, Tensor[] b, int[] starts, float scale, float dropout, int[] seeds, bool of_swiglu, str way)"
    " -> (Tensor, Tensor)",
    cuda=_forward,
    cpu=_forward,
    fake=lambda x, w, a, *_: (
        x.new_empty(x.shape[0], w.shape[0]),
        x.new_empty(x.shape[0], sum(a_i.shape[0] for a_i in a)),
    ),
)
_lora_linear_backward = operator(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor w, Tensor[] a, Tensor[] b, Tensor s, int[] starts, float scale, float dropout,"
    " int[] seeds, bool of_swiglu, str way, bool x_gradient) -> (Tensor, Tensor, Tensor[])",
    cuda=functools.partial(_backward, low_rank_gradients),
    cpu=functools.partial(_backward, _gradients_torch),
    fake=lambda dy, x, w, a, b, s, *rest: (
        x.new_empty(x.shape if rest[-1] else 0),
        x.new_empty(s.shape[1], w.shape[1]),
        [b_i.new_empty(b_i.shape) for b_i in b],
    ),
)


class _LoRALinear(torch.autograd.Function):
    """Keeps x once for the whole group and its [T, R] products; no gradient of the frozen weight exists."""

    @staticmethod
    def forward(ctx, x, w, settings, *ab):
        y, s = _lora_linear(x, w, ab[0::2], ab[1::2], *settings)
        ctx.save_for_backward(x, w, s, *ab)
        ctx.settings = settings
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, s, *ab = ctx.saved_tensors
        a = ab[0::2]
        dx, da, db = _lora_linear_backward(dy, x, w, a, ab[1::2], s, *ctx.settings, ctx.needs_input_grad[0])
        gradients = [g for pair in zip(da.split([len(a_i) for a_i in a]), db) for g in pair]
        return dx if ctx.needs_input_grad[0] else None, None, None, *gradients


def lora_linear(
    x_TK: Tensor,
    w_NK: Tensor,
    adapters: list[Adapter],
    scale: float,
    dropout: float = 0.0,
    of_swiglu: bool = False,
    way: str | None = None,
) -> Tensor:
    """`lora_linear_definition` for a frozen W and one adapter or more; A and B have x's dtype. Dropout 0 costs nothing.

    Args:
        way: one of `STRATEGIES`; by default what suits the device. "augmented" takes what lies after each row of W for its own: W must
            be made by `pad_rows`. It is for many rows: fewer than FEW go the default way.
    """
    if way is None or (way == "augmented" and len(x_TK) < FEW):
        way = "accumulated" if uses_triton(x_TK) else "added"
    starts, seeds = [adapter.start for adapter in adapters], [adapter.seed for adapter in adapters]
    ab = [t for adapter in adapters for t in (adapter.a_RK, adapter.b_NR)]
    return _LoRALinear.apply(x_TK, w_NK, (starts, scale, dropout, seeds, of_swiglu, way), *ab)
