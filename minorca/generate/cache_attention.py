"""Attention to the key/value cache: of prompts' next tokens, and of one token a slot.

A query's result does not depend on how a prompt was divided into chunks: on the CPU the queries of `BLOCK_PAGES` pages
are computed with all keys up to the end of these, most of which are masked at their beginning.

Axes in names: N slots, S positions of a page, P pages of the cache (P = D/2 in `cos_NP`), T tokens, R rows of all
blocks, Q queries of a block, C keys of a query, H query heads, K key/value heads, G = H // K, E = G Q, D head size,
M = (H + 2 K) D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.generate.on_device import copy_to, row_multiple
from minorca.model.attention import PackedAttention, visible
from minorca_kernels import (
    DecodeOnCPU,
    Span,
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


# Pages whose queries are computed together on the CPU. Of 768 rows or more, as of 256 queries and the 3 heads of a key
# head, torch's kernel takes 256 at a time instead of 64, and reads the keys less often.
BLOCK_PAGES = 2


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
        k_PSKD, v_PSKD = self.cache.layers[layer]
        q_THD, *new = rope(qkv_TM, cos_TP, sin_TP, heads, kv_heads)
        for pages_PSKD, new_TKD in zip((k_PSKD, v_PSKD), new):
            pages_PSKD.flatten(0, 1).index_copy_(0, self.index_T, new_TKD)
        out_THD = self.attend(layer, q_THD[: self.tokens], k_PSKD, v_PSKD)
        empty = len(q_THD) - self.tokens
        return F.pad(out_THD, (0, 0, 0, 0, 0, empty)) if empty else out_THD


class _Documents:
    """Each segment as a document with a past, for a GPU's kernels.

    The past and the queries begin with a page and end with one, whatever the chunk, so that the kernels' tiles, and the
    order of their sums, are those of the whole prompt; what is computed beyond the segment is dropped.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]):
        size = cache.tree.size
        self.lengths = [segment.stop - segment.start for segment in segments]
        self.documents = []
        for pages, start, stop in segments:
            first = cache.tree.first_visible(start) * size
            begin, end = start // size * size, -(-stop // size) * size
            attend = PackedAttention(None, end - begin, cache.window, cache.device, begin - first)
            span = span_of(pages, size, first, end)
            if span.pages is not None:
                span = span._replace(pages=copy_to(cache.device, span.pages))
            self.documents.append((attend, start - begin, end - stop, span))

    def __call__(self, layer: int, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor) -> Tensor:
        outs = []
        for q_QHD, (attend, before, after, span) in zip(q_THD.split(self.lengths), self.documents):
            whole_QHD = F.pad(q_QHD, (0, 0, 0, 0, before, after)) if before or after else q_QHD
            out_QHD = attend(layer, whole_QHD, read_span(k_PSKD, span), read_span(v_PSKD, span))
            outs.append(out_QHD[before : len(out_QHD) - after])
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Block(NamedTuple):
    """Queries, and the pages of keys that they see.

    Attributes:
        rows: of the queries among those of all blocks.
        whole: an even number of pages that all queries of the block see whole; None: there are none.
        edges: the others: the queries' own, and with a window those that it begins in.
        mask_EC: of the edges, what is added to the scores.
    """

    rows: slice
    whole: Span | None
    edges: Span
    mask_EC: Tensor


