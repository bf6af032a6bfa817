"""A matrix product with a low-rank one added before the result is written: x w^T + s b^T, in Triton.

After LoRAFusion's fused product (arXiv:2510.00206, section 4): the low-rank part is the last of the loop over depth.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot
from minorca_kernels.operator import as_rows


@triton.jit
def _product(
    x,
    w,
    s,
    b,
    y,
    m,
    n,
    depth,
    x_row,
    w_row,
    w_column,
    b_row,
    b_column,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    # programs in groups of GROUP row blocks, which share their columns of w while those are in cache
    program, row_blocks, column_blocks = tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = program // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * column_blocks)
    row = ((group * GROUP + within % height) * BM + tl.arange(0, BM)).to(tl.int64)
    column = (within // height * BN + tl.arange(0, BN)).to(tl.int64)
    inside_m, inside_n, k = (row < m)[:, None], (column < n)[None], tl.arange(0, BK)
    wide = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BM, BN], wide)
    for start in range(0, depth, BK):
        at = start + k
        inside_k = tl.full([BK], 1, tl.int1) if EVEN else at < depth
        x_tile = tl.load(x + row[:, None] * x_row + at, mask=inside_m & inside_k, other=0.0)
        w_tile = tl.load(
            w + column[None] * w_row + at[:, None].to(tl.int64) * w_column, mask=inside_n & inside_k[:, None], other=0.0
        )
        sums = add_dot(sums, x_tile, w_tile)
    for start in range(0, R, BR):
        rank = start + tl.arange(0, BR)
        s_tile = tl.load(s + row[:, None] * R + rank, mask=inside_m & (rank < R), other=0.0)
        b_tile = tl.load(
            b + column[None] * b_row + rank[:, None] * b_column, mask=inside_n & (rank < R)[:, None], other=0.0
        )
        sums = add_dot(sums, s_tile, b_tile)
    tl.store(y + row[:, None] * n + column, sums, mask=inside_m & inside_n)


def low_rank_matmul(x_MK: Tensor, w_NK: Tensor, s_MR: Tensor, b_NR: Tensor) -> Tensor:
    """x [M, K], w [N, K], s [M, R], b [N, R] -> x w^T + s b^T [M, N], summed in fp32 (fp64 for fp64). w and b may be transposed."""
    (m, depth), n, rank = x_MK.shape, w_NK.shape[0], s_MR.shape[1]
    x_MK, y = as_rows(x_MK), x_MK.new_empty(m, n)
    bm, bn, bk = (128, 256, 64) if x_MK.element_size() == 2 else (64, 64, 32)
    steps = x_MK.stride(0), *w_NK.stride(), *b_NR.stride()
    br = min(max(triton.next_power_of_2(rank), 16), bk)
    sizes = {"R": rank, "BM": bm, "BN": bn, "BK": bk, "BR": br, "GROUP": 8, "EVEN": depth % bk == 0}
    arguments = x_MK, w_NK, s_MR.contiguous(), b_NR, y, m, n, depth, *steps
    _product[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](*arguments, **sizes, num_warps=8, num_stages=3)
    return y
