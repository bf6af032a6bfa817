"""The last projection and the cross-entropy of its logits, in chunks of rows: the whole logits matrix never exists.

The gradient of the hidden states is computed in forward, from each chunk's logits (as in Liger-Kernel's fused linear
cross-entropy, arXiv:2410.10989), so backward only scales its rows. The gradient of a trained weight is a sum over rows,
weighted by the gradient of each row's loss, so backward computes the logits again; a frozen weight costs nothing.

Axes: M rows (tokens that have a target), H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import accumulate_dtype, operator

# Rows of a chunk. On CUDA, 1024 rows fill 132 processors in both products: 7.8 waves for logits, 1 for gradients.
CHUNK_ROWS = {"cuda": 1024, "cpu": 256}
# Rows of a chunk whose logits a CPU reads several times before it goes on to the next: what they take in fp32 fits its
# cache.
CACHED_ROWS = 64
# Logits that a program holds in registers, 16 a thread. Three programs fit a processor: one computes while others load.
MAX_BLOCK_V = 8192


def linear_cross_entropy_definition(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """The cross-entropy of each row, -log softmax(x W^T)[target].

    Args:
        x_MH: hidden states [M, H].
        weight_VH: the head's weight [V, H] in x's dtype.
        targets_M: token ids [M], int64, all valid: the caller leaves out rows without a target.

    Returns:
        Losses [M] in fp32 (fp64 for fp64).
    """
    logits_MV = F.linear(x_MH, weight_VH)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return F.cross_entropy(logits_MV, targets_M, reduction="none")


def linear_entropy_definition(x_MH: Tensor, weight_VH: Tensor) -> Tensor:
    """The entropy [M] of each row's distribution over the vocabulary, -sum p log p in nats, in fp32 (fp64 for fp64)."""
    logits_MV = F.linear(x_MH, weight_VH)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return torch.distributions.Categorical(logits=logits_MV).entropy()


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    entropies_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program a row, in two passes: the second finds the row's 64 KiB of bf16 in the processor's own cache.
    # What follows the V logits of a row is -inf.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * STRIDE
    target = tl.load(targets_ptr + row)
    dtype = logits_ptr.dtype.element_ty
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    # Loaded before the first reduction, which synchronises the threads, and so before any thread overwrites the logit.
    # An invalid target makes the loss NaN.
    in_vocabulary = (target >= 0) & (target < V)
    target_logit = tl.load(logits_ptr + target, mask=in_vocabulary, other=float("nan")).to(acc_dtype)
    # Processors compute powers of two: 2^(z log2(e) - max log2(e)) is one multiply-add and one power. Both passes
    # use the same rounded maximum, whose error cancels in the softmax.
    log2_e = tl.full([], 1.4426950408889634, acc_dtype)
    row_max = tl.full([], -float("inf"), acc_dtype)
    row_sum = tl.zeros([], acc_dtype)
    # of the logits, weighted as row_sum's terms
    weighted_sum = tl.zeros([], acc_dtype)
    for start in range(0, STRIDE, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + column, mask=column < STRIDE, other=-float("inf")).to(acc_dtype)
        new_max = tl.maximum(row_max, tl.max(logits, 0) * log2_e)
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits * log2_e - new_max), 0)
        if ENTROPY:
            # what follows the V logits would be 0 times infinity
            finite = tl.where(logits > -float("inf"), logits, 0.0)
            weighted = tl.exp2(logits * log2_e - new_max) * finite
            weighted_sum = weighted_sum * tl.exp2(row_max - new_max) + tl.sum(weighted, 0)
        row_max = new_max
    log_sum = (row_max + tl.log2(row_sum)) / log2_e
    tl.store(losses_ptr + row, log_sum - target_logit)
    if ENTROPY:
        tl.store(entropies_ptr + row, log_sum - weighted_sum / row_sum)
    if GRADIENT:
        share = 1.0 / row_sum
        # the target's own is softmax - 1 in fp32, rounded once: it cancels badly in bf16
        target_gradient = tl.exp2(target_logit * log2_e - row_max) * share - 1.0
        for start in range(0, STRIDE, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + column, mask=column < STRIDE, other=-float("inf")).to(acc_dtype)
            tl.store(logits_ptr + column, tl.exp2(logits * log2_e - row_max) * share, mask=column < STRIDE)
        # all threads have stored the row
        tl.debug_barrier()
        # loaded again rather than kept in registers, which are full
        target = tl.load(targets_ptr + row)
        tl.store(logits_ptr + target, target_gradient, mask=(target >= 0) & (target < V))


