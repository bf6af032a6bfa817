"""The last projection and the cross-entropy of its logits, in chunks of rows: the whole logits matrix never exists.

The gradient of the hidden rows is made while the chunk's logits are at hand (as in Liger-Kernel's fused linear
cross-entropy, arXiv:2410.10989), so backward only scales it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import operator, wide

# rows; on CUDA, 1024 fill its processors in both products of a chunk (of 132: 7.8 waves of logits, 1 of gradients)
CHUNK = {"cuda": 1024, "cpu": 256}
LONGEST = 8192  # logits a pass holds in registers, 16 a thread: three programs share a processor, and one computes while others load


def linear_cross_entropy_definition(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """x [M, H], weight [V, H], targets [M] int64 -> the sum over rows of -log softmax(x W^T)[target], fp32 (fp64 for fp64).

    Every target is an id: rows without one are left out by the caller.
    """
    logits = F.linear(x_MH, weight_VH)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_M, reduction="sum")


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _softmax(logits, targets, losses, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    # one row a program, in two passes: 64 KiB of bf16 are still in the processor's own cache in the second
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    dtype = logits.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    # all threads have it before the first maximum, and so before one overwrites it; a target that is none makes the loss NaN
    aim = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(wide)
    top = tl.full([], -float("inf"), wide)
    total = tl.zeros([], wide)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < V, other=-float("inf")).to(wide)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    if GRADIENT:
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + column, mask=column < V, other=-float("inf")).to(wide)
            # softmax - 1 at the target, in fp32, rounded once: (p - 1) cancels badly in bf16
            tl.store(logits + column, tl.exp(z - top) / total - tl.where(column == target, 1.0, 0.0), mask=column < V)
    tl.store(losses + row, top + tl.log(total) - aim)


def _softmax_triton(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    sizes = {"V": logits.shape[1], "BLOCK": min(triton.next_power_of_2(logits.shape[1]), LONGEST)}
    warps = max(sizes["BLOCK"] // 512, 1)
    _softmax[(len(logits),)](logits, targets.contiguous(), losses, GRADIENT=gradient, **sizes, num_warps=warps)


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _softmax_torch(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    z = logits.to(losses.dtype, copy=True)
    lse = torch.logsumexp(z, dim=-1)
    torch.sub(lse, z.gather(1, targets[:, None])[:, 0], out=losses)
    if gradient:
        z.sub_(lse[:, None]).exp_().scatter_add_(1, targets[:, None], z.new_full((len(z), 1), -1.0))
        logits.copy_(z)


# ------------------------------------------------------------------------------------------- operators and autograd


def _chunked(
    softmax, chunk, x: Tensor, weight: Tensor, targets: Tensor, x_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, ...]:
    """`softmax` takes a chunk of logits to losses and, in place, to gradients."""
    losses = x.new_empty(len(x), dtype=wide(x.dtype))
    dx = torch.empty_like(x) if x_gradient else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=losses.dtype) if weight_gradient else weight.new_empty(0)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        logits = F.linear(x[part], weight)
        softmax(logits, targets[part], losses[part], x_gradient or weight_gradient)
        if x_gradient:
            torch.mm(logits, weight, out=dx[part])
        if weight_gradient:
            dweight += logits.t() @ x[part]
    return losses.sum(), dx, dweight


def _shapes(
    x: Tensor, weight: Tensor, targets: Tensor, x_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if x_gradient else x.new_empty(0)
    dweight = torch.empty_like(weight, dtype=wide(x.dtype)) if weight_gradient else weight.new_empty(0)
    return x.new_empty((), dtype=wide(x.dtype)), dx, dweight


_linear_cross_entropy = operator(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, bool x_gradient, bool weight_gradient) -> (Tensor, Tensor, Tensor)",
    cuda=lambda *arguments: _chunked(_softmax_triton, CHUNK["cuda"], *arguments),
    cpu=lambda *arguments: _chunked(_softmax_torch, CHUNK["cpu"], *arguments),
    fake=_shapes,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, and only scaled here."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        loss, dx, dweight = _linear_cross_entropy(x, weight, targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        # dloss as a vector: a tensor of no axes would be rounded to dx's dtype first
        dx = torch.mul(dx, dloss.expand(1), out=torch.empty_like(dx)) if ctx.needs_input_grad[0] else None
        return dx, (dweight * dloss).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None, None


def linear_cross_entropy(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """`linear_cross_entropy_definition`; beside the gradient of x, memory is one chunk of logits, whatever M is."""
    return _LinearCrossEntropy.apply(x_MH, weight_VH, targets_M)
