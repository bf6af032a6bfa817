"""A frozen projection and its low-rank adapters as one differentiable operation. Source: Hu et al. 2021
(arXiv:2106.09685).

A projection may stack several of the model's by rows (q, k and v), each with an adapter of its own or none. Its input
may be the SwiGLU of a buffer, or the norm of the residual stream, which are then recomputed in backward instead of
being stored.
Axes: T tokens, N out, K in, R ranks of all adapters side by side.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca_kernels.dropout import a_gradient, add_x_gradient, dropout_definition, dropped_product
from minorca_kernels.frozen_weight import DenseWeight, FrozenWeight
from minorca_kernels.low_rank_gradients import low_rank_gradients, unrounded_product
from minorca_kernels.low_rank_update import (
    STRATEGIES,
    Factor,
    has_padding,
    joined,
    joining_pays,
    own_columns,
    padding_pays,
    ranks_of,
    scratch_columns,
    whole_rows,
    write_update,
)
from minorca_kernels.operator import accumulate_dtype, operator, uses_triton
from minorca_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_definition,
    rms_norm_forward,
)
from minorca_kernels.swiglu import swiglu, swiglu_backward_, swiglu_definition, swiglu_into, take_buffer


class Adapter(NamedTuple):
    """The update scale * B A to rows [start, stop) of a projection's weight; A and B are rounded to the input's
    dtype.
    """

    start: int
    stop: int
    a_RK: Tensor
    b_NR: Tensor
    seed: int = 0  # of this adapter's dropout in this call


class Factors(NamedTuple):
    """A projection's adapters as its products read them, in the input's dtype.

    Attributes:
        a_RK: A of all adapters, one under the other.
        b: B of each.
        in_weight: a `PaddedWeight` holds scale * B in its scratch columns already.
    """

    a_RK: Tensor
    b: list[Tensor]
    in_weight: bool = False


def lora_linear_definition(
    x_TK: Tensor, w_NK: Tensor, adapters: list[Adapter], scale: float, dropout: float = 0.0, of_swiglu: bool = False
) -> Tensor:
    """x [T, K], W [N, K] -> x W^T [T, N], plus scale * drop(x) A^T B^T in each adapter's rows.

    of_swiglu: x is a buffer [T, 2K] of gate and up, and its SwiGLU takes the place of x.
    """
    x_TK = swiglu_definition(x_TK) if of_swiglu else x_TK
    y = F.linear(x_TK, w_NK)
    updates = [
        F.pad(
            F.linear(F.linear(dropout_definition(x_TK, dropout, seed), a.to(y)), b.to(y)) * scale,
            (start, w_NK.shape[0] - stop),
        )
        for start, stop, a, b, seed in adapters
    ]
    return y + sum(updates) if updates else y


def norm_lora_linear_definition(
    x_TK: Tensor,
    update_TK: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    w_NK: Tensor,
    adapters: list[Adapter],
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x and update [T, K] -> their sum, and `lora_linear_definition` of its norm; update may be None."""
    total_TK = x_TK if update_TK is None else x_TK + update_TK
    normed_TK = rms_norm_definition(total_TK, norm_weight, eps)
    return total_TK, lora_linear_definition(normed_TK, w_NK, adapters, scale, dropout)


# -------------------------------------------------------------------------------------------- forward and backward

# Below so many tokens launches cost more than memory traffic: generation takes one token a sequence.
MIN_TOKENS_AUGMENTED = 256


def _padded_input(x: Tensor, w: Tensor, of_swiglu: bool) -> Tensor:
    """x, or its SwiGLU, as a view of rows that have as many scratch columns as those of W; they are zero."""
    rows = x.new_empty(len(x), w.stride(0))
    padded = rows[:, : w.shape[1]]
    if of_swiglu:
        swiglu_into(x, padded, rows.shape[1] - padded.shape[1])
        return padded
    rows[:, w.shape[1] :] = 0
    return padded.copy_(x)


