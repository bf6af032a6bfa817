"""Rotary position embedding of one token a sequence, whose key and value go into the cache in the same pass.

In a decoding step each layer would otherwise launch three small kernels. For inference only.
Axes: N sequences, M = (H + 2 K) D columns, H query heads, K key heads, D head size, P = D/2, S positions of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import as_rows, operator, uses_triton
from minorca_kernels.rope import _constants, _load_tables, _rotate_heads, rope, rope_definition


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
    offset = tl.arange(0, BLOCK_KV_HEADS * BLOCK_P * 2)
    mask = offset < KV_HEADS * D
    v = tl.load(qkv_ptr + (HEADS + KV_HEADS) * D + offset, mask=mask, other=0.0)
    tl.store(v_ptr + target + offset, v, mask=mask)


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
