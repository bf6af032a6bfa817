"""Attention to the key/value cache: of prompts' next tokens, and of one token a slot.

A query's result does not depend on how a prompt was divided into chunks: on the CPU the queries of a page, and those
only, are computed together, with all keys up to the end of the page, most of which are masked at the beginning of one.

Axes in names: N slots, S positions of a page, P pages of the cache (P = D/2 in `cos_NP`), T tokens, C keys of a query,
R blocks of queries, H query heads, K key/value heads, G = H // K, D head size, M = (H + 2 K) D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.generate.on_device import copy_to
from minorca.model.attention import PackedAttention, visible
from minorca_kernels import (
    decode_attention,
    decode_positions,
    read_span,
    rope,
    rope_into_cache,
    rope_tables,
    span_of,
)
from minorca_kernels.operator import uses_triton

# the cache imports this file
if TYPE_CHECKING:
    from minorca.generate.kv_cache import KVCache


class Segment(NamedTuple):
    """A slot's next tokens: positions [start, stop), and the pages of these and of all before them."""

    pages: list[int]
    start: int
    stop: int


class PrefillAttention:
    """Attention of some slots' next tokens to themselves and to the cached tokens before them."""

    def __init__(self, cache: KVCache, segments: list[Segment], rows: int):
        size = cache.tree.size
        self.cache = cache
        self.tokens = sum(segment.stop - segment.start for segment in segments)
        empty = rows - self.tokens
        positions, index = [], []
        for pages, start, stop in segments:
            position_T = torch.arange(start, stop)
            positions.append(position_T)
            index.append(torch.tensor(pages)[position_T // size] * size + position_T % size)
        # What fills the rows up goes into the page that is nobody's.
        positions.append(torch.zeros(empty, dtype=torch.int64))
        index.append(torch.arange(empty) % size)
        self.positions, self.index_T = copy_to(cache.device, torch.stack([torch.cat(positions), torch.cat(index)]))
        self.attend = (_Documents if uses_triton(self.positions) else _Blocks)(cache, segments)

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """As `PackedAttention.rope_tables`."""
        return rope_tables(self.positions, head_dim, theta)

    def of_qkv(self, layer: int, qkv_TM: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """As `PackedAttention.of_qkv`."""
        k_PSKD, v_PSKD = self.cache.kv_L2PSKD[layer]
        q_THD, *new = rope(qkv_TM, cos_TP, sin_TP, heads, kv_heads)
        for pages_PSKD, new_TKD in zip((k_PSKD, v_PSKD), new):
            pages_PSKD.flatten(0, 1).index_copy_(0, self.index_T, new_TKD)
        out_THD = self.attend(layer, q_THD[: self.tokens], k_PSKD, v_PSKD)
        empty = len(q_THD) - self.tokens
        return F.pad(out_THD, (0, 0, 0, 0, 0, empty)) if empty else out_THD


class _Documents:
    """Each segment as a document with a past, for a GPU's kernels.

    The past begins with a page, whatever the chunk, so that the kernels' tiles of keys are those of the whole prompt.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]):
        size = cache.tree.size
        self.documents = []
        for pages, start, stop in segments:
            first = cache.tree.first_visible(start) * size
            attend = PackedAttention(None, stop - start, cache.window, cache.device, start - first)
            span = span_of(pages, size, first, stop)
            if isinstance(span.pages, Tensor):
                span = span._replace(pages=copy_to(cache.device, span.pages))
            self.documents.append((attend, span))

    def __call__(self, layer: int, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor) -> Tensor:
        parts = q_THD.split([len(attend.positions) for attend, _ in self.documents])
        outs = [
            attend(layer, q_THD, read_span(k_PSKD, span), read_span(v_PSKD, span))
            for q_THD, (attend, span) in zip(parts, self.documents)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Blocks:
    """Queries in blocks of a page, with the keys of each, for torch's flash kernel on the CPU.

    A block is always computed whole and with as many keys, whatever queries are wanted, so that no bit of a query's
    result depends on the chunk. The heads of a key head are the rows of one product.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]):
        window, dtype, size = cache.window, cache.kv_L2PSKD.dtype, cache.tree.size
        self.group = cache.group
        self.spans = []
        self.masks = []
        places = []
        for pages, start, stop in segments:
            for block in range(start // size, -(-stop // size)):
                begin, end = block * size, (block + 1) * size
                first = 0 if window is None else max(0, begin - window + 1) // size * size
                sees_SC = visible(torch.arange(begin, end), torch.arange(first, end), window)
                mask_SC = torch.zeros(sees_SC.shape, dtype=dtype).masked_fill_(~sees_SC, -torch.inf)
                self.masks.append(mask_SC.repeat(self.group, 1))
                places.append(torch.arange(max(begin, start), min(end, stop)) - begin + size * len(self.spans))
                self.spans.append(span_of(pages, size, first, end))
        # Of each token its row in the blocks.
        self.place_T = torch.cat(places)

    def __call__(self, layer: int, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        blocks, group, size = len(self.spans), self.group, k_PSKD.shape[1]
        heads, head_dim = q_THD.shape[1:]
        kv_heads = heads // group
        q_rows = q_THD.new_zeros(blocks * size, heads, head_dim).index_copy_(0, self.place_T, q_THD)
        q_RKGSD = q_rows.view(blocks, size, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        q_RKQD = q_RKGSD.reshape(blocks, kv_heads, group * size, head_dim)
        out_RKQD = torch.empty_like(q_RKQD)
        for n, (span, mask) in enumerate(zip(self.spans, self.masks)):
            k_1KCD, v_1KCD = (read_span(pages, span).transpose(0, 1)[None] for pages in (k_PSKD, v_PSKD))
            out_RKQD[n : n + 1] = flash(q_RKQD[n : n + 1], k_1KCD, v_1KCD, attn_mask=mask)[0]
        out_RKGSD = out_RKQD.view(blocks, kv_heads, group, size, head_dim)
        return out_RKGSD.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)[self.place_T]


class DecodeAttention:
    """Attention of one token a slot."""

    def __init__(self, cache: KVCache, lengths_N: Tensor):
        """Counts the new tokens into `lengths_N`."""
        self.cache = cache
        self.cos_NP, self.sin_NP, self.index_N, self.filled_N = decode_positions(
            lengths_N, cache.active_N, cache.frequencies_P, cache.table_NB, cache.tree.size
        )
        self.spans = cache.spans() if cache.device.type == "cpu" else None

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """As `PackedAttention.rope_tables`; the cache knows both numbers."""
        return self.cos_NP, self.sin_NP

    def of_qkv(self, layer: int, qkv_NM: Tensor, cos_NP: Tensor, sin_NP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """As `PackedAttention.of_qkv`; the cache knows the numbers of heads."""
        cache = self.cache
        k_PSKD, v_PSKD = cache.kv_L2PSKD[layer]
        caches = k_PSKD.flatten(0, 1), v_PSKD.flatten(0, 1)
        q_NHD = rope_into_cache(qkv_NM, cos_NP, sin_NP, *caches, self.index_N)
        return decode_attention(q_NHD, k_PSKD, v_PSKD, cache.table_NB, self.filled_N, cache.window, self.spans)
