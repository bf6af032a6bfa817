# Triton takes plain numbers for constexpr parameters.
# pyright: reportArgumentType=false
"""Causal attention over a flat batch. Documents and the window are given as one number a token: the first key it sees.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691): online softmax, and a backward from the saved log-sum-exp.
Neither direction uses atomics, so results repeat to the bit: one kernel writes dQ for its queries, another dK and dV
for its keys.

Axes: T queries, S keys, H query heads, K key heads (query head h reads key head h // (H // K)), G = H // K query heads
of a key head, D head size. The queries belong to the last T of S tokens. S > T where a prompt comes in chunks: forward
only.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import accumulate_dtype, compute_capability, operator

# Queries of a block on the CPU: in forward those that share a mask where a window is active, in backward those whose
# scores fit the cache.
CPU_FORWARD_BLOCK = 256
CPU_BACKWARD_BLOCK = 64


def attention_definition(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, first_T: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys. Query i, of token p = S - T + i, sees keys first[i] <= j <= p.

    Args:
        q_THD: queries [T, H, D].
        k_SKD: keys [S, K, D].
        v_SKD: values [S, K, D].
        first_T: the first key that each query sees, [T] int32, not decreasing, first[i] <= p.

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
    weights_HTS = scores_HTS.masked_fill(~visible_TS, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights_HTS, v_SHD).to(q_THD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# A tile is BLOCK_M queries by BLOCK_N keys. A block of queries visits the tiles of which it sees anything, in two
# loops. The masked loop takes the partially visible tiles: `near` tiles at the beginning (a document's start or the
# window's edge), then, after a gap, those at the end (the diagonal). The other loop takes the fully visible tiles of
# the gap, without a mask. A block of keys visits blocks of queries likewise. Indices past the last token are clamped:
# what is loaded there is finite, is masked before it is summed, and is never stored.
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
def _key_ranges(first_ptr, m0, T, past, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that a block of queries sees, `past` of them before query 0.

    [begin, full) and [diagonal, end) are partially visible, [full, diagonal) fully.
    """
    begin = tl.load(first_ptr + m0) // BLOCK_N * BLOCK_N
    diagonal = (m0 + past) // BLOCK_N * BLOCK_N
    stop = tl.minimum(m0 + BLOCK_M, T)
    full = tl.minimum(tl.cdiv(tl.load(first_ptr + stop - 1), BLOCK_N) * BLOCK_N, diagonal)
    return begin, full, diagonal, stop + past


