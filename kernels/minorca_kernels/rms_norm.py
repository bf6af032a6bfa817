"""Root-mean-square normalisation in the Llama casting order: statistics in fp32, cast, then the weight; alone, or of a sum.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467); the order is that of transformers' LlamaRMSNorm.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import can_skip_dispatch, operator, processors, rows, wide


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H] in x's dtype; fp64 stays fp64."""
    value = x.to(wide(x.dtype))
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * rstd).to(x.dtype) * weight


def add_rms_norm_definition(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and update [..., H] -> their sum in their dtype, and the norm of that rounded sum."""
    total = x + update
    return total, rms_norm_definition(total, weight, eps)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _forward(
    x,
    update,
    weight,
    total,
    y,
    rstd,
    x_row,
    update_row,
    H: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    dtype = y.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(wide)
    if ADD:
        value = (value + tl.load(update + row * update_row + column, mask=inside, other=0.0).to(wide)).to(dtype)
        tl.store(total + row * H + column, value, mask=inside)
        value = value.to(wide)
    r = 1 / tl.sqrt(tl.sum(value * value, 0) / H + EPS)
    tl.store(rstd + row, r)
    normed = (value * r).to(dtype).to(wide)
    tl.store(y + row * H + column, normed * tl.load(weight + column, mask=inside, other=0.0).to(wide), mask=inside)


@triton.jit
def _backward(
    dy,
    dtotal,
    x,
    weight,
    rstd,
    dx,
    partials,
    rows,
    dy_row,
    dtotal_row,
    x_row,
    H: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # each program takes every so many rows, and keeps its share of the weight's gradient in registers
    column = tl.arange(0, BLOCK)
    inside = column < H
    dtype = dx.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    w = tl.load(weight + column, mask=inside, other=0.0).to(wide)
    dweight = tl.zeros([BLOCK], wide)
    for turn in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(turn, tl.int64)
        r = tl.load(rstd + row)
        normed = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(wide) * r
        d = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(wide)
        if WEIGHT:
            dweight += d * normed.to(dtype).to(wide)
        d *= w
        # the normalisation takes out what lies along the normed row
        d = (d - normed * (tl.sum(d * normed, 0) / H)) * r
        if ADD:
            d += tl.load(dtotal + row * dtotal_row + column, mask=inside, other=0.0).to(wide)
        tl.store(dx + row * H + column, d, mask=inside)
    if WEIGHT:
        tl.store(partials + tl.program_id(0).to(tl.int64) * H + column, dweight, mask=inside)


def _sizes(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"H": x.shape[-1], "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}  # 16 elements a thread


def _add_rms_norm_triton(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x_MH, update_MH = rows(x), x if update is None else rows(update)
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x_MH.shape[0], dtype=wide(x.dtype))
    total = y if update is None else torch.empty_like(y)
    steps = x_MH.stride(0), update_MH.stride(0)
    _forward[(len(rstd),)](
        x_MH, update_MH, weight.contiguous(), total, y, rstd, *steps, EPS=eps, ADD=update is not None, **_sizes(x)
    )
    return total, y, rstd


def _rms_norm_backward_triton(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    dy, x_MH, add = rows(dy), rows(x), dtotal is not None
    dtotal = rows(dtotal) if add else dy
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(len(rstd), 4 * processors(x.device)) if weight_gradient else len(rstd)
    partials = x.new_empty(programs if weight_gradient else 0, x.shape[-1], dtype=rstd.dtype)
    arguments = (
        dy,
        dtotal,
        x_MH,
        weight.contiguous(),
        rstd,
        dx,
        partials,
        len(rstd),
        dy.stride(0),
        dtotal.stride(0),
        x_MH.stride(0),
    )
    _backward[(programs,)](*arguments, ADD=add, WEIGHT=weight_gradient, **_sizes(x))
    return dx, partials.sum(0).to(weight.dtype) if weight_gradient else weight.new_empty(0)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    value = x.to(wide(x.dtype))
    rstd = torch.rsqrt(torch.linalg.vecdot(value, value) / x.shape[-1] + eps)
    return (value * rstd[..., None]).to(x.dtype).mul_(weight).contiguous(), rstd.flatten()


def _add_rms_norm_torch(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + update).contiguous()
    return total, *_rms_norm_torch(total, weight, eps)


def _rms_norm_backward_torch(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    rstd = rstd.view(*x.shape[:-1], 1)
    normed = x.to(rstd.dtype) * rstd
    dweight = weight.new_empty(0)
    if weight_gradient:
        dweight = (dy.to(rstd.dtype) * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
    scaled = dy.to(rstd.dtype) * weight
    # the normalisation takes out what lies along the normed row
    mean = torch.linalg.vecdot(scaled, normed)[..., None] / x.shape[-1]
    dx = scaled.addcmul_(normed, mean, value=-1).mul_(rstd)
    return (dx if dtotal is None else dx.add_(dtotal)).to(x.dtype).contiguous(), dweight


# ------------------------------------------------------------------------------------------- operators and autograd


def _like_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[:-1].numel(), dtype=wide(x.dtype))


def _like_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(
        weight.shape if weight_gradient else 0
    )


_rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    cuda=lambda x, weight, eps: _add_rms_norm_triton(x, None, weight, eps)[1:],
    cpu=_rms_norm_torch,
    fake=_like_norm,
)
_add_rms_norm = operator(
    "add_rms_norm(Tensor x, Tensor update, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    cuda=_add_rms_norm_triton,
    cpu=_add_rms_norm_torch,
    fake=lambda x, update, weight, eps: (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        *_like_norm(x, weight, eps),
    ),
)
_rms_norm_backward = operator(
    "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd, bool weight_gradient) -> (Tensor, Tensor)",
    cuda=_rms_norm_backward_triton,
    cpu=_rms_norm_backward_torch,
    fake=_like_backward,
)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; the normalised rows are computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx, dweight = _rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which the residual stream keeps too; what flows back along both outputs is added in the same pass."""

    @staticmethod
    def forward(ctx, x, update, weight, eps):
        total, y, rstd = _add_rms_norm(x, update, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dy):
        dx, dweight = _rms_norm_backward(dy, dtotal, *ctx.saved_tensors, ctx.needs_input_grad[2])
        return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_definition`; no weight gradient is computed where the weight is frozen."""
    if can_skip_dispatch(x):
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_definition` in one pass; x and update have one shape."""
    if can_skip_dispatch(x):
        return (total := x + update), rms_norm(total, weight, eps)
    return _AddRMSNorm.apply(x, update, weight, eps)
