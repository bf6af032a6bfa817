"""SwiGLU on the fused [gate | up] buffer. Source: Shazeer 2020 (arXiv:2002.05202); rounding order as in transformers."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import can_skip_dispatch, operator, rows


def swiglu_definition(gate_up_TI: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu(gate), rounded to the buffer's dtype, times up."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------------------ Triton
# tiles of a row, not whole rows: a thread holds 8 values of each operand, 16 bytes in bf16


@triton.jit
def _forward(gate_up, y, gate_up_row, y_row, I: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tl.cdiv(I, BLOCK)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(I, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    dtype = y.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    gate = tl.load(gate_up + row * gate_up_row + column, mask=inside, other=0.0).to(wide)
    up = tl.load(gate_up + row * gate_up_row + I + column, mask=inside, other=0.0).to(wide)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(wide)
    tl.store(y + row * y_row + column, silu * up, mask=inside)


@triton.jit
def _backward(
    dy, gate_up, dgate_up, y, dy_row, gate_up_row, I: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // tl.cdiv(I, BLOCK)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(I, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    dtype = dgate_up.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    d = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(wide)
    gate = tl.load(gate_up + row * gate_up_row + column, mask=inside, other=0.0).to(wide)
    up = tl.load(gate_up + row * gate_up_row + I + column, mask=inside, other=0.0).to(wide)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = (gate * sigmoid).to(dtype).to(wide)
    tl.store(dgate_up + row * 2 * I + column, d * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(dgate_up + row * 2 * I + I + column, d * silu, mask=inside)
    if PRODUCT:
        tl.store(y + row * I + column, silu * up, mask=inside)


def _sizes(inner: int) -> dict[str, int]:
    block = min(1024, triton.next_power_of_2(inner))
    return {"I": inner, "BLOCK": block, "num_warps": max(block // 256, 1)}


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    swiglu_into(gate_up, y)
    return y


def swiglu_into(gate_up_TI: Tensor, out_TI: Tensor) -> None:
    """Writes `swiglu` into out [T, I], whose rows may lie any distance apart."""
    gate_up_TI, sizes = rows(gate_up_TI), _sizes(out_TI.shape[1])
    grid = (len(out_TI) * triton.cdiv(out_TI.shape[1], sizes["BLOCK"]),)
    _forward[grid](gate_up_TI, out_TI, gate_up_TI.stride(0), out_TI.stride(0), **sizes)


def _swiglu_backward_triton(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    dgate_up, y = _like_backward(dy, gate_up, product)
    dy, gate_up, sizes = rows(dy), rows(gate_up), _sizes(dy.shape[1])
    grid = (len(dy) * triton.cdiv(dy.shape[1], sizes["BLOCK"]),)
    _backward[grid](dy, gate_up, dgate_up, y, dy.stride(0), gate_up.stride(0), PRODUCT=product, **sizes)
    return dgate_up, y


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).contiguous()


def _swiglu_backward_torch(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    dgate_up, y = _like_backward(dy, gate_up, product)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    silu = F.silu(gate)
    torch.mul(dy, silu, out=dup)
    if product:
        torch.mul(silu, up, out=y)
    return dgate_up, y


# ------------------------------------------------------------------------------------------- operators and autograd


def _like_backward(dy: Tensor, gate_up: Tensor, product: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dy.shape if product else 0)


_swiglu = operator(
    "swiglu(Tensor gate_up) -> Tensor",
    cuda=_swiglu_triton,
    cpu=_swiglu_torch,
    fake=lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
# the product is what the forward returned, made again while gate and up are at hand
swiglu_backward = operator(
    "swiglu_backward(Tensor dy, Tensor gate_up, bool product) -> (Tensor, Tensor)",
    cuda=_swiglu_backward_triton,
    cpu=_swiglu_backward_torch,
    fake=_like_backward,
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
    """`swiglu_definition`."""
    return _swiglu_torch(gate_up_TI) if can_skip_dispatch(gate_up_TI) else _SwiGLU.apply(gate_up_TI)
