"""SwiGLU on the fused [gate | up] buffer. Source: Shazeer 2020 (arXiv:2002.05202); rounding order as in transformers.

Axes: T tokens, I intermediate size; a fused buffer is [T, 2I].
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import as_rows, can_skip_dispatch, operator, zero_scratch


def swiglu_definition(gate_up_TI: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu(gate), rounded to the buffer's dtype, times up."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------------------ Triton
# A program computes a part of a row: a thread holds 8 values of each operand, 16 bytes in bf16.


@triton.jit
def _exp(x):
    """e^x in fp32, as exact as the GPU's power of two: tl.exp rounds x log2(e) first, which costs up to |x| units in
    the last place.
    """
    # beyond these the result is 0 or infinite; infinite x would give NaN
    x = tl.minimum(tl.maximum(x, -88.0), 89.0)
    whole = tl.floor(x * 1.4426950408889634)
    # ln 2 in two parts (Cody and Waite 1980): the product with the first is exact
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * (whole.to(tl.int32) + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times_sigmoid(x, gate, EXACT: tl.constexpr):
    """x / (1 + e^-gate). EXACT: as exact as PyTorch's in fp32, for results that are not rounded to 16 bits."""
    if EXACT:
        return tl.math.div_rn(x, 1 + _exp(-gate))
    return x / (1 + tl.exp(-gate))


@triton.jit
def _forward_kernel(
    gate_up_ptr,
    y_ptr,
    stride_gate_up,
    stride_y,
    INTERMEDIATE: tl.constexpr,
    SCRATCH: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = (tl.program_id(0) // tl.cdiv(INTERMEDIATE, BLOCK_I)).to(tl.int64)
    part = tl.program_id(0) % tl.cdiv(INTERMEDIATE, BLOCK_I)
    column = part * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = column < INTERMEDIATE
    dtype = y_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    gate = tl.load(gate_up_ptr + row * stride_gate_up + column, mask=mask, other=0.0).to(acc_dtype)
    up = tl.load(gate_up_ptr + row * stride_gate_up + INTERMEDIATE + column, mask=mask, other=0.0).to(acc_dtype)
    silu = _times_sigmoid(gate, gate, dtype == tl.float32).to(dtype).to(acc_dtype)
    tl.store(y_ptr + row * stride_y + column, silu * up, mask=mask)
    if SCRATCH > 0 and part == 0:
        zero_scratch(y_ptr + row * stride_y + INTERMEDIATE, SCRATCH)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    y_ptr,
    stride_dy,
    stride_gate_up,
    INTERMEDIATE: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    row = (tl.program_id(0) // tl.cdiv(INTERMEDIATE, BLOCK_I)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(INTERMEDIATE, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = column < INTERMEDIATE
    dtype = dgate_up_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=mask, other=0.0).to(acc_dtype)
    gate = tl.load(gate_up_ptr + row * stride_gate_up + column, mask=mask, other=0.0).to(acc_dtype)
    up = tl.load(gate_up_ptr + row * stride_gate_up + INTERMEDIATE + column, mask=mask, other=0.0).to(acc_dtype)
    sigmoid = _times_sigmoid(tl.full([], 1, acc_dtype), gate, dtype == tl.float32)
    silu = (gate * sigmoid).to(dtype).to(acc_dtype)
    tl.store(dgate_up_ptr + row * 2 * INTERMEDIATE + column, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
    tl.store(dgate_up_ptr + row * 2 * INTERMEDIATE + INTERMEDIATE + column, dy * silu, mask=mask)
    if WITH_OUTPUT:
        tl.store(y_ptr + row * INTERMEDIATE + column, silu * up, mask=mask)


def _constants(intermediate_size: int, **flags: Any) -> dict[str, Any]:
    block = min(1024, triton.next_power_of_2(intermediate_size))
    return {"INTERMEDIATE": intermediate_size, "BLOCK_I": block, "num_warps": max(block // 256, 1), **flags}


def _grid(y: Tensor, constants: dict[str, Any]) -> tuple[int]:
    return (len(y) * triton.cdiv(constants["INTERMEDIATE"], constants["BLOCK_I"]),)


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    swiglu_into(gate_up, y)
    return y


def swiglu_into(gate_up_TI: Tensor, out_TI: Tensor, scratch: int = 0) -> None:
    """Writes `swiglu` into out [T, I], whose rows may have any stride, and zeros into the scratch columns after each
    row, of which there are so many. Launches the Triton kernel.
    """
    gate_up_TI = as_rows(gate_up_TI)
    constants = _constants(out_TI.shape[1], SCRATCH=scratch)
    grid = _grid(out_TI, constants)
    _forward_kernel[grid](gate_up_TI, out_TI, gate_up_TI.stride(0), out_TI.stride(0), **constants)


def _swiglu_backward_triton(dy: Tensor, gate_up: Tensor, with_output: bool) -> tuple[Tensor, Tensor]:
    dgate_up, y = _empty_backward(dy, gate_up, with_output)
    dy = as_rows(dy)
    gate_up = as_rows(gate_up)
    constants = _constants(dy.shape[1], WITH_OUTPUT=with_output)
    grid = _grid(dy, constants)
    _backward_kernel[grid](dy, gate_up, dgate_up, y, dy.stride(0), gate_up.stride(0), **constants)
    return dgate_up, y


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).contiguous()


def _swiglu_backward_torch(dy: Tensor, gate_up: Tensor, with_output: bool) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    dgate_up, y = _empty_backward(dy, gate_up, with_output)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    silu = F.silu(gate)
    torch.mul(dy, silu, out=dup)
    if with_output:
        torch.mul(silu, up, out=y)
    return dgate_up, y


# ------------------------------------------------------------------------------------------- operators and autograd


def _empty_backward(dy: Tensor, gate_up: Tensor, with_output: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dy.shape if with_output else 0)


_swiglu = operator(
    "swiglu(Tensor gate_up) -> Tensor",
    cuda=_swiglu_triton,
    cpu=_swiglu_torch,
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
# (dgate_up, y): with_output computes the forward's output again while gate and up are loaded; otherwise y is empty
swiglu_backward = operator(
    "swiglu_backward(Tensor dy, Tensor gate_up, bool with_output) -> (Tensor, Tensor)",
    cuda=_swiglu_backward_triton,
    cpu=_swiglu_backward_torch,
    fake=_empty_backward,
)


class _SwiGLU(torch.autograd.Function):
    """Keeps only the fused buffer, and writes its gradient into one buffer of the same shape."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return swiglu_backward(dy, *ctx.saved_tensors, False)[0]


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """`swiglu_definition`, fused."""
    return _swiglu_torch(gate_up_TI) if can_skip_dispatch(gate_up_TI) else _SwiGLU.apply(gate_up_TI)
