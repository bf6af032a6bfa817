"""SwiGLU on the fused [gate | up] buffer. Source: Shazeer 2020 (arXiv:2002.05202); rounding order as in transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_definition(gate_up_TI: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu(gate), rounded to the buffer's dtype, times up."""
    gate, up = gate_up_TI.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only the fused buffer, and writes its gradient into one buffer of the same shape."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        torch.mul(dy, F.silu(gate), out=dup)
        return dgate_up


def swiglu(gate_up_TI: Tensor) -> Tensor:
    """`swiglu_definition`."""
    return _SwiGLU.apply(gate_up_TI)
