"""Rotary position embedding of one token a sequence, whose key and value go into the cache in the same pass.

In a decoding step each layer would otherwise launch three small kernels, and what all layers share a dozen. For
inference only.
Axes: N sequences, M = (H + 2 K) D columns, H query heads, K key heads, D head size, P = D/2, S positions of the
cache, B pages of a sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import as_rows, operator, uses_triton
from minorca_kernels.rope import _constants, _copy_heads, _load_tables, _rotate_heads, rope, rope_definition


def rope_into_cache_definition(
    qkv_NM: Tensor, cos_NP: Tensor, sin_NP: Tensor, k_SKD: Tensor, v_SKD: Tensor, index_N: Tensor
) -> Tensor:
    """Rotates as `rope_definition` does, and writes keys and values into the cache.

    Args:
        qkv_NM: [N, (H + 2 K) D].
        cos_NP, sin_NP: tables from `rope_tables`.
        k_SKD, v_SKD: the cache, contiguous [S, K, D]; changed in place.
        index_N: int64 [N], the position in the cache of each sequence's key and value; no two are equal.

    Returns:
        The rotated queries [N, H, D].
    """
    q, k, v = rope_definition(qkv_NM, cos_NP, sin_NP, _heads(qkv_NM, k_SKD), k_SKD.shape[1])
    k_SKD[index_N] = k
    v_SKD[index_N] = v
    return q


def _heads(qkv: Tensor, k: Tensor) -> int:
    return qkv.shape[1] // k.shape[2] - 2 * k.shape[1]


@triton.jit
def _rope_into_cache_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    stride_qkv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index_ptr + row) * KV_HEADS * D
    pair = tl.arange(0, BLOCK_P)[None]
    pair_mask = pair < D // 2
    cos, sin = _load_tables(cos_ptr, sin_ptr, row, pair, pair_mask, q_ptr.dtype.element_ty, D)
    qkv_ptr += row * stride_qkv
    _rotate_heads(qkv_ptr, q_ptr + row * HEADS * D, cos, sin, pair, pair_mask, HEADS, D, BLOCK_HEADS)
    _rotate_heads(qkv_ptr + HEADS * D, k_ptr + target, cos, sin, pair, pair_mask, KV_HEADS, D, BLOCK_KV_HEADS)
    _copy_heads(qkv_ptr + (HEADS + KV_HEADS) * D, v_ptr + target, KV_HEADS * D, BLOCK_KV_HEADS * BLOCK_P * 2)


def _rope_into_cache_triton(qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    q = _empty_q(qkv, cos, sin, k, v, index)
    qkv = as_rows(qkv)
    constants = _constants(q.shape[1], *k.shape[1:])
    _rope_into_cache_kernel[(len(qkv),)](
        qkv, cos.contiguous(), sin.contiguous(), q, k, v, index, qkv.stride(0), **constants
    )
    return q


def _rope_into_cache_torch(qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    q, new_k, new_v = rope(qkv, cos, sin, _heads(qkv, k), k.shape[1])
    k.index_copy_(0, index, new_k)
    v.index_copy_(0, index, new_v)
    return q


def _empty_q(qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], _heads(qkv, k), k.shape[2])


_rope_into_cache = operator(
    "rope_into_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k, Tensor(b!) v, Tensor index) -> Tensor",
    cuda=_rope_into_cache_triton,
    cpu=lambda *arguments: _rope_into_cache_torch(*arguments).contiguous(),
    fake=_empty_q,
)


def rope_into_cache(
    qkv_NM: Tensor, cos_NP: Tensor, sin_NP: Tensor, k_SKD: Tensor, v_SKD: Tensor, index_N: Tensor
) -> Tensor:
    """`rope_into_cache_definition`, fused."""
    function = _rope_into_cache if uses_triton(qkv_NM) else _rope_into_cache_torch
    return function(qkv_NM, cos_NP, sin_NP, k_SKD, v_SKD, index_N)


# -------------------------------------------------------------------------------------- what all layers of a step share


def decode_positions_definition(
    lengths_N: Tensor, active_N: Tensor, frequencies_P: Tensor, table_NB: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The place of each sequence's next token in a cache of pages.

    Args:
        lengths_N: int64 [N], the tokens of each sequence; one more for active ones afterwards, in place.
        active_N: int64 [N], 1 for active sequences and 0 for others.
        frequencies_P: from `rope_frequencies`.
        table_NB: int32 [N, B], the pages of each sequence.
        page: the positions of a page. Page 0 is scratch, where inactive sequences write.

    Returns:
        cos and sin [N, P] fp32, as `rope_tables` of the next tokens' positions; the index that `rope_into_cache` takes,
        counted through all pages, and the tokens of each sequence afterwards, 0 of inactive ones: int64 [N].
    """
    angles_NP = lengths_N.float()[:, None] * frequencies_P
    own_N = torch.arange(len(lengths_N), device=lengths_N.device)
    # an inactive sequence may be as long as its table
    place_N = (lengths_N // page).clamp(max=table_NB.shape[1] - 1)
    target_N = table_NB[own_N, place_N].long() * page + lengths_N % page
    index_N = torch.where(active_N == 1, target_N, own_N % page)
    filled_N = (lengths_N + 1) * active_N
    lengths_N += active_N
    return angles_NP.cos(), angles_NP.sin(), index_N, filled_N


@triton.jit
def _decode_positions_kernel(
    lengths_ptr,
    active_ptr,
    frequencies_ptr,
    cos_ptr,
    sin_ptr,
    index_ptr,
    filled_ptr,
    table_ptr,
    stride_table,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    position = tl.load(lengths_ptr + n)
    active = tl.load(active_ptr + n)
    pair = tl.arange(0, BLOCK_P)
    mask = pair < P
    angle = position.to(tl.float32) * tl.load(frequencies_ptr + pair, mask=mask, other=0.0)
    tl.store(cos_ptr + n * P + pair, tl.cos(angle), mask=mask)
    tl.store(sin_ptr + n * P + pair, tl.sin(angle), mask=mask)
    page = tl.load(table_ptr + n * stride_table + position // PAGE, mask=active == 1, other=0).to(tl.int64)
    tl.store(index_ptr + n, page * PAGE + tl.where(active == 1, position, n) % PAGE)
    tl.store(filled_ptr + n, (position + 1) * active)
    # Whatever thread stores, all have loaded.
    tl.debug_barrier()
    tl.store(lengths_ptr + n, position + active)


def _decode_positions_triton(
    lengths: Tensor, active: Tensor, frequencies: Tensor, table: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = _empty_positions(lengths, active, frequencies, table, page)
    pairs = len(frequencies)
    constants = {"PAGE": page, "P": pairs, "BLOCK_P": triton.next_power_of_2(pairs)}
    _decode_positions_kernel[(len(lengths),)](
        lengths, active, frequencies, *outs, table, table.stride(0), **constants, num_warps=1
    )
    return outs


def _empty_positions(
    lengths: Tensor, active: Tensor, frequencies: Tensor, table: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = (frequencies.new_empty(len(lengths), len(frequencies)) for _ in range(2))
    return cos, sin, torch.empty_like(lengths), torch.empty_like(lengths)


_decode_positions = operator(
    "decode_positions(Tensor(a!) lengths, Tensor active, Tensor frequencies, Tensor table, int page) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    cuda=_decode_positions_triton,
    cpu=decode_positions_definition,
    fake=_empty_positions,
)


def decode_positions(
    lengths_N: Tensor, active_N: Tensor, frequencies_P: Tensor, table_NB: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode_positions_definition`, in one kernel."""
    function = _decode_positions if uses_triton(lengths_N) else decode_positions_definition
    return function(lengths_N, active_N, frequencies_P, table_NB, page)
