"""Rotary position embedding on queries and keys, half-split layout (the one of Hugging Face's weights), in fp32.

Source: Su et al. 2021 (arXiv:2104.09864). Positions are given, so packed documents may each start again at 0.
"""

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [T] (integers) -> cos and sin, each [T, D/2] fp32, of position times theta^(-2i/D)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.int64).float() / head_dim
    angles = positions_T.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    # in the tables' precision (fp32), cast once: bf16 angles lose positions past a few hundred
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)


def rope_definition(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates each half-split pair (i, i + D/2) of q [T, Hq, D] and k [T, Hkv, D]; tables [T, D/2] from `rope_tables`."""
    return _rotate(q_THD, cos_TD, sin_TD), _rotate(k_TKD, cos_TD, sin_TD)


class _Rope(torch.autograd.Function):
    """A rotation's derivative is the inverse rotation, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def rope(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_definition`, out of place."""
    return _Rope.apply(q_THD, k_TKD, cos_TD, sin_TD)