class _Blocks:
    """Queries in blocks of `BLOCK_PAGES`, for torch's flash kernel on the CPU.

    The pages that a block sees whole need no mask, which costs the kernel a quarter of its time, and are computed apart
    from the others, in two halves, so that two threads have as much to do where the key heads are odd. Which these are
    depends on the block alone, not on which of its queries are wanted, so that no bit of a query's result depends on
    the chunk. The heads of a key head are the rows of one product.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]):
        multiple = row_multiple(cache.device)
        size = BLOCK_PAGES * cache.tree.size
        self.group = cache.group
        self.dtype = cache.kv_L2PSKD.dtype
        self.blocks: list[_Block] = []
        self.rows = 0
        places = []
        for pages, start, stop in segments:
            for number in range(start // size, -(-stop // size)):
                first = max(number * size, start // multiple * multiple)
                last = min((number + 1) * size, -(-stop // multiple) * multiple)
                self.blocks.append(self._block(pages, torch.arange(first, last), cache))
                places.append(torch.arange(max(first, start), min(last, stop)) - first + self.rows)
                self.rows += last - first
        # Of each token its row in the blocks.
        self.place_T = torch.cat(places)

    def _block(self, pages: list[int], position_Q: Tensor, cache: KVCache) -> _Block:
        size, window = cache.tree.size, cache.window
        # pages: of the block [begin, end), before it from `first`, and from `whole` all are seen whole
        begin = int(position_Q[0]) // (BLOCK_PAGES * size) * BLOCK_PAGES
        end = begin + BLOCK_PAGES
        first = whole = 0
        if window is not None:
            first = max(0, begin * size - window + 1) // size
            whole = min(max(0, -(-(end * size - window) // size)), begin)
            whole += (begin - whole) % 2
        edges = [*range(first, whole), *range(begin, end)]
        position_C = torch.cat([torch.arange(edge * size, (edge + 1) * size) for edge in edges])
        sees_QC = visible(position_Q, position_C, window)
        mask_QC = torch.zeros(sees_QC.shape, dtype=self.dtype).masked_fill_(~sees_QC, -torch.inf)
        # In place of a page that the sequence does not have yet, which is masked, its last one.
        edge_pages = [pages[min(edge, len(pages) - 1)] for edge in edges]
        return _Block(
            slice(self.rows, self.rows + len(position_Q)),
            span_of(pages, size, whole * size, begin * size) if whole < begin else None,
            span_of(edge_pages, size, 0, len(edges) * size),
            mask_QC.repeat(self.group, 1),
        )

    def __call__(self, layer: int, q_THD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor) -> Tensor:
        heads, head_dim = q_THD.shape[1:]
        kv_heads = heads // self.group
        q_RHD = q_THD.new_zeros(self.rows, heads, head_dim).index_copy_(0, self.place_T, q_THD)
        out_RHD = torch.empty_like(q_RHD)
        for block in self.blocks:
            q_QKGD = q_RHD[block.rows].view(-1, kv_heads, self.group, head_dim)
            q_1KED = q_QKGD.permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_dim)
            out_1KED, lse_1KE = _flash(q_1KED, k_PSKD, v_PSKD, block.edges, 1, block.mask_EC)
            if block.whole is not None:
                halves_2KED, lse_2KE = _flash(q_1KED, k_PSKD, v_PSKD, block.whole, 2)
                share_3KE1 = torch.cat([lse_1KE, lse_2KE]).softmax(0)[..., None]
                out_1KED = out_1KED * share_3KE1[:1]
                for half_KED, share_KE1 in zip(halves_2KED, share_3KE1[1:]):
                    out_1KED += half_KED * share_KE1
            out_KGQD = out_1KED.view(kv_heads, self.group, -1, head_dim)
            out_RHD[block.rows].view(-1, kv_heads, self.group, head_dim).copy_(out_KGQD.permute(2, 0, 1, 3))
        return out_RHD[self.place_T]


def _flash(
    q_1KED: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, span: Span, parts: int, mask_EC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to equal parts of a span's keys, and the logarithms of the sums of exponentials [parts, K, E]."""
    kv_heads, head_dim = k_PSKD.shape[2:]
    k_NKCD, v_NKCD = (
        read_span(pages, span).view(parts, -1, kv_heads, head_dim).transpose(1, 2) for pages in (k_PSKD, v_PSKD)
    )
    q_NKED = q_1KED.expand(parts, -1, -1, -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q_NKED, k_NKCD, v_NKCD, attn_mask=mask_EC)


class DecodeAttention:
    """Attention of one token a slot."""

    def __init__(self, cache: KVCache, lengths_N: Tensor):
        """Counts the new tokens into `lengths_N`."""
        self.cache = cache
        self.cos_NP, self.sin_NP, self.index_N, self.filled_N = decode_positions(
            lengths_N, cache.active_N, cache.frequencies_P, cache.table_NB, cache.tree.size
        )
        self.on_cpu = None
        if not uses_triton(lengths_N):
            self.on_cpu = DecodeOnCPU(self.cos_NP, self.sin_NP, self.index_N, cache.spans())

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """As `PackedAttention.rope_tables`; the cache knows both numbers."""
        return self.cos_NP, self.sin_NP

    def of_qkv(self, layer: int, qkv_NM: Tensor, cos_NP: Tensor, sin_NP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """As `PackedAttention.of_qkv`; the cache knows the numbers of heads."""
        cache = self.cache
        k_PSKD, v_PSKD = cache.layers[layer]
        if self.on_cpu is not None:
            return self.on_cpu(qkv_NM, k_PSKD, v_PSKD)
        caches = k_PSKD.flatten(0, 1), v_PSKD.flatten(0, 1)
        q_NHD = rope_into_cache(qkv_NM, cos_NP, sin_NP, *caches, self.index_N)
        return decode_attention(q_NHD, k_PSKD, v_PSKD, cache.table_NB, self.filled_N, cache.window)