def _cross_entropy_triton(
    logits: Tensor, targets: Tensor, losses: Tensor, entropies: Tensor | None, gradient: bool
) -> None:
    # in fp16 the larger block spills on sm_100
    largest = MAX_BLOCK_V // 2 if logits.dtype == torch.float16 else MAX_BLOCK_V
    block = min(triton.next_power_of_2(logits.stride(0)), largest)
    constants = {
        "V": logits.shape[1],
        "STRIDE": logits.stride(0),
        "GRADIENT": gradient,
        "ENTROPY": entropies is not None,
        "BLOCK_V": block,
        "num_warps": max(block // 512, 1),
    }
    _cross_entropy_kernel[(len(logits),)](logits, targets.contiguous(), losses, entropies, **constants)


def _aligned_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in rows of a multiple of 8 elements, the rest of them -inf: each begins where 16 bytes can be loaded at
    once.
    """
    vocabulary = len(weight)
    rows = x.new_empty(len(x), triton.cdiv(vocabulary, 8) * 8)
    rows[:, vocabulary:].fill_(-torch.inf)
    return torch.mm(x, weight.t(), out=rows[:, :vocabulary])


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _cross_entropy_torch(
    logits: Tensor, targets: Tensor, losses: Tensor, entropies: Tensor | None, gradient: bool
) -> None:
    for start in range(0, len(logits), CACHED_ROWS):
        rows = slice(start, start + CACHED_ROWS)
        targets_R1 = targets[rows, None]
        z = logits[rows].to(losses.dtype, copy=True)
        target_R1 = z.gather(1, targets_R1)
        # torch's log_softmax sums a row in order, and loses a digit; its logsumexp makes two more matrices like z
        highest_R1 = z.amax(1, keepdim=True)
        z.sub_(highest_R1)
        e = z.exp_() if entropies is None else z.exp()
        sum_R1 = e.sum(1, keepdim=True)
        log_sum_R1 = sum_R1.log()
        losses[rows] = (log_sum_R1 + highest_R1 - target_R1)[:, 0]
        if entropies is not None:
            entropies[rows] = log_sum_R1[:, 0] - torch.linalg.vecdot(z, e) / sum_R1[:, 0]
        if gradient:
            logits[rows] = e.scatter_add_(1, targets_R1, -sum_R1).mul_(1 / sum_R1)


# ------------------------------------------------------------------------------------------- operators and autograd

# Both loops take a function that computes a chunk's logits, and one of (logits, targets, losses, entropies, gradient)
# that writes its losses, its entropies where they are not None, and, if `gradient` is true, overwrites its logits by
# the gradient of each row's own loss.


def _forward(
    linear,
    cross_entropy,
    chunk_rows: int,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    x_gradient: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [M]; the gradient of each row's own loss with respect to its x, [M, H]; and entropies [M]. [0] what is not
    wanted.
    """
    losses = x.new_empty(len(x), dtype=accumulate_dtype(x.dtype))
    entropies = torch.empty_like(losses if entropy else losses[:0])
    dx = torch.empty_like(x) if x_gradient else x.new_empty(0)
    for start in range(0, len(x), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = linear(x[rows], weight)
        cross_entropy(logits, targets[rows], losses[rows], entropies[rows] if entropy else None, x_gradient)
        if x_gradient:
            torch.mm(logits, weight, out=dx[rows])
        # before the next chunk is allocated
        del logits
    return losses, dx, entropies


def _weight_gradient(
    linear, cross_entropy, chunk_rows: int, dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    """The weight's gradient [V, H], summed in fp32, from the gradient of each row's loss [M]."""
    dweight = torch.zeros_like(weight, dtype=dlosses.dtype)
    losses = torch.empty_like(dlosses)
    for start in range(0, len(x), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = linear(x[rows], weight)
        cross_entropy(logits, targets[rows], losses[rows], None, True)
        # scales x, not the logits' gradients: H numbers a row, not V
        dweight += logits.t() @ (x[rows] * dlosses[rows, None]).to(x.dtype)
        del logits
    return dweight.to(weight.dtype)


_linear_cross_entropy = operator(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, bool x_gradient, bool entropy)"
    " -> (Tensor, Tensor, Tensor)",
    cuda=lambda *arguments: _forward(_aligned_logits, _cross_entropy_triton, CHUNK_ROWS["cuda"], *arguments),
    cpu=lambda *arguments: _forward(F.linear, _cross_entropy_torch, CHUNK_ROWS["cpu"], *arguments),
    fake=lambda x, weight, targets, x_gradient, entropy: (
        x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)),
        torch.empty_like(x) if x_gradient else x.new_empty(0),
        x.new_empty(x.shape[0] if entropy else 0, dtype=accumulate_dtype(x.dtype)),
    ),
)
_linear_cross_entropy_weight_gradient = operator(
    "linear_cross_entropy_weight_gradient(Tensor dlosses, Tensor x, Tensor weight, Tensor targets) -> Tensor",
    cuda=lambda *arguments: _weight_gradient(_aligned_logits, _cross_entropy_triton, CHUNK_ROWS["cuda"], *arguments),
    cpu=lambda *arguments: _weight_gradient(F.linear, _cross_entropy_torch, CHUNK_ROWS["cpu"], *arguments),
    fake=lambda dlosses, x, weight, targets: torch.empty_like(weight),
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of x from the forward pass, and x itself only for a trained weight."""

    @staticmethod
    def forward(ctx, x, weight, targets, entropy):
        x_gradient, weight_gradient, *_ = ctx.needs_input_grad
        losses, dx, entropies = _linear_cross_entropy(x, weight, targets, x_gradient, entropy)
        ctx.save_for_backward(dx, *((x, weight, targets) if weight_gradient else ()))
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses, _):
        x_gradient, weight_gradient, *_ = ctx.needs_input_grad
        dx, *inputs = ctx.saved_tensors
        dweight = _linear_cross_entropy_weight_gradient(dlosses, *inputs) if weight_gradient else None
        # dlosses is fp32: the product is rounded once
        dx = torch.mul(dx, dlosses[:, None], out=torch.empty_like(dx)) if x_gradient else None
        return dx, dweight, None, None


def linear_cross_entropy(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """`linear_cross_entropy_definition`, holding one chunk of logits at a time and, until backward, the gradient of x.

    A trained weight takes one more product in backward, to compute the logits again, and its gradient's sum in fp32.
    """
    return _LinearCrossEntropy.apply(x_MH, weight_VH, targets_M, False)[0]


def linear_cross_entropy_and_entropy(x_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and by the same pass over the logits `linear_entropy_definition`, without gradient."""
    return _LinearCrossEntropy.apply(x_MH, weight_VH, targets_M, True)
