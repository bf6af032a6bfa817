"""A matrix product with a low-rank one added before the result is written: x w^T + s b^T, in Triton.

After LoRAFusion's fused product (arXiv:2510.00206, section 4): the low-rank part is the last of the loop over depth.
Axes: M rows, N columns, K depth, R rank.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot
from minorca_kernels.operator import as_rows, compute_capability


@triton.jit
def _matmul_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # programs in groups of GROUP_M row blocks, which share their columns of w while those are in cache
    pid = tl.program_id(0)
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_pid_n)
    group_size = tl.minimum(num_pid_m - group * GROUP_M, GROUP_M)
    pid_in_group = pid % (GROUP_M * num_pid_n)
    offs_m = ((group * GROUP_M + pid_in_group % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid_in_group // group_size * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None]
    offs_block_k = tl.arange(0, BLOCK_K)
    acc_dtype = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], acc_dtype)
    for start in range(0, K, BLOCK_K):
        offs_k = start + offs_block_k
        mask_k = tl.full([BLOCK_K], 1, tl.int1) if EVEN_K else offs_k < K
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k, mask=mask_m & mask_k, other=0.0)
        w_ptrs = w_ptr + offs_n[None] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
        w = tl.load(w_ptrs, mask=mask_n & mask_k[:, None], other=0.0)
        acc = add_dot(acc, x, w)
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + offs_m[:, None] * R + offs_r, mask=mask_m & (offs_r < R), other=0.0)
        b_ptrs = b_ptr + offs_n[None] * stride_bn + offs_r[:, None] * stride_br
        b = tl.load(b_ptrs, mask=mask_n & (offs_r < R)[:, None], other=0.0)
        acc = add_dot(acc, s, b)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n, acc, mask=mask_m & mask_n)


def low_rank_matmul(x_MK: Tensor, w_NK: Tensor, s_MR: Tensor, b_NR: Tensor) -> Tensor:
    """x [M, K], w [N, K], s [M, R], b [N, R] -> x w^T + s b^T [M, N], summed in fp32 (fp64 for fp64).

    w and b may be transposed.
    """
    m, k = x_MK.shape
    n, rank = len(w_NK), s_MR.shape[1]
    x_MK = as_rows(x_MK)
    y_MN = x_MK.new_empty(m, n)
    block_m, block_n, block_k = (128, 256, 64) if x_MK.element_size() == 2 else (64, 64, 32)
    if compute_capability() >= 120:
        # larger ones spill registers
        block_n = min(block_n, 128)
    constants = {
        "R": rank,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": min(max(triton.next_power_of_2(rank), 16), block_k),
        "GROUP_M": 8,
        "EVEN_K": k % block_k == 0,
        "num_warps": 8,
        "num_stages": 3,
    }
    strides = (x_MK.stride(0), *w_NK.stride(), *b_NR.stride())
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    _matmul_kernel[grid](x_MK, w_NK, s_MR.contiguous(), b_NR, y_MN, m, n, k, *strides, **constants)
    return y_MN
