"""A frozen projection and its low-rank adapters as one differentiable operation. Source: Hu et al. 2021 (arXiv:2106.09685).

One projection may be several of the model's stacked by rows (q, k and v), each with an adapter of its own or none.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def lora_linear_definition(x_TK: Tensor, w_NK: Tensor, adapters: list[Adapter], scale: float, dropout: float = 0.0) -> Tensor:
    """x [T, K], W [N, K] -> x W^T [T, N], plus scale * drop(x) A^T B^T in each adapter's rows."""
    y = F.linear(x_TK, w_NK)
    updates = [
        F.pad(F.linear(F.linear(_dropped(x_TK, dropout, seed), a), b) * scale, (start, w_NK.shape[0] - stop))
        for start, stop, a, b, seed in adapters
    ]
    return y + sum(updates) if updates else y


class _LoRALinear(torch.autograd.Function):
    """Keeps x once for the whole group and its [T, R] products; no gradient of the frozen weight exists."""

    @staticmethod
    def forward(ctx, x, w, scale, dropout, places, *ab):
        y = F.linear(x, w)
        a, b = ab[0::2], ab[1::2]
        inner = [F.linear(_dropped(x, dropout, seed), ai) for (_, _, seed), ai in zip(places, a)]
        for (start, stop, _), s, bi in zip(places, inner, b):
            y[:, start:stop].addmm_(s, bi.t(), alpha=scale)
        ctx.save_for_backward(x, w, *ab, *inner)
        ctx.scale, ctx.dropout, ctx.places = scale, dropout, places
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, *rest = ctx.saved_tensors
        n = len(ctx.places)
        a, b, inner = rest[0 : 2 * n : 2], rest[1 : 2 * n : 2], rest[2 * n :]
        dx = dy @ w if ctx.needs_input_grad[0] else None
        grads = []
        for (start, stop, seed), ai, bi, s in zip(ctx.places, a, b, inner):
            dy_i = dy[:, start:stop]
            ds = (dy_i @ bi).mul_(ctx.scale)
            grads += [ds.t() @ _dropped(x, ctx.dropout, seed), (dy_i.t() @ s).mul_(ctx.scale)]
            if dx is not None and not ctx.dropout:
                dx.addmm_(ds, ai)
            elif dx is not None:
                dx += _dropped(ds @ ai, ctx.dropout, seed)
        return dx, None, None, None, None, *grads


def lora_linear(x_TK: Tensor, w_NK: Tensor, adapters: list[Adapter], scale: float, dropout: float = 0.0) -> Tensor:
    """`lora_linear_definition` for a frozen W; A and B have x's dtype. Dropout 0 costs nothing."""
    places = [(adapter.start, adapter.stop, adapter.seed) for adapter in adapters]
    ab = [t for adapter in adapters for t in (adapter.a_RK, adapter.b_NR)]
    return _LoRALinear.apply(x_TK, w_NK, scale, dropout, places, *ab)
