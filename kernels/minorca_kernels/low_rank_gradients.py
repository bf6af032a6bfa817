"""The two products of an adapter's gradients with the output gradient, which is the largest tensor of a backward pass:
one pass over it, without atomics.

Splitting the rows among programs and summing their shares afterwards makes LoRAFusion's single pass (arXiv:2510.00206,
section 4) deterministic. The shares grow with the square of the rank, so high ranks take two matrix products instead.
Axes: T tokens, N columns, R rank.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import accumulate_dtype, as_rows, multiprocessor_count, uses_triton

# From this rank, reading dy twice costs less than writing and reading the shares.
MIN_RANK_PRODUCTS = 64
# By their shared memory, two programs run on a processor.
PROGRAMS_PER_PROCESSOR = 2
BLOCK_SUM = 512


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


@triton.jit
def _sum_block(
    parts_ptr, sum_ptr, block, parts, size, stride, R: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    parts_ptrs = parts_ptr + offs
    for _ in tl.range(0, parts, loop_unroll_factor=4):
        acc += tl.load(parts_ptrs, mask=offs < size, other=0.0)
        parts_ptrs += size
    tl.store(sum_ptr + offs // R * stride + offs % R, acc * tl.full([], SCALE, acc.dtype), mask=offs < size)


@triton.jit(do_not_specialize=["parts_s", "parts_b"])
def _sums_kernel(
    ds_parts_ptr,
    db_parts_ptr,
    ds_ptr,
    db_ptr,
    parts_s,
    parts_b,
    size_s,
    size_b,
    stride_dst,
    R: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # both sums in one launch: the first programs compute ds, the others db
    pid = tl.program_id(0)
    blocks_s = tl.cdiv(size_s, BLOCK)
    if pid < blocks_s:
        _sum_block(ds_parts_ptr, ds_ptr, pid, parts_s, size_s, stride_dst, R, SCALE, BLOCK)
    else:
        _sum_block(db_parts_ptr, db_ptr, pid - blocks_s, parts_b, size_b, R, R, SCALE, BLOCK)


def unrounded_product(x: Tensor, y: Tensor) -> Tensor:
    """x y in the dtype in which it is summed; without Triton it is rounded to that of x before."""
    dtype = accumulate_dtype(x.dtype)
    if x.is_cuda and x.dtype != dtype:
        return torch.mm(x, y, out_dtype=dtype)
    # the interpreter's tensors are on the CPU, which does not know out_dtype
    x, y = (x.to(dtype), y.to(dtype)) if uses_triton(x) else (x, y)
    return (x @ y).to(dtype)


def low_rank_gradients(dy_TN: Tensor, b_NR: Tensor, s_TR: Tensor, scale: float, ds_TR: Tensor) -> Tensor:
    """dy [T, N], B [N, R], S = drop(x) A^T [T, R] -> scale * dy^T S [N, R], and writes scale * dy B into ds [T, R].

    Both are summed and scaled in fp32 (fp64 for fp64), which is the dtype of the first; ds has any dtype, and its rows
    may lie apart.
    """
    of_rank = _matrix_products if b_NR.shape[1] >= MIN_RANK_PRODUCTS else _single_pass
    return of_rank(dy_TN, b_NR, s_TR, scale, ds_TR)


def _matrix_products(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    ds.addmm_(dy, b, beta=0, alpha=scale)
    return unrounded_product(dy.t(), s).mul_(scale)


def _single_pass(dy_TN: Tensor, b_NR: Tensor, s_TR: Tensor, scale: float, ds_TR: Tensor) -> Tensor:
    tokens, columns = dy_TN.shape
    rank = b_NR.shape[1]
    block_r = max(triton.next_power_of_2(rank), 16)
    # a tile of 32 KiB; for every number read, R / BLOCK_T + R / columns_per_program more are written, and read again
    block_t, block_n, warps = 1024 * 16 // dy_TN.element_size() // max(block_r, 32), 64, 8
    if dy_TN.element_size() > 2 and block_r > 16:
        # without tensor cores, products of larger tiles spill registers
        block_t, block_n, warps = 64, 1024 // block_r, 4
    programs_t = triton.cdiv(tokens, block_t)
    blocks_n = triton.cdiv(columns, block_n)
    blocks_per_program = _blocks_per_program(programs_t, blocks_n, rank, multiprocessor_count(dy_TN.device))
    programs_n = triton.cdiv(blocks_n, blocks_per_program)
    # each program's share of the sums
    ds_parts = dy_TN.new_empty(programs_n, tokens, rank, dtype=accumulate_dtype(dy_TN.dtype))
    db_parts = ds_parts.new_empty(programs_t, columns, rank)
    dy_TN = as_rows(dy_TN)
    s_TR = as_rows(s_TR)
    constants = {
        "R": rank,
        "BLOCK_R": block_r,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": 2,
    }
    sizes = (tokens, columns, blocks_per_program * block_n, dy_TN.stride(0), s_TR.stride(0))
    _gradients_kernel[(programs_t, programs_n)](dy_TN, b_NR.contiguous(), s_TR, ds_parts, db_parts, *sizes, **constants)
    db = db_parts.new_empty(columns, rank)
    sums = (ds_parts, db_parts, ds_TR, db, programs_n, programs_t, ds_TR.numel(), db.numel(), ds_TR.stride(0))
    grid = (triton.cdiv(ds_TR.numel(), BLOCK_SUM) + triton.cdiv(db.numel(), BLOCK_SUM),)
    _sums_kernel[grid](*sums, R=rank, SCALE=scale, BLOCK=BLOCK_SUM)
    return db


@functools.cache
def _blocks_per_program(programs_t: int, blocks_n: int, rank: int, multiprocessors: int) -> int:
    """How many blocks of columns a program takes, so that the grid fills whole waves of the GPU.

    A program also writes its share of ds, which is read again: in fp32 as many bytes as rank / 16 blocks of bf16.
    """

    def time(blocks: int) -> float:
        waves = triton.cdiv(programs_t * triton.cdiv(blocks_n, blocks), PROGRAMS_PER_PROCESSOR * multiprocessors)
        return waves * (blocks + rank / 16)

    return min(range(1, blocks_n + 1), key=time)
