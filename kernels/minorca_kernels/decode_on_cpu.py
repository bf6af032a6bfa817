"""`rope_into_cache` and `decode_attention` of one token a sequence on a CPU, in few calls.

Between two products of a decoding step, which have just read all of a layer's weights, little code is left in a core's
caches: a call to torch takes 5 to 10 microseconds there, whatever it computes. What all layers share is made once. For
inference only.

Axes: N sequences, M = (H + 2 K) D columns, H query heads, K key heads, A = H + K, G = H // K query heads of a key head,
E queries of a key head with padding, D head size, P = D/2 rotated pairs, S positions of a page or of the cache.
"""

import torch
from torch import Tensor

from minorca_kernels.decode_attention import FLASH_QUERIES, Span, attend_to_spans


class DecodeOnCPU:
    """Of each layer the rotation, the new keys and values into the cache, and attention.

    Args:
        cos_NP, sin_NP: tables from `rope_tables`.
        index_N: as `rope_into_cache` takes it.
        spans: from `decode_spans`, what each query sees; the result of one that sees nothing is 0.
    """

    def __init__(self, cos_NP: Tensor, sin_NP: Tensor, index_N: Tensor, spans: list[Span]):
        self.cos_N11P = cos_NP[:, None, None]
        self.sin_N12P = torch.stack([-sin_NP, sin_NP], 1)[:, None]
        self.index_N = index_N
        self.spans = spans

    def __call__(self, qkv_NM: Tensor, k_PSKD: Tensor, v_PSKD: Tensor) -> Tensor:
        """qkv and a layer's contiguous pages, which are changed -> [N, H, D]."""
        sequences = len(qkv_NM)
        kv_heads, head_dim = k_PSKD.shape[2:]
        rotated = qkv_NM.shape[1] // head_dim - kv_heads
        group = rotated // kv_heads - 1
        qk_NA2P, v_NK2P = qkv_NM.view(sequences, -1, 2, head_dim // 2).split((rotated, kv_heads), 1)
        rotated_NA2P = (qk_NA2P * self.cos_N11P).addcmul_(qk_NA2P.flip(2), self.sin_N12P)
        # the last queries' padding lies after their rows
        rows = qkv_NM.new_empty(sequences * rotated + FLASH_QUERIES, head_dim)
        rows[:-FLASH_QUERIES].view(rotated_NA2P.shape).copy_(rotated_NA2P)
        k_NKD = rows.as_strided(
            (sequences, kv_heads, head_dim), (rotated * head_dim, head_dim, 1), group * kv_heads * head_dim
        )
        k_PSKD.view(-1, kv_heads, head_dim).index_copy_(0, self.index_N, k_NKD)
        v_PSKD.view(-1, kv_heads, head_dim).index_copy_(0, self.index_N, v_NK2P.flatten(2))
        # padding is the rows that follow: nobody reads what it attends to
        padded = group + -group % FLASH_QUERIES
        q_NKED = rows.as_strided(
            (sequences, kv_heads, padded, head_dim), (rotated * head_dim, group * head_dim, head_dim, 1)
        )
        return attend_to_spans(q_NKED, k_PSKD, v_PSKD, self.spans, group)
