"""The repetition penalty of logits (Keskar et al. 2019, arXiv:1909.05858).

Axes: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.draw import BLOCK, load_columns
from minorca_kernels.operator import operator, uses_triton


def repetition_penalty_definition(logits_NV: Tensor, seen_NV: Tensor, penalty_N: Tensor) -> Tensor:
    """Divides positive logits and multiplies negative ones where `seen`.

    Args:
        logits_NV: [N, V], any dtype.
        seen_NV: bool [N, V].
        penalty_N: fp32 [N]; 1 changes nothing.

    Returns:
        [N, V] fp32.
    """
    logits_NV = logits_NV.float()
    penalty_N1 = penalty_N[:, None]
    penalized_NV = torch.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    return torch.where(seen_NV, penalized_NV, logits_NV)


@triton.jit
def _repetition_penalty_kernel(
    logits_ptr,
    seen_ptr,
    penalty_ptr,
    out_ptr,
    V,
    stride_logits,
    stride_seen,
    stride_penalty,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    x = load_columns(logits_ptr + n * stride_logits, start, V, 0.0, BLOCK).to(tl.float32)
    seen = load_columns(seen_ptr + n * stride_seen, start, V, 0, BLOCK)
    penalty = tl.load(penalty_ptr + n * stride_penalty)
    x = tl.where(seen != 0, tl.where(x > 0, x / penalty, x * penalty), x)
    column = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + n * V + column, x, mask=column < V)


def _repetition_penalty_triton(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    out = _empty(logits, seen, penalty)
    logits, seen = (t if t.stride(1) == 1 else t.contiguous() for t in (logits, seen))
    rows, size = logits.shape
    _repetition_penalty_kernel[triton.cdiv(size, BLOCK), rows](
        logits, seen, penalty, out, size, *(t.stride(0) for t in (logits, seen, penalty)), BLOCK=BLOCK, num_warps=8
    )
    return out


def _empty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    return penalty.new_empty(logits.shape)


_repetition_penalty = operator(
    "repetition_penalty(Tensor logits, Tensor seen, Tensor penalty) -> Tensor",
    cuda=_repetition_penalty_triton,
    cpu=repetition_penalty_definition,
    fake=_empty,
)


def repetition_penalty(logits_NV: Tensor, seen_NV: Tensor, penalty_N: Tensor) -> Tensor:
    """`repetition_penalty_definition`, in one kernel."""
    function = _repetition_penalty if uses_triton(logits_NV) else repetition_penalty_definition
    return function(logits_NV, seen_NV, penalty_N)
