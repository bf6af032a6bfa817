# Triton takes plain numbers for constexpr parameters.
# pyright: reportArgumentType=false
"""Causal attention over a flat batch. Documents and the window are given as one number a token: the first key it sees.
In a tree, a document whose beginning is shared by several branches, keys between that one and the query are hidden.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691): online softmax, and a backward from the saved log-sum-exp.
Neither direction uses atomics, so results repeat to the bit: one kernel writes dQ for its queries, another dK and dV
for its keys.

Axes: T queries, S keys, H query heads, K key heads (query head h reads key head h // (H // K)), G = H // K query heads
of a key head, D head size. The queries belong to the last T of S tokens. S > T where a prompt comes in chunks: forward
only.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import accumulate_dtype, compute_capability, operator

# Queries of a block on the CPU: in forward those that share a mask where a window is active, in backward those of one
# product. Larger blocks take fewer calls, and compute more scores that no query sees.
CPU_FORWARD_BLOCK = 256
CPU_BACKWARD_BLOCK = 256


def attention_definition(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, first_T: Tensor, tree_3T: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys. Query i, of token p = S - T + i, sees keys first[i] <= j <= p,
    without hidden_begin[i] <= j < hidden_end[i].

    Args:
        q_THD: queries [T, H, D].
        k_SKD: keys [S, K, D].
        v_SKD: values [S, K, D].
        first_T: the first key that each query sees, [T] int32, first[i] <= p; without a tree not decreasing.
        tree_3T: [3, T] int32, where S = T: hidden_begin and hidden_end, both first[i] where all keys are seen; and what
            only the kernels read, see `attention`.

    Returns:
        [T, H, D] in q's dtype; scores and softmax are in fp32 (fp64 for fp64).
    """
    dtype = accumulate_dtype(q_THD.dtype)
    group = q_THD.shape[1] // k_SKD.shape[1]
    token_S = torch.arange(len(k_SKD), device=q_THD.device)
    token_T = token_S[len(k_SKD) - len(q_THD) :]
    k_SHD, v_SHD = (t.repeat_interleave(group, 1).to(dtype) for t in (k_SKD, v_SKD))
    scores_HTS = torch.einsum("qhd,khd->hqk", q_THD.to(dtype), k_SHD) * q_THD.shape[-1] ** -0.5
    visible_TS = (first_T[:, None] <= token_S) & (token_S <= token_T[:, None])
    if tree_3T is not None:
        hidden_begin_T, hidden_end_T, _ = tree_3T
        visible_TS &= (token_S < hidden_begin_T[:, None]) | (hidden_end_T[:, None] <= token_S)
    weights_HTS = scores_HTS.masked_fill(~visible_TS, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights_HTS, v_SHD).to(q_THD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# A tile is BLOCK_M queries by BLOCK_N keys. A block of queries visits the tiles of which it sees anything, in two
# loops. The masked loop takes the partially visible tiles: `near` tiles at the beginning (a document's start or the
# window's edge), then, after a gap, those at the end (the diagonal). The other loop takes the fully visible tiles of
# the gap, without a mask. A block of keys visits blocks of queries likewise. Indices past the last token are clamped:
# what is loaded there is finite, is masked before it is summed, and is never stored.
#
# A query sees a key where first[query] <= key <= query <= last[key]. Without a tree one of the outer bounds is enough;
# the other one's pointer, and the tree's, are then None, and there is no code for them. In a tree each loop has more
# gaps, for keys that are hidden from every query of the block. `jumps` holds a loop's gaps in order, each as the number
# of tiles before it and its size.
#
# Names are FlashAttention's: m_i is the running maximum of a query's scores in base 2, l_i the running sum of its
# weights, acc the unnormalised output; lse2 is the log-sum-exp in base 2, delta the row sum of dout * out.

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Initial running maximum. It is finite: subtracting -inf from a masked score of -inf would be NaN.
_INITIAL_MAX = tl.constexpr(-3.4e38)


@triton.jit
def _load_rows(ptr, token, stride_token, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [BLOCK, BLOCK_D] of the given tokens; columns past D are zero."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + token.to(tl.int64)[:, None] * stride_token + d[None, :]
    if D == BLOCK_D:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=d[None, :] < D, other=0.0)
    return tile


@triton.jit
def _store_rows(ptr, token, T, stride_token, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (token < T)[:, None] & (d < D)[None, :]
    tl.store(ptr + token.to(tl.int64)[:, None] * stride_token + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _visited_keys(first_ptr, tree_ptr, row, m0, T, past, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The masked and the unmasked loop of a block of queries, `past` keys before query 0: each its first key, number of
    tiles, and jumps.
    """
    if tree_ptr is None:
        # [begin, full) and [diagonal, end) are partially visible, [full, diagonal) fully
        begin = tl.load(first_ptr + m0) // BLOCK_N * BLOCK_N
        diagonal = (m0 + past) // BLOCK_N * BLOCK_N
        stop = tl.minimum(m0 + BLOCK_M, T)
        full = tl.minimum(tl.cdiv(tl.load(first_ptr + stop - 1), BLOCK_N) * BLOCK_N, diagonal)
        end = stop + past
        near = (full - begin) // BLOCK_N
        middle = (diagonal - full) // BLOCK_N
        masked = begin, near + tl.cdiv(end - diagonal, BLOCK_N), ((near, diagonal - full),)
        unmasked = full, middle, ()
    else:
        # Likewise of the keys before the hidden ones, [begin, end), and of those behind, [after, stop), where a query
        # that sees all its keys sees them.
        first = tl.load(first_ptr + row)
        hidden_begin = tl.load(tree_ptr + row)
        hidden_end = tl.load(tree_ptr + T + row)
        begin = tl.min(first) // BLOCK_N * BLOCK_N
        before = tl.max(tl.where(hidden_begin < hidden_end, hidden_begin, 0))
        end = tl.maximum(tl.cdiv(before, BLOCK_N) * BLOCK_N, begin)
        full = tl.minimum(tl.cdiv(tl.max(first), BLOCK_N) * BLOCK_N, end)
        edge = tl.maximum(tl.min(hidden_begin) // BLOCK_N * BLOCK_N, full)
        after = tl.maximum(tl.min(hidden_end) // BLOCK_N * BLOCK_N, end)
        diagonal = tl.maximum(m0 // BLOCK_N * BLOCK_N, after)
        full_after = tl.minimum(tl.maximum(tl.cdiv(tl.max(hidden_end), BLOCK_N) * BLOCK_N, after), diagonal)
        stop = tl.maximum(tl.minimum(m0 + BLOCK_M, T), diagonal)
        near = (full - begin) // BLOCK_N
        near_edge = near + (end - edge) // BLOCK_N
        near_after = near_edge + (full_after - after) // BLOCK_N
        tiles = near_after + tl.cdiv(stop - diagonal, BLOCK_N)
        masked = begin, tiles, ((near, edge - full), (near_edge, after - end), (near_after, diagonal - full_after))
        middle = (edge - full) // BLOCK_N
        unmasked = full, middle + (diagonal - full_after) // BLOCK_N, ((middle, full_after - edge),)
    return masked, unmasked


@triton.jit
def _tile_start(begin, tile, jumps, BLOCK: tl.constexpr):
    n = begin + tile * BLOCK
    for i in tl.static_range(len(jumps)):  # pyright: ignore[reportGeneralTypeIssues]
        n += tl.where(tile < jumps[i][0], 0, jumps[i][1])
    return n


@triton.jit
def _accumulate(
    acc, m_i, l_i, scores, v_ptr, row, stride_v_token, SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Adds a tile of keys to the running sums of a softmax, in base 2."""
    # in base 2 the scale and log2(e) are one factor, which is fused with the subtraction
    m_new = tl.maximum(m_i, tl.max(scores, 1) * (SCALE * _LOG2E))
    p = tl.exp2(scores * (SCALE * _LOG2E) - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    p = p.to(v_ptr.dtype.element_ty)
    acc = add_dot(acc, p, _load_rows(v_ptr, row, stride_v_token, D, BLOCK_D))
    return acc, m_new, l_i


@triton.jit
def _forward_inner(
    acc, m_i, l_i, q, token, first, last_ptr, k_ptr, v_ptr, loop, S, stride_k_token, stride_v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    begin, tiles, jumps = loop
    for tile in range(0, tiles):
        key = _tile_start(begin, tile, jumps, BLOCK_N) + tl.arange(0, BLOCK_N)
        row = tl.minimum(key, S - 1) if MASKED else key
        scores = dot(q, tl.trans(_load_rows(k_ptr, row, stride_k_token, D, BLOCK_D)), acc.dtype)
        if MASKED:
            visible = (first[:, None] <= key[None, :]) & (key[None, :] <= token[:, None])
            if last_ptr is not None:
                # a query past the last token is as the last one: one that sees nothing would divide by zero
                visible &= tl.minimum(token, S - 1)[:, None] <= tl.load(last_ptr + row)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        acc, m_i, l_i = _accumulate(acc, m_i, l_i, scores, v_ptr, row, stride_v_token, SCALE, D, BLOCK_D)
    return acc, m_i, l_i


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, tree_ptr, out_ptr, lse_ptr, T, S,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    SCALE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads that read the same keys run side by side; the blocks that see most keys come first.
    head = (tl.program_id(0) % H).to(tl.int64)
    m0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // H) * BLOCK_M
    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    query = m0 + tl.arange(0, BLOCK_M)
    row = tl.minimum(query, T - 1)
    q = _load_rows(q_ptr + head * stride_q_head, row, stride_q_token, D, BLOCK_D)
    first = tl.load(first_ptr + row)
    token = query + (S - T)
    k_ptr += head // GROUP * stride_k_head
    v_ptr += head // GROUP * stride_v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], acc_dtype)
    m_i = tl.full([BLOCK_M], _INITIAL_MAX, acc_dtype)
    l_i = tl.zeros([BLOCK_M], acc_dtype)
    masked, unmasked = _visited_keys(first_ptr, tree_ptr, row, m0, T, S - T, BLOCK_M, BLOCK_N)
    acc, m_i, l_i = _forward_inner(
        acc, m_i, l_i, q, token, first, last_ptr, k_ptr, v_ptr, masked,
        S, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    acc, m_i, l_i = _forward_inner(
        acc, m_i, l_i, q, token, first, last_ptr, k_ptr, v_ptr, unmasked,
        S, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    _store_rows(out_ptr + head * D, query, T, H * D, acc / l_i[:, None], D, BLOCK_D)
    tl.store(lse_ptr + head * T + query, (m_i + tl.log2(l_i)) * _LN2, mask=query < T)


@triton.jit
def _dq_inner(
    dq, q, dout, query, first, last_ptr, lse2, delta, k_ptr, v_ptr, loop, T, stride_k_token, stride_v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    begin, tiles, jumps = loop
    for tile in range(0, tiles):
        key = _tile_start(begin, tile, jumps, BLOCK_N) + tl.arange(0, BLOCK_N)
        row = tl.minimum(key, T - 1) if MASKED else key
        k = _load_rows(k_ptr, row, stride_k_token, D, BLOCK_D)
        scores = dot(q, tl.trans(k), dq.dtype)
        dp = dot(dout, tl.trans(_load_rows(v_ptr, row, stride_v_token, D, BLOCK_D)), dq.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - lse2[:, None])
        if MASKED:
            visible = (first[:, None] <= key[None, :]) & (key[None, :] <= query[:, None])
            if last_ptr is not None:
                visible &= query[:, None] <= tl.load(last_ptr + row)[None, :]
            p = tl.where(visible, p, 0.0)
        dq = add_dot(dq, (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty), k)
    return dq


@triton.jit
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, tree_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, T,
    stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    SCALE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % H).to(tl.int64)
    m0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // H) * BLOCK_M
    acc_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    query = m0 + tl.arange(0, BLOCK_M)
    row = tl.minimum(query, T - 1)
    q = _load_rows(q_ptr + head * stride_q_head, row, stride_q_token, D, BLOCK_D)
    dout = _load_rows(dout_ptr + head * stride_dout_head, row, stride_dout_token, D, BLOCK_D)
    # also stored for _dkdv_kernel
    lse2 = tl.load(lse_ptr + head * T + row) * _LOG2E
    delta = tl.sum(_load_rows(out_ptr + head * D, row, H * D, D, BLOCK_D).to(acc_dtype) * dout.to(acc_dtype), 1)
    tl.store(lse2_ptr + head * T + query, lse2, mask=query < T)
    tl.store(delta_ptr + head * T + query, delta, mask=query < T)
    first = tl.load(first_ptr + row)
    k_ptr += head // GROUP * stride_k_head
    v_ptr += head // GROUP * stride_v_head
    dq = tl.zeros([BLOCK_M, BLOCK_D], acc_dtype)
    masked, unmasked = _visited_keys(first_ptr, tree_ptr, row, m0, T, 0, BLOCK_M, BLOCK_N)
    dq = _dq_inner(
        dq, q, dout, query, first, last_ptr, lse2, delta, k_ptr, v_ptr, masked,
        T, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    dq = _dq_inner(
        dq, q, dout, query, first, last_ptr, lse2, delta, k_ptr, v_ptr, unmasked,
        T, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    _store_rows(dq_ptr + head * D, query, T, H * D, dq * SCALE, D, BLOCK_D)


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, key, last, first_ptr, q_ptr, dout_ptr, lse2_ptr, delta_ptr, loop, T,
    stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # One loop over the group's heads and their queries, so that loads are prefetched across heads too. Scores are keys
    # by queries, so that the products that sum over queries find their left operand in registers.
    begin, tiles, jumps = loop
    tiles_per_head = tl.maximum(tiles, 1)  # a prefetch may divide by it even if the loop is empty
    for index in range(0, tiles * GROUP):
        head = (index // tiles_per_head).to(tl.int64)
        tile = index % tiles_per_head
        query = tl.multiple_of(_tile_start(begin, tile, jumps, BLOCK_M), BLOCK_M) + tl.arange(0, BLOCK_M)
        row = tl.minimum(query, T - 1) if MASKED else query
        q = _load_rows(q_ptr + head * stride_q_head, row, stride_q_token, D, BLOCK_D)
        scores = dot(k, tl.trans(q), dk.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - tl.load(lse2_ptr + head * T + row)[None, :])
        if MASKED:
            visible = (key[:, None] <= query[None, :]) & (query[None, :] <= last[:, None])
            if first_ptr is not None:
                visible &= tl.load(first_ptr + row)[None, :] <= key[:, None]
            p = tl.where(visible, p, 0.0)
        dout = _load_rows(dout_ptr + head * stride_dout_head, row, stride_dout_token, D, BLOCK_D)
        dv = add_dot(dv, p.to(dout_ptr.dtype.element_ty), dout)
        dp = dot(v, tl.trans(dout), dk.dtype)
        ds = p * (dp - tl.load(delta_ptr + head * T + row)[None, :])
        dk = add_dot(dk, ds.to(q_ptr.dtype.element_ty), q)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, tree_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, T,
    stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    SCALE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The first keys, which most queries see, come first.
    kv_head = (tl.program_id(0) % K).to(tl.int64)
    n0 = tl.program_id(0) // K * BLOCK_N
    acc_dtype: tl.constexpr = lse2_ptr.dtype.element_ty
    key = n0 + tl.arange(0, BLOCK_N)
    row = tl.minimum(key, T - 1)
    k = _load_rows(k_ptr + kv_head * stride_k_head, row, stride_k_token, D, BLOCK_D)
    v = _load_rows(v_ptr + kv_head * stride_v_head, row, stride_v_token, D, BLOCK_D)
    last = tl.load(last_ptr + row)
    q_ptr += kv_head * GROUP * stride_q_head
    dout_ptr += kv_head * GROUP * stride_dout_head
    lse2_ptr += kv_head * GROUP * T
    delta_ptr += kv_head * GROUP * T
    dk = tl.zeros([BLOCK_N, BLOCK_D], acc_dtype)
    dv = tl.zeros([BLOCK_N, BLOCK_D], acc_dtype)
    # Queries in [begin, full) and [edge, end) see the block of keys partially, those in [full, edge) fully.
    begin = n0 // BLOCK_M * BLOCK_M
    full = tl.cdiv(n0 + BLOCK_N, BLOCK_M) * BLOCK_M
    if tree_ptr is None:
        edge = tl.maximum((tl.load(last_ptr + n0) + 1) // BLOCK_M * BLOCK_M, full)
        end = tl.load(last_ptr + tl.minimum(n0 + BLOCK_N, T) - 1) + 1
    else:
        edge = tl.maximum(tl.min(tl.load(tree_ptr + 2 * T + row) + 1) // BLOCK_M * BLOCK_M, full)
        end = tl.max(last + 1)
    near = tl.cdiv(tl.minimum(full, end) - begin, BLOCK_M)
    middle = (edge - full) // BLOCK_M
    masked = begin, near + tl.cdiv(tl.maximum(end, edge) - edge, BLOCK_M), ((near, edge - full),)
    unmasked = full, middle, ()
    dk, dv = _dkdv_inner(
        dk, dv, k, v, key, last, first_ptr, q_ptr, dout_ptr, lse2_ptr, delta_ptr, masked, T,
        stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
        SCALE, GROUP, D, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    dk, dv = _dkdv_inner(
        dk, dv, k, v, key, last, first_ptr, q_ptr, dout_ptr, lse2_ptr, delta_ptr, unmasked, T,
        stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
        SCALE, GROUP, D, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    _store_rows(dk_ptr + kv_head * D, key, T, K * D, dk * SCALE, D, BLOCK_D)
    _store_rows(dv_ptr + kv_head * D, key, T, K * D, dv, D, BLOCK_D)


# of each kernel: BLOCK_M, BLOCK_N, warps, stages
Tiles = dict[str, tuple[int, int, int, int]]
_AMPERE: Tiles = {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (64, 64, 8, 2)}
# Tiles by GPU and the largest head size, for 16-bit dtypes; "wide" is for fp32, and for fp64 of half the size. None
# spills registers, and all fit in shared memory. "of trees" is for those where the kernel's own would spill.
_TILES: dict[str, dict[int, Tiles]] = {
    "wide": {
        128: {"forward": (32, 32, 8, 1), "dq": (32, 32, 8, 2), "dkdv": (32, 32, 8, 1)},
        256: {"forward": (16, 16, 8, 2), "dq": (16, 16, 8, 2), "dkdv": (16, 16, 8, 1)},
    },
    # 99 KiB of shared memory: all from sm_80 that are not below
    "sm_86": {
        64: {**_AMPERE, "dkdv of trees": (64, 128, 8, 2)},
        128: _AMPERE,
        256: {"forward": (64, 32, 8, 2), "dq": (32, 32, 4, 2), "dkdv": (32, 32, 8, 2)},
    },
    # 163 KiB
    "sm_80": {
        64: {**_AMPERE, "dkdv of trees": (64, 128, 8, 2)},
        128: _AMPERE,
        256: {"forward": (64, 64, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
    },
    # 227 KiB, products of 64 rows and more from shared memory. The fastest on an H200 (benchmarks.attention_tiles):
    # 128 x 128 executes a fifth fewer instructions a key in forward and dQ, and takes 16% and 10% longer.
    "sm_90": {
        128: {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3)},
        256: {"forward": (64, 64, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
    },
    # 227 KiB; a forward of 128 x 128 spills
    "sm_100": {
        64: {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 3), "dkdv": (64, 128, 8, 2)},
        128: {"forward": (128, 64, 8, 3), "dq": (128, 128, 8, 2), "dkdv": (64, 128, 8, 2)},
        256: {"forward": (64, 64, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
    },
}


def _tiles(dtype: torch.dtype, block_d: int) -> Tiles:
    """The kernels' tiles on the current GPU, for heads padded to `block_d`."""
    capability = compute_capability()
    if capability < 80:
        # a block has 64 KiB of shared memory, enough for the smallest tiles only
        return _TILES["wide"][256]
    if dtype not in (torch.bfloat16, torch.float16):
        gpu = "wide"
        block_d = block_d * dtype.itemsize // 4
    elif capability in (80, 87):
        gpu = "sm_80"
    else:
        gpu = {9: "sm_90", 10: "sm_100"}.get(capability // 10, "sm_86")
    return _TILES[gpu][min((size for size in _TILES[gpu] if size >= block_d), default=256)]


def _constants(kernel: str, q_THD: Tensor, k_SKD: Tensor, tree: Tensor | None) -> dict[str, Any]:
    heads, head_dim = q_THD.shape[1:]
    kv_heads = k_SKD.shape[1]
    # a product takes at least 16 columns
    block_d = max(triton.next_power_of_2(head_dim), 16)
    tiles = _tiles(q_THD.dtype, block_d)
    own = tiles[kernel]
    block_m, block_n, warps, stages = own if tree is None else tiles.get(f"{kernel} of trees", own)
    return {
        "SCALE": head_dim**-0.5,
        "K" if kernel == "dkdv" else "H": kv_heads if kernel == "dkdv" else heads,
        "GROUP": heads // kv_heads,
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": stages,
    }


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The tensors with a last stride of 1; all other strides may be anything."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _of_tree(bound: Tensor, tree: Tensor | None) -> Tensor | None:
    """The bound of the mask that a kernel reads of trees alone."""
    return None if tree is None else bound


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, tree: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q, k, v)
    tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=accumulate_dtype(q.dtype))
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    constants = _constants("forward", q, k, tree)
    grid = (triton.cdiv(tokens, constants["BLOCK_M"]) * heads,)
    _forward_kernel[grid](q, k, v, first, _of_tree(last, tree), tree, out, lse, tokens, len(k), *strides, **constants)
    return out, lse


def _attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    tree: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = unit_stride(dout, q, k, v)
    tokens, heads, _ = q.shape
    dq, dk, dv, lse2, delta = (t.new_empty(t.shape) for t in (q, k, v, lse, lse))
    strides = [stride for t in (dout, q, k, v) for stride in t.stride()[:2]]
    constants = _constants("dq", q, k, tree)
    grid = (triton.cdiv(tokens, constants["BLOCK_M"]) * heads,)
    _dq_kernel[grid](
        dout, q, k, v, first, _of_tree(last, tree), tree, out, lse, lse2, delta, dq, tokens, *strides, **constants
    )
    constants = _constants("dkdv", q, k, tree)
    grid = (triton.cdiv(tokens, constants["BLOCK_N"]) * k.shape[1],)
    _dkdv_kernel[grid](
        dout, q, k, v, _of_tree(first, tree), last, tree, lse2, delta, dk, dv, tokens, *strides, **constants
    )
    return dq, dk, dv


# ----------------------------------------------------------------------------------------------------- plain PyTorch


class _Piece(NamedTuple):
    """Queries that see keys of their own and, where they are a branch of a tree after the first, keys of its prompt. A
    document is one piece; so are a prompt and its first branch.

    Attributes:
        keys: all these keys, in order.
        past: how many of them come before the queries.
        first: the first key that each query sees, counted from the first of the keys.
        causal: whether no query is limited by the window.
    """

    queries: slice
    keys: slice | Tensor
    past: int
    first: Tensor
    causal: bool


def _pieces(first: Tensor, tree: Tensor | None) -> Iterator[_Piece]:
    token = torch.arange(len(first), dtype=first.dtype)
    # the first token of a document sees itself first, that of a branch sees the prompt and then itself
    begins = first == token
    if tree is not None:
        hidden_begin, hidden_end, _ = tree
        begins |= (hidden_begin < hidden_end) & (hidden_end == token)
    starts = begins.nonzero()[:, 0]
    stops = torch.cat([starts[1:], starts.new_tensor([len(first)])])
    causal = first[stops - 1] == first[starts]
    lows = first[starts].tolist()
    for start, stop, low, whole in zip(starts.tolist(), stops.tolist(), lows, causal.tolist()):
        queries = slice(start, stop)
        if low == start:
            yield _Piece(queries, queries, 0, first[queries] - start, whole)
        else:
            high = int(hidden_begin[start])
            past = high - low
            keys = torch.cat([torch.arange(low, high), torch.arange(start, stop)])
            # those that have come out of the window's reach see keys of their own alone
            own = first[queries] - torch.where(first[queries] < high, low, start - past)
            yield _Piece(queries, keys, past, own, whole)


def _grouped(t_THD: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] as [K, G, T, D]: the G query heads of each key head."""
    return t_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _attention_torch(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, tree: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's flash kernel for the CPU, which returns the log-sum-exp too."""
    # the kernel assumes it without a check
    q, k, v = unit_stride(q, k, v)
    tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    past = len(k) - tokens
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=accumulate_dtype(q.dtype))
    q_KGTD, k_K1SD, v_K1SD, out_KGTD = (_grouped(t, kv_heads) for t in (q, k, v, out))
    lse_KGT = lse.unflatten(0, (kv_heads, -1))
    token = torch.arange(tokens + past, dtype=first.dtype)
    chunk = _Piece(slice(0, tokens), slice(0, len(k)), past, first, False)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    for piece in [chunk] if past else _pieces(first, tree):
        q_p, out_p, lse_p = (t[:, :, piece.queries] for t in (q_KGTD, out_KGTD, lse_KGT))
        k_p, v_p = (t[:, :, piece.keys].expand(-1, heads // kv_heads, -1, -1) for t in (k_K1SD, v_K1SD))
        if piece.causal and not piece.past:
            out_p[:], lse_p[:] = flash(q_p, k_p, v_p, is_causal=True)
            continue
        for begin in range(0, len(piece.first), CPU_FORWARD_BLOCK):
            queries = slice(begin, min(begin + CPU_FORWARD_BLOCK, len(piece.first)))
            keys = slice(int(piece.first[begin]), piece.past + queries.stop)
            visible = (piece.first[queries, None] <= token[keys]) & (token[keys] <= piece.past + token[queries, None])
            out_p[:, :, queries], lse_p[:, :, queries] = flash(
                q_p[:, :, queries], k_p[:, :, keys], v_p[:, :, keys], attn_mask=visible.to(q.dtype).log()
            )
    return out, lse


def _attention_backward_torch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    tree: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies blocks of queries by the keys that they see, all query heads of a key head in one matrix product.

    The weights p and the gradients ds of their scores take products alike, q k^T and dout v^T, and so do the gradients
    of v and k, p^T dout and ds^T q: each two are one product of twice as many matrices. The first also subtracts the
    log-sum-exp and delta, before it rounds: what remains is small where a weight is large. Torch's backward takes 2 to
    5 times as long in bf16 (64 to 1024 tokens), and supports no window. Names end in _p for a piece's part of a tensor,
    in _b for a block's; J is 2.
    """
    _, kv_heads, head_dim = k.shape
    scale = head_dim**-0.5
    dq = q.new_empty(q.shape)
    q_KGTD, dout_KGTD, out_KGTD, dq_KGTD = (_grouped(t, kv_heads) for t in (q, dout, out, dq))
    delta_KGT = torch.linalg.vecdot(out_KGTD.to(lse.dtype), dout_KGTD.to(lse.dtype))
    queries_JKGTD = torch.stack([q_KGTD * scale, dout_KGTD])
    swapped_JKGTD = queries_JKGTD.flip(0)
    # D columns, and one or two more
    queries_JKGTW = _with_addend(queries_JKGTD, -torch.stack([lse.unflatten(0, (kv_heads, -1)), delta_KGT]))
    keys_JKTD = torch.stack([k, v]).transpose(1, 2)
    keys_JKTW = F.pad(keys_JKTD, (0, queries_JKGTW.shape[-1] - head_dim), value=1.0)
    scaled_k_KTD = keys_JKTD[0] * scale
    gradients_JKTD = torch.zeros(keys_JKTD.shape, dtype=lse.dtype)
    # added to scores: masked_fill_ takes four times as long
    future = q.new_full((CPU_BACKWARD_BLOCK, CPU_BACKWARD_BLOCK), -torch.inf).triu_(1)
    for piece in _pieces(first, tree):
        queries_p, swapped_p, dq_p = (t[..., piece.queries, :] for t in (queries_JKGTW, swapped_JKGTD, dq_KGTD))
        # the gradients are a view where the piece is a document
        keys_p, scaled_k_p, gradients_p = (t[..., piece.keys, :] for t in (keys_JKTW, scaled_k_KTD, gradients_JKTD))
        blocks = []
        for start in range(0, len(piece.first), CPU_BACKWARD_BLOCK):
            stop = min(start + CPU_BACKWARD_BLOCK, len(piece.first))
            # the first keys seen by the block's first and last query: keys in [low, high) are masked query by query
            low, high = (0, 0) if piece.causal else piece.first[[start, stop - 1]].tolist()
            blocks.append((slice(start, stop), slice(low, piece.past + stop), high))
        most = max((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys, _ in blocks)
        buffer = q.new_empty(2 * q.shape[1] * most)
        for rows, keys, high in blocks:
            length, seen = rows.stop - rows.start, keys.stop - keys.start
            queries_b, swapped_b = (t[..., rows, :].flatten(2, 3).flatten(0, 1) for t in (queries_p, swapped_p))
            keys_b = keys_p[:, :, keys].flatten(0, 1)
            scores = buffer[: 2 * q.shape[1] * length * seen].view(len(keys_b), -1, seen)
            p, ds = torch.bmm(queries_b, keys_b.mT, out=scores).chunk(2)
            p_KGTS = p.unflatten(1, (-1, length))
            p_KGTS[..., -length:].add_(future[:length, :length])
            p.exp_()
            if high > keys.start:
                early = torch.arange(keys.start, high) < piece.first[rows, None]
                p_KGTS[..., : high - keys.start].masked_fill_(early, 0)
            ds.mul_(p)
            gradients_p[:, :, keys] += (scores.mT @ swapped_b).unflatten(0, (2, -1))
            dq_p[:, :, rows] = (ds @ scaled_k_p[:, keys]).unflatten(1, (-1, length))
        if piece.past:
            gradients_JKTD[..., piece.keys, :] = gradients_p
    # those of v come first
    dv, dk = (t.new_empty(t.shape).copy_(gradient.transpose(0, 1)) for t, gradient in zip((v, k), gradients_JKTD))
    return dq, dk, dv


def _with_addend(rows: Tensor, value: Tensor) -> Tensor:
    """rows [..., D] with one or two more columns, whose sum is value [...]: a product with rows that end in ones adds
    it, as exactly as products are summed.
    """
    columns = 1 if rows.dtype == value.dtype else 2
    wider = rows.new_empty(*rows.shape[:-1], rows.shape[-1] + columns)
    wider[..., :-columns] = rows
    for column in range(-columns, 0):
        wider[..., column] = value
        # what its dtype has rounded off
        value = value - wider[..., column]
    return wider


# ------------------------------------------------------------------------------------------- operators and autograd


_attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? tree=None) -> (Tensor, Tensor)",
    cuda=_attention_triton,
    cpu=_attention_torch,
    fake=lambda q, k, v, first, last, tree=None: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype)),
    ),
)
_attention_backward = operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor first, Tensor last,"
    " Tensor? tree=None) -> (Tensor, Tensor, Tensor)",
    cuda=_attention_backward_triton,
    cpu=_attention_backward_torch,
    fake=lambda dout, q, k, v, out, lse, first, last, tree=None: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and the log-sum-exp of each query and head; backward computes the weights again."""

    @staticmethod
    def forward(ctx, q, k, v, first, last, tree):
        out, lse = _attention(q, k, v, first, last, tree)
        ctx.save_for_backward(q, k, v, out, lse, first, last, tree)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *_attention_backward(dout, *ctx.saved_tensors), None, None, None


def attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, first_T: Tensor, last_T: Tensor, tree_3T: Tensor | None = None
) -> Tensor:
    """`attention_definition`, in tiles: the matrix of scores never exists. S > T takes one document, forward only.

    Args:
        last_T: the last query that sees each key, [T] int32, for backward; not read where S > T.
        tree_3T: as in the definition; the last row is for backward: of each key the last query of the unbroken range of
            queries, from the key itself on, that see it. The keys that branches after the first see are keys of their
            prompt, from first[i] to hidden_begin[i], and their own, from hidden_end[i].

    Raises:
        ValueError: S > T, and an input requires a gradient, or there is a tree.
    """
    tokens, keys = len(q_THD), len(k_SKD)
    if tokens != keys and tree_3T is not None:
        raise ValueError(f"attention takes a tree as a whole: got {tokens} queries, {keys} keys")
    if tokens != keys and torch.is_grad_enabled() and any(t.requires_grad for t in (q_THD, k_SKD, v_SKD)):
        raise ValueError(f"attention has no backward for keys without a query: got {tokens} queries, {keys} keys")
    return _Attention.apply(q_THD, k_SKD, v_SKD, first_T, last_T, tree_3T)
