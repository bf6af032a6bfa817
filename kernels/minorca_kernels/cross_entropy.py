"""The last projection and the cross-entropy of its logits, in chunks of rows: the whole logits matrix never exists.

The gradient of the hidden rows is made while the chunk's logits are at hand (as in Liger-Kernel's fused linear
cross-entropy, arXiv:2410.10989), so backward only scales it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # rows; 256 x 32768 fp32 logits are 32 MB


def linear_cross_entropy_definition(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """x [M, H], weight [V, H], targets [M] int64 -> the sum over rows of -log softmax(x W^T)[target], fp32 (fp64 for fp64)."""
    logits = F.linear(x_MH, weight_VH)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_M, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets):
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for x_c, targets_c, dx_c in zip(x.split(CHUNK), targets.split(CHUNK), x.split(CHUNK) if dx is None else dx.split(CHUNK)):
            logits = F.linear(x_c, weight).to(wide)
            lse = torch.logsumexp(logits, dim=-1)
            loss += (lse - logits.gather(1, targets_c[:, None])[:, 0]).sum()
            if dx is None and dweight is None:
                continue
            # softmax - 1 at the target, in fp32, rounded once: (p - 1) cancels badly in bf16
            dlogits = logits.sub_(lse[:, None]).exp_()
            dlogits.scatter_add_(1, targets_c[:, None], dlogits.new_full((len(targets_c), 1), -1.0))
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                torch.mm(dlogits, weight, out=dx_c)
            if dweight is not None:
                dweight += dlogits.t() @ x_c
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else (dx * dloss.expand(1)).to(dx.dtype)  # not 0-dim, which would be rounded to dx's dtype first
        dweight = None if dweight is None else (dweight * dloss).to(ctx.weight_dtype)
        return dx, dweight, None


def linear_cross_entropy(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """`linear_cross_entropy_definition`; peak memory is one chunk of logits, whatever M is."""
    return _LinearCrossEntropy.apply(x_MH, weight_VH, targets_M)
