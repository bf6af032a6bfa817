"""Both products that an adapter's gradients need of the output gradient, which is the largest tensor of a backward pass: one
pass over it, no atomics.

Splitting the rows among programs and summing their shares afterwards makes LoRAFusion's single pass (arXiv:2510.00206,
section 4) deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import accumulate_dtype, as_rows, multiprocessor_count


@triton.jit
def _pass(
    dy,
    b,
    inner,
    ds_shares,
    db_shares,
    tokens,
    columns,
    columns_a_program,
    dy_row,
    inner_row,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = block * BM + tl.arange(0, BM)
    rank = tl.arange(0, PADDED)
    wide: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    here = (token < tokens)[:, None] & (rank < R)
    s = tl.load(inner + token[:, None] * inner_row + rank, mask=here, other=0.0)
    ds = tl.zeros([BM, PADDED], wide)
    for start in range(part * columns_a_program, tl.minimum((part + 1) * columns_a_program, columns), BN):
        column = start + tl.arange(0, BN)
        d = tl.load(
            dy + token[:, None] * dy_row + column, mask=(token < tokens)[:, None] & (column < columns), other=0.0
        )
        b_tile = tl.load(b + column[:, None] * R + rank, mask=(column < columns)[:, None] & (rank < R), other=0.0)
        ds = add_dot(ds, d, b_tile)
        db = dot(tl.trans(d), s, wide)
        tl.store(
            db_shares + (block * columns + column[:, None]) * R + rank,
            db,
            mask=(column < columns)[:, None] & (rank < R),
        )
    tl.store(ds_shares + (part * tokens + token[:, None]) * R + rank, ds, mask=here)


def low_rank_gradients(dy_TN: Tensor, b_NR: Tensor, inner_TR: Tensor) -> tuple[Tensor, Tensor]:
    """dy [T, N], B [N, R], S = drop(x) A^T [T, R] -> dy B [T, R] and dy^T S [N, R], both fp32 (fp64 for fp64), unscaled."""
    (tokens, columns), rank = dy_TN.shape, b_NR.shape[1]
    padded = max(triton.next_power_of_2(rank), 16)
    # a tile of 32 KiB; for every number read, R / BM + R / columns_a_program more are written, and read again
    bm, bn = max(1024 * 16 // dy_TN.element_size() // max(padded, 32), 16), 64
    blocks = triton.cdiv(tokens, bm)
    parts = min(triton.cdiv(columns, bn), triton.cdiv(2 * multiprocessor_count(dy_TN.device), blocks))
    columns_a_program = triton.cdiv(triton.cdiv(columns, bn), parts) * bn
    parts = triton.cdiv(columns, columns_a_program)
    ds_shares = dy_TN.new_empty(parts, tokens, rank, dtype=accumulate_dtype(dy_TN.dtype))
    db_shares = ds_shares.new_empty(blocks, columns, rank)
    dy_TN, inner_TR = as_rows(dy_TN), as_rows(inner_TR)
    steps = dy_TN.stride(0), inner_TR.stride(0)
    sizes = {"R": rank, "PADDED": padded, "BM": bm, "BN": bn, "num_warps": 8, "num_stages": 2}
    _pass[(blocks, parts)](
        dy_TN, b_NR.contiguous(), inner_TR, ds_shares, db_shares, tokens, columns, columns_a_program, *steps, **sizes
    )
    return ds_shares.sum(0), db_shares.sum(0)
