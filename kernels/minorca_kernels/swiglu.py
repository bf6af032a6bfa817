"""SwiGLU on the fused [gate | up] buffer. Source: Shazeer 2020 (arXiv:2002.05202); rounding order as in transformers.

Axes: T tokens, I intermediate size; a fused buffer is [T, 2I].
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

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
    stride_dy,
    stride_gate_up,
    INTERMEDIATE: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # In place: a thread has loaded all that it overwrites.
    row = (tl.program_id(0) // tl.cdiv(INTERMEDIATE, BLOCK_I)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(INTERMEDIATE, BLOCK_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = column < INTERMEDIATE
    dtype = gate_up_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    dy_ptr += row * stride_dy
    gate_up_ptr += row * stride_gate_up
    dy = tl.load(dy_ptr + column, mask=mask, other=0.0).to(acc_dtype)
    gate = tl.load(gate_up_ptr + column, mask=mask, other=0.0).to(acc_dtype)
    up = tl.load(gate_up_ptr + INTERMEDIATE + column, mask=mask, other=0.0).to(acc_dtype)
    sigmoid = _times_sigmoid(tl.full([], 1, acc_dtype), gate, dtype == tl.float32)
    silu = (gate * sigmoid).to(dtype).to(acc_dtype)
    tl.store(gate_up_ptr + column, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
    tl.store(gate_up_ptr + INTERMEDIATE + column, dy * silu, mask=mask)
    if WITH_OUTPUT:
        tl.store(dy_ptr + column, silu * up, mask=mask)


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


def _swiglu_backward_triton(dy: Tensor, gate_up: Tensor, with_output: bool) -> None:
    rows = [as_rows(dy), as_rows(gate_up)]
    constants = _constants(dy.shape[1], WITH_OUTPUT=with_output)
    _backward_kernel[_grid(dy, constants)](*rows, *(t.stride(0) for t in rows), **constants)
    # where a row was not contiguous, its copy was overwritten
    for t, copied in zip((dy, gate_up), rows):
        if t.stride(1) != 1:
            t.copy_(copied)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).contiguous()


def _swiglu_backward_torch(dy: Tensor, gate_up: Tensor, with_output: bool) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    product = dy * up
    torch.ops.aten.silu_backward(product, gate, grad_input=gate)
    dup = torch.mul(dy, silu, out=product)
    if with_output:
        torch.mul(silu, up, out=dy)
    up.copy_(dup)


# ------------------------------------------------------------------------------------------- operators and autograd


_swiglu = operator(
    "swiglu(Tensor gate_up) -> Tensor",
    cuda=_swiglu_triton,
    cpu=_swiglu_torch,
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
# Overwrites gate_up by its gradient, and dy, with_output, by the forward's output, computed again while gate and up are
# loaded: backward holds no more than the two.
swiglu_backward_ = operator(
    "swiglu_backward_(Tensor(a!) dy, Tensor(b!) gate_up, bool with_output) -> ()",
    cuda=_swiglu_backward_triton,
    cpu=_swiglu_backward_torch,
    fake=lambda dy, gate_up, with_output: None,
)


def take_buffer(gate_up: Tensor) -> Tensor:
    """What backward may overwrite of a buffer that an autograd.Function saved: itself, or a copy where it is a leaf.

    A leaf is the caller's; what the network computed nobody reads again. Where somebody does, or goes backward twice,
    autograd raises an error.
    """
    if gate_up.is_leaf or not gate_up.is_contiguous():
        return gate_up.detach().clone(memory_format=torch.contiguous_format)
    increment_version(gate_up)
    return gate_up.detach()


class _SwiGLU(torch.autograd.Function):
    """Keeps only the fused buffer, and writes its gradient into it."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate_up = take_buffer(*ctx.saved_tensors)
        swiglu_backward_(dy, gate_up, False)
        return gate_up


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """`swiglu_definition`, fused."""
    return _swiglu_torch(gate_up_TI) if can_skip_dispatch(gate_up_TI) else _SwiGLU.apply(gate_up_TI)