def _forward(
    x: Tensor,
    w: list[Tensor],
    kind: str,
    out_features: int,
    a: Tensor,
    b: list[Tensor],
    starts: list[int],
    scale: float,
    dropout: float,
    seeds: list[int],
    of_swiglu: bool,
    strategy: str,
    x_padded: bool,
    update_in_weight: bool,
) -> tuple[Tensor, Tensor]:
    storage = FrozenWeight.kinds[kind]
    weight = Factor(storage, w, False, out_features)
    if strategy == "augmented":
        rows = storage.padded_rows(w, len(a), x.dtype)
        stride = rows.stride(0)
        if stride >= rows.shape[1] + len(a) and has_padding(rows, stride):
            weight = Factor(DenseWeight, [rows], False, out_features)
            if not (x_padded and has_padding(x, stride)):
                x = _padded_input(x, rows, of_swiglu)
            if not update_in_weight:
                write_update(b, starts, scale, scratch_columns(rows, rows).zero_())
        else:
            strategy = "accumulated"
    if of_swiglu and strategy != "augmented":
        x = swiglu(x)
    s = dropped_product(x, a.split(ranks_of(b)), seeds, dropout) if dropout else F.linear(x, a)
    return STRATEGIES[strategy](x, weight, s, b, starts, scale), s


