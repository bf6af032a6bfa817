"""The two products of an adapter's gradients with the output gradient, which is the largest tensor of a backward pass:
one pass over it, without atomics.

Splitting the rows among programs and summing their shares afterwards makes LoRAFusion's single pass (arXiv:2510.00206,
section 4) deterministic. Axes: T tokens, N columns, R rank.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import accumulate_dtype, as_rows, multiprocessor_count


@triton.jit
def _gradients_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    T,
    N,
    columns_per_program,
    stride_dyt,
    stride_st,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, BLOCK_R)
    acc_dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    mask_tr = (offs_t < T)[:, None] & (offs_r < R)
    s = tl.load(s_ptr + offs_t[:, None] * stride_st + offs_r, mask=mask_tr, other=0.0)
    ds = tl.zeros([BLOCK_T, BLOCK_R], acc_dtype)
    for start in range(pid_n * columns_per_program, tl.minimum((pid_n + 1) * columns_per_program, N), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_nr = (offs_n < N)[:, None] & (offs_r < R)
        dy_ptrs = dy_ptr + offs_t[:, None] * stride_dyt + offs_n
        dy = tl.load(dy_ptrs, mask=(offs_t < T)[:, None] & (offs_n < N), other=0.0)
        b = tl.load(b_ptr + offs_n[:, None] * R + offs_r, mask=mask_nr, other=0.0)
        ds = add_dot(ds, dy, b)
        db = dot(tl.trans(dy), s, acc_dtype)
        tl.store(db_ptr + (pid_t * N + offs_n[:, None]) * R + offs_r, db, mask=mask_nr)
    tl.store(ds_ptr + (pid_n * T + offs_t[:, None]) * R + offs_r, ds, mask=mask_tr)


def low_rank_gradients(dy_TN: Tensor, b_NR: Tensor, s_TR: Tensor) -> tuple[Tensor, Tensor]:
    """dy [T, N], B [N, R], S = drop(x) A^T [T, R] -> dy B [T, R] and dy^T S [N, R], both fp32 (fp64 for fp64) and
    unscaled.
    """
    tokens, columns = dy_TN.shape
    rank = b_NR.shape[1]
    block_r = max(triton.next_power_of_2(rank), 16)
    # a tile of 32 KiB; for every number read, R / BLOCK_T + R / columns_per_program more are written, and read again
    block_t = max(1024 * 16 // dy_TN.element_size() // max(block_r, 32), 16)
    block_n = 64
    programs_t = triton.cdiv(tokens, block_t)
    wanted = triton.cdiv(2 * multiprocessor_count(dy_TN.device), programs_t)
    programs_n = min(triton.cdiv(columns, block_n), wanted)
    columns_per_program = triton.cdiv(triton.cdiv(columns, block_n), programs_n) * block_n
    programs_n = triton.cdiv(columns, columns_per_program)
    # each program's share of the sums
    ds = dy_TN.new_empty(programs_n, tokens, rank, dtype=accumulate_dtype(dy_TN.dtype))
    db = ds.new_empty(programs_t, columns, rank)
    dy_TN = as_rows(dy_TN)
    s_TR = as_rows(s_TR)
    constants = {
        "R": rank,
        "BLOCK_R": block_r,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "num_warps": 8,
        "num_stages": 2,
    }
    strides = (dy_TN.stride(0), s_TR.stride(0))
    _gradients_kernel[(programs_t, programs_n)](
        dy_TN, b_NR.contiguous(), s_TR, ds, db, tokens, columns, columns_per_program, *strides, **constants
    )
    return ds.sum(0), db.sum(0)
