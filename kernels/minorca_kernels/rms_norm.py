"""Root-mean-square normalisation, alone or of a sum, in Llama's order: statistics in fp32, a cast, then the weight.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467); the order is that of transformers' LlamaRMSNorm.
Axes: M rows (all leading axes of x), H hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import (
    accumulate_dtype,
    as_rows,
    can_skip_dispatch,
    multiprocessor_count,
    operator,
    zero_scratch,
)


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H] in x's dtype; statistics in fp32 (fp64 for fp64)."""
    value = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * rstd).to(x.dtype) * weight


def add_rms_norm_definition(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and update [..., H] -> their sum in their dtype, and the norm of that rounded sum."""
    total = x + update
    return total, rms_norm_definition(total, weight, eps)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _forward_kernel(
    x_ptr,
    update_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    rstd_ptr,
    stride_x,
    stride_update,
    stride_y,
    H: tl.constexpr,
    SCRATCH: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < H
    dtype = y_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(acc_dtype)
    # before the sum, for which the warps wait for each other
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(acc_dtype)
    if ADD:
        update = tl.load(update_ptr + row * stride_update + column, mask=mask, other=0.0).to(acc_dtype)
        total = (x + update).to(dtype)
        tl.store(total_ptr + row * H + column, total, mask=mask)
        x = total.to(acc_dtype)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / H + EPS)
    tl.store(rstd_ptr + row, rstd)
    x_hat = (x * rstd).to(dtype).to(acc_dtype)
    tl.store(y_ptr + row * stride_y + column, x_hat * weight, mask=mask)
    if SCRATCH > 0:
        zero_scratch(y_ptr + row * stride_y + H, SCRATCH)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_dweight_ptr,
    rows,
    stride_dy,
    stride_dtotal,
    stride_x,
    H: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Rows are dealt to the programs in turn; each keeps its partial sum of the weight's gradient in registers.
    column = tl.arange(0, BLOCK_H)
    mask = column < H
    dtype = dx_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(acc_dtype)
    dweight = tl.zeros([BLOCK_H], acc_dtype)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        x_hat = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(acc_dtype) * rstd
        dx = tl.load(dy_ptr + row * stride_dy + column, mask=mask, other=0.0).to(acc_dtype)
        if WEIGHT_GRADIENT:
            dweight += dx * x_hat.to(dtype).to(acc_dtype)
        dx *= weight
        # the normalisation removes the component along the normalised row
        dx = (dx - x_hat * (tl.sum(dx * x_hat, 0) / H)) * rstd
        if ADD:
            dx += tl.load(dtotal_ptr + row * stride_dtotal + column, mask=mask, other=0.0).to(acc_dtype)
        tl.store(dx_ptr + row * H + column, dx, mask=mask)
    if WEIGHT_GRADIENT:
        tl.store(partial_dweight_ptr + tl.program_id(0).to(tl.int64) * H + column, dweight, mask=mask)


def _constants(x: Tensor, **flags: Any) -> dict[str, Any]:
    block = triton.next_power_of_2(x.shape[-1])
    # 16 elements a thread
    return {"H": x.shape[-1], "BLOCK_H": block, "num_warps": min(max(block // 512, 1), 16), **flags}


def _add_rms_norm_triton(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, scratch: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, norm, rstd of each row); without an update, (norm, norm, rstd)."""
    x_MH = as_rows(x)
    update_MH = x_MH if update is None else as_rows(update)
    y, rstd = _empty_forward(x, weight, eps, scratch)
    total = y if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward_kernel[(len(rstd),)](
        x_MH,
        update_MH,
        weight.contiguous(),
        total,
        y,
        rstd,
        x_MH.stride(0),
        update_MH.stride(0),
        y.stride(-2),
        **_constants(x, SCRATCH=scratch, EPS=eps, ADD=update is not None),
    )
    return total, y, rstd


def _rms_norm_backward_triton(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    dy_MH = as_rows(dy)
    x_MH = as_rows(x)
    dtotal_MH = dy_MH if dtotal is None else as_rows(dtotal)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(len(rstd), 4 * multiprocessor_count(x.device)) if weight_gradient else len(rstd)
    partial_dweight = x.new_empty(programs if weight_gradient else 0, x.shape[-1], dtype=rstd.dtype)
    _backward_kernel[(programs,)](
        dy_MH,
        dtotal_MH,
        x_MH,
        weight.contiguous(),
        rstd,
        dx,
        partial_dweight,
        len(rstd),
        dy_MH.stride(0),
        dtotal_MH.stride(0),
        x_MH.stride(0),
        **_constants(x, ADD=dtotal is not None, WEIGHT_GRADIENT=weight_gradient),
    )
    return dx, partial_dweight.sum(0).to(weight.dtype) if weight_gradient else weight.new_empty(0)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float, scratch: int = 0) -> tuple[Tensor, Tensor]:
    value = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(torch.linalg.vecdot(value, value) / x.shape[-1] + eps)
    return (value * rstd[..., None]).to(x.dtype).mul_(weight).contiguous(), rstd.flatten()


def _add_rms_norm_torch(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, scratch: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + update).contiguous()
    return total, *_rms_norm_torch(total, weight, eps)


def _rms_norm_backward_torch(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    rstd = rstd.view(*x.shape[:-1], 1)
    value = x.to(rstd.dtype)
    dweight = weight.new_empty(0)
    if weight_gradient:
        x_hat = (value * rstd).to(x.dtype)
        dweight = (dy.to(rstd.dtype) * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
    dx_hat = dy.to(rstd.dtype) * weight
    # the normalisation removes the component along the normalised row
    mean = torch.linalg.vecdot(dx_hat, value)[..., None] * rstd / x.shape[-1]
    dx = dx_hat.addcmul_(value, mean * rstd, value=-1).mul_(rstd)
    return (dx if dtotal is None else dx.add_(dtotal)).to(x.dtype).contiguous(), dweight


# ------------------------------------------------------------------------------------------- operators and autograd


def _empty_forward(x: Tensor, weight: Tensor, eps: float, scratch: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.empty(*x.shape[:-1], x.shape[-1] + scratch, dtype=x.dtype, device=x.device)[..., : x.shape[-1]]
    return y, x.new_empty(x.shape[:-1].numel(), dtype=accumulate_dtype(x.dtype))


def _empty_add_forward(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, scratch: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_empty_forward(x, weight, eps, scratch)


def _empty_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, weight.new_empty(weight.shape if weight_gradient else 0)


# scratch: how many columns of zeros lie after each row of the norm; the CPU's has none
rms_norm_forward = operator(
    "rms_norm(Tensor x, Tensor weight, float eps, int scratch=0) -> (Tensor, Tensor)",
    cuda=lambda x, weight, eps, scratch=0: _add_rms_norm_triton(x, None, weight, eps, scratch)[1:],
    cpu=_rms_norm_torch,
    fake=_empty_forward,
)
add_rms_norm_forward = operator(
    "add_rms_norm(Tensor x, Tensor update, Tensor weight, float eps, int scratch=0) -> (Tensor, Tensor, Tensor)",
    cuda=_add_rms_norm_triton,
    cpu=_add_rms_norm_torch,
    fake=_empty_add_forward,
)
rms_norm_backward = operator(
    "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd, bool weight_gradient)"
    " -> (Tensor, Tensor)",
    cuda=_rms_norm_backward_triton,
    cpu=_rms_norm_backward_torch,
    fake=_empty_backward,
)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and the rstd of each row; backward computes the normalised rows again."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx, dweight = rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, which the residual stream keeps too; backward adds both outputs' gradients in the same pass."""

    @staticmethod
    def forward(ctx, x, update, weight, eps):
        total, y, rstd = add_rms_norm_forward(x, update, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal, dy):
        dx, dweight = rms_norm_backward(dy, dtotal, *ctx.saved_tensors, ctx.needs_input_grad[2])
        return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_definition`, fused; a frozen weight's gradient is not computed."""
    if can_skip_dispatch(x):
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_definition` in one pass; x and update have the same shape."""
    if can_skip_dispatch(x):
        total = x + update
        return total, rms_norm(total, weight, eps)
    return _AddRMSNorm.apply(x, update, weight, eps)