def _backward(
    gradients: Callable,
    dy: Tensor,
    x: Tensor,
    w: list[Tensor],
    kind: str,
    a: Tensor,
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
    ds = dy.new_empty(s.shape)
    ranks = ranks_of(b)
    if joining_pays(b):
        db_NR = gradients(dy, joined(b, starts, dy.shape[1]), s, scale, ds)
        own_blocks = zip(db_NR.split(ranks, dim=1), starts, b)
        db = [columns[start : start + len(b_i)].contiguous() for columns, start, b_i in own_blocks]
    else:
        dy_rows = [whole_rows(dy[:, start : start + len(b_i)]) for start, b_i in zip(starts, b)]
        parts = zip(dy_rows, b, own_columns(s, b), ds.split(ranks, dim=1))
        db = [gradients(dy_i, b_i, s_i, scale, ds_i) for dy_i, b_i, s_i, ds_i in parts]

    weight = Factor(FrozenWeight.kinds[kind], w, True, a.shape[1])
    dx = x.new_empty(0)
    if x_gradient and dropout:
        dx = weight.product(dy)
        add_x_gradient(dx, own_columns(ds, b), a.split(ranks), seeds, dropout)
    elif x_gradient:
        # the same sum of two products as in forward; a transposed W has no scratch columns
        strategy = "accumulated" if strategy == "augmented" else strategy
        dx = STRATEGIES[strategy](dy, weight, ds, [a.t()], [0], 1.0)
    if of_swiglu and x_gradient:
        # the next operator makes da of ds
        da = ds
    else:
        da = _a_gradient(swiglu(x) if of_swiglu else x, ds, ranks, dropout, seeds)
    return dx, da, [db_i.to(accumulate_dtype(x.dtype)) for db_i in db]


def _a_gradient(x: Tensor, ds: Tensor, ranks: list[int], dropout: float, seeds: list[int]) -> Tensor:
    if not dropout:
        return unrounded_product(ds.t(), x)
    return a_gradient(x, [whole_rows(part) for part in ds.split(ranks, dim=1)], seeds, dropout)


def _swiglu_backward(
    dx: Tensor, gate_up: Tensor, ds: Tensor, ranks: list[int], dropout: float, seeds: list[int]
) -> Tensor:
    swiglu_backward_(dx, gate_up, True)
    return _a_gradient(dx, ds, ranks, dropout, seeds)


def _gradients_torch(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    ds.addmm_(dy, b, beta=0, alpha=scale)
    db = dy.t() @ s
    # rounds the scale to the dtype of db, too
    torch._foreach_mul_([db], scale)
    return db


def _fake_backward(dy, x, w, kind, a, b, s, *settings) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulate_dtype(x.dtype)
    *_, of_swiglu, _, x_gradient = settings
    dx = x.new_empty((len(x), a.shape[1]) if x_gradient else 0)
    da = s.new_empty(s.shape) if of_swiglu and x_gradient else a.new_empty(a.shape, dtype=dtype)
    return dx, da, [b_i.new_empty(b_i.shape, dtype=dtype) for b_i in b]


_lora_linear = operator(
    "lora_linear(Tensor x, Tensor[] w, str kind, int out_features, Tensor a, Tensor[] b, int[] starts, float scale,"
    " float dropout, int[] seeds, bool of_swiglu, str strategy, bool x_padded, bool update_in_weight)"
    " -> (Tensor, Tensor)",
    cuda=_forward,
    cpu=_forward,
    fake=lambda x, w, kind, out_features, a, *_: (
        x.new_empty(x.shape[0], out_features),
        x.new_empty(x.shape[0], a.shape[0]),
    ),
)
# The adapters' gradients are in the dtype in which they are summed, those of A one under the other. Of SwiGLU, where x
# has a gradient, it returns the gradients of SwiGLU and of its product with A instead of those of x and A.
_lora_linear_backward = operator(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor[] w, str kind, Tensor a, Tensor[] b, Tensor s, int[] starts,"
    " float scale, float dropout, int[] seeds, bool of_swiglu, str strategy, bool x_gradient)"
    " -> (Tensor, Tensor, Tensor[])",
    cuda=functools.partial(_backward, low_rank_gradients),
    cpu=functools.partial(_backward, _gradients_torch),
    fake=_fake_backward,
)


# Those of x and A: overwrites x by its gradient, and the gradient of SwiGLU by SwiGLU, of which it makes A's.
_lora_linear_swiglu_backward_ = operator(
    "lora_linear_swiglu_backward_(Tensor(a!) dx, Tensor(b!) gate_up, Tensor ds, int[] ranks, float dropout,"
    " int[] seeds) -> Tensor",
    cuda=_swiglu_backward,
    cpu=_swiglu_backward,
    fake=lambda dx, gate_up, ds, *_: ds.new_empty(ds.shape[1], dx.shape[1], dtype=accumulate_dtype(dx.dtype)),
)


class _Call(NamedTuple):
    """What a call of the operators needs besides its tensors: those of W, A of all adapters, B of each, and what A and
    B were rounded from.
    """

    kind: str
    out_features: int
    weight_tensors: int
    adapters: int
    settings: tuple
    update_in_weight: bool

    @property
    def strategy(self) -> str:
        return self.settings[-1]

    def scratch_width(self, tensors: tuple[Tensor, ...]) -> int:
        """How many scratch columns x needs to be read where it lies."""
        w, a, _ = self._split(tensors)
        return FrozenWeight.kinds[self.kind].scratch_width(w, len(a)) if self.strategy == "augmented" else 0

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...], x_padded: bool = False) -> tuple[Tensor, Tensor]:
        w, a, b = self._split(tensors)
        flags = x_padded, self.update_in_weight
        return _lora_linear(x, w, self.kind, self.out_features, a, b, *self.settings, *flags)

    def backward(self, dy: Tensor, x: Tensor, s: Tensor, tensors: tuple[Tensor, ...], x_gradient: bool) -> tuple:
        """The gradients of x and of all the tensors."""
        w, a, b = self._split(tensors)
        dx, da, db = _lora_linear_backward(dy, x, w, self.kind, a, b, s, *self.settings, x_gradient)
        *_, dropout, seeds, of_swiglu, _ = self.settings
        if of_swiglu and x_gradient:
            swiglu_dx, dx = dx, take_buffer(x)
            da = _lora_linear_swiglu_backward_(swiglu_dx, dx, da, ranks_of(b), dropout, seeds)
        ab = [gradient for pair in zip(da.split(ranks_of(b)), db) for gradient in pair]
        masters = tensors[-2 * self.adapters :]
        frozen = len(tensors) - len(masters)
        return dx if x_gradient else None, *[None] * frozen, *(g.to(t.dtype) for g, t in zip(ab, masters))

    def _split(self, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        first = self.weight_tensors
        return list(tensors[:first]), tensors[first], list(tensors[first + 1 : first + 1 + self.adapters])


class _LoRALinear(torch.autograd.Function):
    """Saves x once for the whole group and its [T, R] products; a frozen weight has no gradient."""

    @staticmethod
    def forward(ctx, x, call, *tensors):
        y, s = call.forward(x, tensors)
        ctx.save_for_backward(x, s, *tensors)
        ctx.call = call
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, s, *tensors = ctx.saved_tensors
        dx, *gradients = ctx.call.backward(dys[0], x, s, tensors, ctx.needs_input_grad[0])
        return dx, None, *gradients


class _NormLoRALinear(torch.autograd.Function):
    """Keeps the sum, which the residual stream keeps too, and the rstd of each row: the norm, as large as the sum, is
    computed again in backward, and lies beside its products in forward.
    """

    @staticmethod
    def forward(ctx, x, update, norm_weight, eps, call, *tensors):
        scratch = call.scratch_width(tensors)
        total = x
        if update is None:
            normed, rstd = rms_norm_forward(x, norm_weight, eps, scratch)
        else:
            total, normed, rstd = add_rms_norm_forward(x, update, norm_weight, eps, scratch)
        y, s = call.forward(normed, tensors, x_padded=scratch > 0)
        ctx.save_for_backward(total, norm_weight, rstd, s, *tensors)
        ctx.eps, ctx.call, ctx.adds = eps, call, update is not None
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dy):
        total, norm_weight, rstd, s, *tensors = ctx.saved_tensors
        needs_dx = any(ctx.needs_input_grad[:3])
        normed, _ = rms_norm_forward(total, norm_weight, ctx.eps)
        dx, *gradients = ctx.call.backward(dy, normed, s, tensors, needs_dx)
        dweight = None
        if needs_dx:
            dx, dweight = rms_norm_backward(dx, dtotal, total, norm_weight, rstd, ctx.needs_input_grad[2])
        dweight = dweight if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.adds else None, dweight, None, None, *gradients