@triton.jit
def _forward_inner(
    acc, m_i, l_i, q, token, first, k_ptr, v_ptr, begin, tiles, near, gap, S, stride_k_token, stride_v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(0, tiles):
        n = begin + tile * BLOCK_N
        if MASKED:
            n += tl.where(tile < near, 0, gap)
        key = n + tl.arange(0, BLOCK_N)
        row = tl.minimum(key, S - 1) if MASKED else key
        scores = dot(q, tl.trans(_load_rows(k_ptr, row, stride_k_token, D, BLOCK_D)), acc.dtype)
        if MASKED:
            visible = (first[:, None] <= key[None, :]) & (key[None, :] <= token[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        # in base 2 the scale and log2(e) are one factor, which is fused with the subtraction
        m_new = tl.maximum(m_i, tl.max(scores, 1) * (SCALE * _LOG2E))
        p = tl.exp2(scores * (SCALE * _LOG2E) - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        acc = acc * alpha[:, None]
        p = p.to(v_ptr.dtype.element_ty)
        acc = add_dot(acc, p, _load_rows(v_ptr, row, stride_v_token, D, BLOCK_D))
    return acc, m_i, l_i


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, T, S,
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
    begin, full, diagonal, end = _key_ranges(first_ptr, m0, T, S - T, BLOCK_M, BLOCK_N)
    near = (full - begin) // BLOCK_N
    middle = (diagonal - full) // BLOCK_N
    acc, m_i, l_i = _forward_inner(
        acc, m_i, l_i, q, token, first, k_ptr, v_ptr,
        begin, near + tl.cdiv(end - diagonal, BLOCK_N), near, diagonal - full,
        S, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    acc, m_i, l_i = _forward_inner(
        acc, m_i, l_i, q, token, first, k_ptr, v_ptr,
        full, middle, middle, 0,
        S, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    _store_rows(out_ptr + head * D, query, T, H * D, acc / l_i[:, None], D, BLOCK_D)
    tl.store(lse_ptr + head * T + query, (m_i + tl.log2(l_i)) * _LN2, mask=query < T)


@triton.jit
def _dq_inner(
    dq, q, dout, query, first, lse2, delta, k_ptr, v_ptr, begin, tiles, near, gap, T, stride_k_token, stride_v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(0, tiles):
        n = begin + tile * BLOCK_N
        if MASKED:
            n += tl.where(tile < near, 0, gap)
        key = n + tl.arange(0, BLOCK_N)
        row = tl.minimum(key, T - 1) if MASKED else key
        k = _load_rows(k_ptr, row, stride_k_token, D, BLOCK_D)
        scores = dot(q, tl.trans(k), dq.dtype)
        dp = dot(dout, tl.trans(_load_rows(v_ptr, row, stride_v_token, D, BLOCK_D)), dq.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - lse2[:, None])
        if MASKED:
            visible = (first[:, None] <= key[None, :]) & (key[None, :] <= query[:, None])
            p = tl.where(visible, p, 0.0)
        dq = add_dot(dq, (p * (dp - delta[:, None])).to(k_ptr.dtype.element_ty), k)
    return dq


@triton.jit
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, T,
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
    begin, full, diagonal, end = _key_ranges(first_ptr, m0, T, 0, BLOCK_M, BLOCK_N)
    near = (full - begin) // BLOCK_N
    middle = (diagonal - full) // BLOCK_N
    dq = _dq_inner(
        dq, q, dout, query, first, lse2, delta, k_ptr, v_ptr,
        begin, near + tl.cdiv(end - diagonal, BLOCK_N), near, diagonal - full,
        T, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    dq = _dq_inner(
        dq, q, dout, query, first, lse2, delta, k_ptr, v_ptr,
        full, middle, middle, 0,
        T, stride_k_token, stride_v_token, SCALE, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    _store_rows(dq_ptr + head * D, query, T, H * D, dq * SCALE, D, BLOCK_D)


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, key, last, q_ptr, dout_ptr, lse2_ptr, delta_ptr, begin, tiles, near, gap, T,
    stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # One loop over the group's heads and their queries, so that loads are prefetched across heads too. Scores are keys
    # by queries, so that the products that sum over queries find their left operand in registers.
    tiles_per_head = tl.maximum(tiles, 1)  # a prefetch may divide by it even if the loop is empty
    for index in range(0, tiles * GROUP):
        head = (index // tiles_per_head).to(tl.int64)
        tile = index % tiles_per_head
        m = begin + tile * BLOCK_M
        if MASKED:
            m += tl.where(tile < near, 0, gap)
        query = tl.multiple_of(m, BLOCK_M) + tl.arange(0, BLOCK_M)
        row = tl.minimum(query, T - 1) if MASKED else query
        q = _load_rows(q_ptr + head * stride_q_head, row, stride_q_token, D, BLOCK_D)
        scores = dot(k, tl.trans(q), dk.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - tl.load(lse2_ptr + head * T + row)[None, :])
        if MASKED:
            visible = (key[:, None] <= query[None, :]) & (query[None, :] <= last[:, None])
            p = tl.where(visible, p, 0.0)
        dout = _load_rows(dout_ptr + head * stride_dout_head, row, stride_dout_token, D, BLOCK_D)
        dv = add_dot(dv, p.to(dout_ptr.dtype.element_ty), dout)
        dp = dot(v, tl.trans(dout), dk.dtype)
        ds = p * (dp - tl.load(delta_ptr + head * T + row)[None, :])
        dk = add_dot(dk, ds.to(q_ptr.dtype.element_ty), q)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, last_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, T,
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
    edge = tl.maximum((tl.load(last_ptr + n0) + 1) // BLOCK_M * BLOCK_M, full)
    end = tl.load(last_ptr + tl.minimum(n0 + BLOCK_N, T) - 1) + 1
    near = tl.cdiv(tl.minimum(full, end) - begin, BLOCK_M)
    middle = (edge - full) // BLOCK_M
    dk, dv = _dkdv_inner(
        dk, dv, k, v, key, last, q_ptr, dout_ptr, lse2_ptr, delta_ptr,
        begin, near + tl.cdiv(tl.maximum(end, edge) - edge, BLOCK_M), near, edge - full,
        T, stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
        SCALE, GROUP, D, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    dk, dv = _dkdv_inner(
        dk, dv, k, v, key, last, q_ptr, dout_ptr, lse2_ptr, delta_ptr,
        full, middle, middle, 0,
        T, stride_dout_token, stride_dout_head, stride_q_token, stride_q_head,
        SCALE, GROUP, D, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    _store_rows(dk_ptr + kv_head * D, key, T, K * D, dk * SCALE, D, BLOCK_D)
    _store_rows(dv_ptr + kv_head * D, key, T, K * D, dv, D, BLOCK_D)


# of each kernel: BLOCK_M, BLOCK_N, warps, stages
Tiles = dict[str, tuple[int, int, int, int]]
# Tiles by GPU and the largest head size, for 16-bit dtypes; "wide" is for fp32, and for fp64 of half the size. None
# spills registers, and all fit in shared memory.
_TILES: dict[str, dict[int, Tiles]] = {
    "wide": {
        128: {"forward": (32, 32, 8, 1), "dq": (32, 32, 8, 2), "dkdv": (32, 32, 8, 1)},
        256: {"forward": (16, 16, 8, 2), "dq": (16, 16, 8, 2), "dkdv": (16, 16, 8, 1)},
    },
    # 99 KiB of shared memory: all from sm_80 that are not below
    "sm_86": {
        128: {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (64, 64, 8, 2)},
        256: {"forward": (64, 32, 8, 2), "dq": (32, 32, 4, 2), "dkdv": (32, 32, 8, 2)},
    },
    # 163 KiB
    "sm_80": {
        128: {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (64, 64, 8, 2)},
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


def _constants(kernel: str, q_THD: Tensor, k_SKD: Tensor) -> dict[str, Any]:
    heads, head_dim = q_THD.shape[1:]
    kv_heads = k_SKD.shape[1]
    # a product takes at least 16 columns
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_m, block_n, warps, stages = _tiles(q_THD.dtype, block_d)[kernel]
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


def _attention_triton(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q, k, v)
    tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=accumulate_dtype(q.dtype))
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    constants = _constants("forward", q, k)
    grid = (triton.cdiv(tokens, constants["BLOCK_M"]) * heads,)
    _forward_kernel[grid](q, k, v, first, out, lse, tokens, len(k), *strides, **constants)
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
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = unit_stride(dout, q, k, v)
    tokens, heads, _ = q.shape
    dq, dk, dv, lse2, delta = (t.new_empty(t.shape) for t in (q, k, v, lse, lse))
    strides = [stride for t in (dout, q, k, v) for stride in t.stride()[:2]]
    constants = _constants("dq", q, k)
    grid = (triton.cdiv(tokens, constants["BLOCK_M"]) * heads,)
    _dq_kernel[grid](dout, q, k, v, first, out, lse, lse2, delta, dq, tokens, *strides, **constants)
    constants = _constants("dkdv", q, k)
    grid = (triton.cdiv(tokens, constants["BLOCK_N"]) * k.shape[1],)
    _dkdv_kernel[grid](dout, q, k, v, last, lse2, delta, dk, dv, tokens, *strides, **constants)
    return dq, dk, dv


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _documents(first: Tensor) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether no query is limited by the window) of each document. Its first token sees itself first."""
    starts = (first == torch.arange(len(first), dtype=first.dtype)).nonzero()[:, 0]
    stops = torch.cat([starts[1:], starts.new_tensor([len(first)])])
    return zip(starts.tolist(), stops.tolist(), (first[stops - 1] == starts).tolist())


def _grouped(t_THD: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] as [K, G, T, D]: the G query heads of each key head."""
    return t_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
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
    k_KGSD, v_KGSD = (t.expand(-1, heads // kv_heads, -1, -1) for t in (k_K1SD, v_K1SD))
    token = torch.arange(tokens + past, dtype=first.dtype)

    def attend(queries: slice, keys: slice, mask: Tensor | None) -> None:
        out_KGTD[:, :, queries], lse_KGT[:, :, queries] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KGTD[:, :, queries], k_KGSD[:, :, keys], v_KGSD[:, :, keys], is_causal=mask is None, attn_mask=mask
        )

    for start, stop, causal in [(0, tokens, False)] if past else _documents(first):
        if causal:
            attend(slice(start, stop), slice(start, stop), None)
            continue
        for begin in range(start, stop, CPU_FORWARD_BLOCK):
            queries = slice(begin, min(begin + CPU_FORWARD_BLOCK, stop))
            keys = slice(int(first[begin]), past + queries.stop)
            visible = (first[queries, None] <= token[keys]) & (token[keys] <= past + token[queries, None])
            attend(queries, keys, visible.to(q.dtype).log())
    return out, lse


def _attention_backward_torch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies blocks of queries by the keys that they see, all query heads of a key head in one matrix product.

    Torch's backward takes 1.4 to 3.5 times as long in bf16 (64 to 1024 tokens), and supports no window. Names end in _d
    for a document's part of a tensor, in _b for a block's.
    """
    _, kv_heads, head_dim = k.shape
    scale = head_dim**-0.5
    dq = q.new_empty(q.shape)
    dk_KTD, dv_KTD = torch.zeros(2, kv_heads, len(k), head_dim, dtype=lse.dtype)
    lse_KGT = lse.unflatten(0, (kv_heads, -1))
    for begin, end, causal in _documents(first):
        document = slice(begin, end)
        q_d, dout_d, out_d, dq_d = (_grouped(t[document], kv_heads) for t in (q, dout, out, dq))
        k_d, v_d = (t[document].transpose(0, 1).contiguous() for t in (k, v))
        dk_d = dk_KTD[:, document]
        dv_d = dv_KTD[:, document]
        lse_d = lse_KGT[:, :, document, None]
        delta_d = torch.linalg.vecdot(out_d.to(lse.dtype), dout_d.to(lse.dtype))[..., None]
        scaled_q = q_d * scale
        scaled_k = k_d * scale
        first_d = first[document] - begin
        for start in range(0, end - begin, CPU_BACKWARD_BLOCK):
            stop = min(start + CPU_BACKWARD_BLOCK, end - begin)
            queries = slice(start, stop)
            # the first keys seen by the block's first and last query: keys in [low, high) are masked query by query
            low, high = (0, 0) if causal else first_d[[start, stop - 1]].tolist()
            keys = slice(low, stop)
            shape = (kv_heads, -1, stop - start, stop - low)
            q_b, dout_b = (t[:, :, queries].reshape(kv_heads, -1, head_dim) for t in (scaled_q, dout_d))
            p = torch.sub((q_b @ k_d[:, keys].mT).view(shape), lse_d[:, :, queries]).exp_()
            p[..., start - low :].tril_()
            if high > low:
                p[..., : high - low].masked_fill_(torch.arange(low, high) < first_d[queries, None], 0)
            ds = torch.sub((dout_b @ v_d[:, keys].mT).view(shape), delta_d[:, :, queries]).mul_(p)
            p, ds = (t.to(q.dtype).view(kv_heads, -1, stop - low) for t in (p, ds))
            dv_d[:, keys] += p.mT @ dout_b
            dk_d[:, keys] += ds.mT @ q_b
            dq_d[:, :, queries] = (ds @ scaled_k[:, keys]).view(kv_heads, -1, stop - start, head_dim)
    dk = k.new_empty(k.shape).copy_(dk_KTD.transpose(0, 1))
    dv = v.new_empty(v.shape).copy_(dv_KTD.transpose(0, 1))
    return dq, dk, dv


# ------------------------------------------------------------------------------------------- operators and autograd


_attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last) -> (Tensor, Tensor)",
    cuda=_attention_triton,
    cpu=_attention_torch,
    fake=lambda q, k, v, first, last: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype)),
    ),
)
_attention_backward = operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor first, Tensor last)"
    " -> (Tensor, Tensor, Tensor)",
    cuda=_attention_backward_triton,
    cpu=_attention_backward_torch,
    fake=lambda dout, q, k, v, out, lse, first, last: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and the log-sum-exp of each query and head; backward computes the weights again."""

    @staticmethod
    def forward(ctx, q, k, v, first, last):
        out, lse = _attention(q, k, v, first, last)
        ctx.save_for_backward(q, k, v, out, lse, first, last)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *_attention_backward(dout, *ctx.saved_tensors), None, None


def attention(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, first_T: Tensor, last_T: Tensor) -> Tensor:
    """`attention_definition`, in tiles: the matrix of scores never exists. S > T takes one document, forward only.

    Args:
        last_T: the last query that sees each key, [T] int32, for backward; not read where S > T.

    Raises:
        ValueError: S > T, and an input requires a gradient.
    """
    tokens, keys = len(q_THD), len(k_SKD)
    if tokens != keys and torch.is_grad_enabled() and any(t.requires_grad for t in (q_THD, k_SKD, v_SKD)):
        raise ValueError(f"attention has no backward for keys without a query: got {tokens} queries, {keys} keys")
    return _Attention.apply(q_THD, k_SKD, v_SKD, first_T, last_T)
