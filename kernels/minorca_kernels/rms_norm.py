"""Root-mean-square normalisation in the Llama casting order: statistics in fp32, cast, then the weight.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467); the order is that of transformers' LlamaRMSNorm.
"""

import torch
from torch import Tensor


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H] in x's dtype; fp64 stays fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row; the normalised rows are computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy.to(rstd.dtype) * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = dy.to(rstd.dtype) * weight
        # d x = rstd (s - n mean(s n)): the normalisation takes out what lies along n
        mean = torch.linalg.vecdot(scaled, normed)[..., None] / x.shape[-1]
        return scaled.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_definition`; no weight gradient is computed where the weight is frozen."""
    return _RMSNorm.apply(x, weight, eps)