def norm_lora_linear(
    x_TK: Tensor,
    update_TK: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: FrozenWeight,
    adapters: list[Adapter],
    scale: float,
    dropout: float = 0.0,
    strategy: str | None = None,
    factors: Factors | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_lora_linear_definition`, with the arguments of `lora_linear`."""
    strategy = strategy or _choose_strategy(x_TK, weight, adapters, True)
    if uses_triton(x_TK):
        call = _call(x_TK, weight, adapters, scale, dropout, False, strategy, factors)
        return _NormLoRALinear.apply(x_TK, update_TK, norm_weight, eps, *call)
    # computing the norm again takes a CPU longer than reading it
    if update_TK is None:
        normed_TK = rms_norm(x_TK, norm_weight, eps)
    else:
        x_TK, normed_TK = add_rms_norm(x_TK, update_TK, norm_weight, eps)
    return x_TK, lora_linear(normed_TK, weight, adapters, scale, dropout, False, strategy, factors)


def lora_linear(
    x_TK: Tensor,
    weight: FrozenWeight,
    adapters: list[Adapter],
    scale: float,
    dropout: float = 0.0,
    of_swiglu: bool = False,
    strategy: str | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """`lora_linear_definition` for a frozen weight of any kind and one adapter or more.

    Args:
        strategy: one of `STRATEGIES`, for benchmarks and tests; by default what suits the device, the weight and the
            number of tokens. "augmented" needs a `PaddedWeight`, or a kind that makes its rows, "fused" a dense one.
        factors: the adapters as `round_adapters` makes them, where they are kept from call to call.
    """
    strategy = strategy or _choose_strategy(x_TK, weight, adapters, of_swiglu)
    return _LoRALinear.apply(x_TK, *_call(x_TK, weight, adapters, scale, dropout, of_swiglu, strategy, factors))


def _choose_strategy(x: Tensor, weight: FrozenWeight, adapters: list[Adapter], in_place: bool) -> str:
    """in_place: whether x is written next to its products in the first place."""
    if len(x) >= MIN_TOKENS_AUGMENTED:
        ranks = sum(len(adapter.a_RK) for adapter in adapters)
        pays = weight.makes_rows and padding_pays(weight.out_features, weight.in_features, ranks, in_place)
        if weight.kind == "padded" or (pays and uses_triton(x)):
            return "augmented"
    return "accumulated"


def _call(
    x: Tensor,
    weight: FrozenWeight,
    adapters: list[Adapter],
    scale: float,
    dropout: float,
    of_swiglu: bool,
    strategy: str,
    factors: Factors | None,
) -> tuple:
    """The call, and its tensors."""
    starts, seeds = [adapter.start for adapter in adapters], [adapter.seed for adapter in adapters]
    settings = (starts, scale, dropout, seeds, of_swiglu, strategy)
    a, b, in_weight = factors or round_adapters(adapters, x.dtype)
    w = weight.tensors()
    masters = (t for adapter in adapters for t in (adapter.a_RK, adapter.b_NR))
    return _Call(weight.kind, weight.out_features, len(w), len(b), settings, in_weight), *w, a, *b, *masters


@torch.no_grad()
def round_adapters(adapters: list[Adapter], dtype: torch.dtype) -> Factors:
    a = [adapter.a_RK.to(dtype) for adapter in adapters]
    b = [adapter.b_NR.detach().to(dtype) for adapter in adapters]
    return Factors(torch.cat(a) if len(a) > 1 else a[0].detach(), b)
