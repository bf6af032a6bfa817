# Triton takes plain numbers for constexpr parameters.
# pyright: reportArgumentType=false
"""Attention of one query a sequence to keys and values in pages, for generating a token at a time.

A sequence's keys and values lie in pages of S positions; its page table says which page holds its positions
[0, S), [S, 2 S) and so on, so that sequences can share the pages of a common beginning (PagedAttention, Kwon et al.
2023, arXiv:2309.06180). Source of the split: Flash-Decoding (Dao et al. 2023): the filled positions are split among
programs, whose partial outputs are combined by their log-sum-exp. The query heads of a key head are the rows of one
tile, so that keys and values, nearly all of what is read, are read once. Nothing is atomic, so results repeat to the
bit. For inference only: they have no backward.

Axes: N sequences, P pages, S positions of a page, B pages of a sequence, H query heads, K key heads (query head h reads
key head h // (H // K)), G = H // K query heads of a key head, D head size, C the visible positions of one sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.attention import _INITIAL_MAX, _accumulate, _load_rows, _store_rows, unit_stride
from minorca_kernels.dot import dot
from minorca_kernels.operator import accumulate_dtype, compute_capability, multiprocessor_count, operator

# Filled positions of a split, which lie at absolute positions: constants, so that no bit of a sequence's result depends
# on the others. Partial outputs are then a sixty-fourth of the keys and values of 8 heads of 128 in bf16, if 4 query
# heads share each. At 32 x 4,096 positions on an H200, splits of 128 took 1.26 times as long as a number of splits
# chosen to fill the GPU.
SPLIT = 256
# Partial outputs that one program combines at once.
BLOCK_SPLITS = 16


def decode_attention_definition(
    q_NHD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, table_NB: Tensor, lengths_N: Tensor, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the last `window` positions of each sequence.

    Args:
        q_NHD: queries [N, H, D].
        k_PSKD: pages of keys [P, S, K, D], rotated already.
        v_PSKD: pages of values [P, S, K, D].
        table_NB: integers [N, B], the page of a sequence's positions [b S, (b + 1) S); pages of which no position is
            visible may be any.
        lengths_N: integers [N]. Sequence n sees the positions [max(0, lengths[n] - window), lengths[n]); 0 gives zeros.
        window: positions that a query sees, its own included; None: all.

    Returns:
        [N, H, D] in q's dtype; scores and softmax are in fp32 (fp64 for fp64).
    """
    kv_heads, head_dim = k_PSKD.shape[2:]
    dtype = accumulate_dtype(q_NHD.dtype)
    k_NCKD, v_NCKD = (pages[table_NB.long()].flatten(1, 2).to(dtype) for pages in (k_PSKD, v_PSKD))
    position_C = torch.arange(k_NCKD.shape[1], device=q_NHD.device)
    hidden_NC = position_C >= lengths_N[:, None]
    if window is not None:
        hidden_NC |= position_C < lengths_N[:, None] - window
    hidden_N11C = hidden_NC[:, None, None]
    q_NKGD = q_NHD.unflatten(1, (kv_heads, -1)).to(dtype)
    scores_NKGC = torch.einsum("nkgd,nckd->nkgc", q_NKGD, k_NCKD) * head_dim**-0.5
    weights_NKGC = scores_NKGC.masked_fill(hidden_N11C, -torch.inf).softmax(-1).masked_fill(hidden_N11C, 0)
    # a position that is hidden may hold NaN, and 0 * NaN is NaN
    v_NCKD = v_NCKD.masked_fill(hidden_NC[..., None, None], 0)
    return torch.einsum("nkgc,nckd->nkgd", weights_NKGC, v_NCKD).flatten(1, 2).to(q_NHD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# Lengths are read on the device alone and the grid depends on shapes alone, so a CUDA graph of a step fits all later
# steps. The programs of a key head take the splits of all sequences in turn, so that each has as much to do as the
# others, whether one sequence is long or all are: a split is SPLIT filled slots of a sequence.


@triton.jit
def _visible(lengths_ptr, n, mask, WINDOW: tl.constexpr):
    """Of sequence n, or of several: the first visible position, and one past the last. WINDOW: 0 for none."""
    length = tl.load(lengths_ptr + n, mask=mask, other=0).to(tl.int32)
    return tl.maximum(length - WINDOW, 0) if WINDOW else length * 0, length


@triton.jit
def _splits(first, length, SPLIT: tl.constexpr):
    """The split of the first visible position, and the number of splits from there on."""
    return first // SPLIT, tl.cdiv(length, SPLIT) - first // SPLIT


# `max_splits` is not specialised, so that the code compiled without a GPU is the code that runs on one.
@triton.jit(do_not_specialize=["max_splits"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, partial_out_ptr, lse2_ptr, max_splits,
    stride_q_row, stride_q_head, stride_k_page, stride_k_slot, stride_k_head, stride_v_page, stride_v_slot,
    stride_v_head, stride_table,
    SCALE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, N: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    # The heads of a slot are adjacent in memory, and so run side by side.
    kv_head = tl.program_id(0).to(tl.int64)
    q_ptr += kv_head * GROUP * stride_q_head
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    acc_dtype: tl.constexpr = lse2_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    sequence = tl.arange(0, BLOCK_SEQUENCES)
    firsts, lengths = _visible(lengths_ptr, sequence, sequence < N, WINDOW)
    _, splits = _splits(firsts, lengths, SPLIT)
    # Splits are counted through all sequences.
    ends = tl.cumsum(splits, 0)
    for item in range(tl.program_id(1), tl.sum(splits, 0), tl.num_programs(1)):
        n = tl.sum((ends <= item).to(tl.int64), 0)
        # among the visible splits of its sequence
        index = item - tl.max(tl.where(ends <= item, ends, 0), 0)
        first, length = _visible(lengths_ptr, n, True, WINDOW)
        begin = (_splits(first, length, SPLIT)[0] + index) * SPLIT
        end = tl.minimum(begin + SPLIT, length)
        # tiles lie at absolute positions too
        start = tl.maximum(begin, first // BLOCK_N * BLOCK_N)
        q = _load_rows(q_ptr + n * stride_q_row, tl.minimum(row, GROUP - 1), stride_q_head, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], acc_dtype)
        m_i = tl.full([BLOCK_M], _INITIAL_MAX, acc_dtype)
        l_i = tl.zeros([BLOCK_M], acc_dtype)
        pages_ptr = table_ptr + n * stride_table
        for position in range(start, end, BLOCK_N):
            page = tl.load(pages_ptr + position // PAGE).to(tl.int64)
            key = position + tl.arange(0, BLOCK_N)
            slot = tl.minimum(key, end - 1) % PAGE
            k = _load_rows(k_ptr + page * stride_k_page, slot, stride_k_slot, D, BLOCK_D)
            visible = (first <= key) & (key < end)
            scores = tl.where(visible[None, :], dot(q, tl.trans(k), acc_dtype), float("-inf"))
            acc, m_i, l_i = _accumulate(
                acc, m_i, l_i, scores, v_ptr + page * stride_v_page, slot, stride_v_slot, SCALE, D, BLOCK_D
            )
        offset = (n * K + kv_head) * GROUP * max_splits + index
        _store_rows(partial_out_ptr + offset * D, row, GROUP, max_splits * D, acc / l_i[:, None], D, BLOCK_D)
        tl.store(lse2_ptr + offset + row * max_splits, m_i + tl.log2(l_i), mask=row < GROUP)


@triton.jit(do_not_specialize=["max_splits"])
def _combine_kernel(
    partial_out_ptr,
    lse2_ptr,
    lengths_ptr,
    out_ptr,
    max_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    head = n * H + tl.program_id(0)
    first, length = _visible(lengths_ptr, n, True, WINDOW)
    _, splits = _splits(first, length, SPLIT)
    d = tl.arange(0, BLOCK_D)
    acc_dtype: tl.constexpr = lse2_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_D], acc_dtype)
    m_i = tl.full([1], _INITIAL_MAX, acc_dtype)
    l_i = tl.zeros([1], acc_dtype)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        # the other splits have written nothing
        written = split < splits
        lse2 = tl.load(lse2_ptr + head * max_splits + split, mask=written, other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(lse2, 0, keep_dims=True))
        weight = tl.exp2(lse2 - m_new)
        rescale = tl.exp2(m_i - m_new)
        mask = written[:, None] & (d < D)[None, :]
        partial_out = tl.load(partial_out_ptr + (head * max_splits + split)[:, None] * D + d[None, :], mask, other=0.0)
        acc = acc * rescale + tl.sum(weight[:, None] * partial_out, 0)
        l_i = l_i * rescale + tl.sum(weight, 0, keep_dims=True)
        m_i = m_new
    # the largest weight is 1, so the sum is at least 1 unless nothing is filled
    out = acc / tl.maximum(l_i, 1.0)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def _tiles(dtype: torch.dtype, block_d: int) -> dict[str, int]:
    """For heads padded to `block_d`; no kernel spills registers on the GPUs of benchmarks.compiled."""
    if compute_capability() < 80:
        # a block has 64 KiB of shared memory
        block_n, warps, stages = 16, 8, 1
    elif dtype in (torch.bfloat16, torch.float16):
        # 16 KiB of keys at a time
        block_n, warps, stages = min(max(8192 // block_d, 16), 64), 4, 3
    else:
        block_n, warps, stages = 32, 4, 2
    return {"BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _decode_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    q, k, v, table = unit_stride(q, k, v, table)
    sequences, heads, head_dim = q.shape
    page, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    # a product takes at least 16 rows
    block_m = max(triton.next_power_of_2(group), 16)
    positions = table.shape[1] * page
    max_splits = triton.cdiv(positions, SPLIT)
    if window is not None:
        # one more, where the window begins within a split
        max_splits = min(max_splits, triton.cdiv(window, SPLIT) + 1)
    # two programs a multiprocessor, at most as many as there may be splits
    programs = min(max(2 * multiprocessor_count(q.device) // kv_heads, 1), sequences * max_splits)
    out = q.new_empty(q.shape)
    dtype = accumulate_dtype(q.dtype)
    partial_out = q.new_empty(sequences, heads, max_splits, head_dim, dtype=dtype)
    lse2 = q.new_empty(sequences, heads, max_splits, dtype=dtype)
    constants: dict[str, Any] = {"D": head_dim, "BLOCK_D": block_d, "SPLIT": SPLIT, "WINDOW": window or 0}
    split_constants = {"SCALE": head_dim**-0.5, "K": kv_heads, "GROUP": group, "BLOCK_M": block_m, **constants}
    split_constants |= {"N": sequences, "BLOCK_SEQUENCES": triton.next_power_of_2(sequences), "PAGE": page}
    tiles = _tiles(q.dtype, block_d)
    # a tile lies in one page
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], page)
    strides = *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], table.stride(0)
    _split_kernel[kv_heads, programs](
        q, k, v, table, lengths, partial_out, lse2, max_splits, *strides, **split_constants, **tiles
    )
    _combine_kernel[heads, sequences](
        partial_out, lse2, lengths, out, max_splits, **constants, H=heads, BLOCK_SPLITS=BLOCK_SPLITS
    )
    return out


# ----------------------------------------------------------------------------------------------------- plain PyTorch


class Span(NamedTuple):
    """Where a sequence's keys lie that a query sees: positions [start, stop) of these pages, laid end to end; None: of
    all pages, as where those of the sequence are adjacent.
    """

    pages: Tensor | None
    start: int
    stop: int


def span_of(pages: Sequence[int], size: int, start: int, stop: int) -> Span:
    """Of a sequence whose positions [b size, (b + 1) size) are in pages[b], the positions [start, stop)."""
    first = start // size
    used = pages[first : -(-stop // size)]
    if used and all(page == used[0] + place for place, page in enumerate(used)):
        offset = (used[0] - first) * size
        return Span(None, offset + start, offset + stop)
    return Span(torch.tensor(used, dtype=torch.int64), start - first * size, stop - first * size)


def read_span(pages_PSKD: Tensor, span: Span) -> Tensor:
    """Its keys or values [C, K, D]: a view where its pages are adjacent."""
    chosen = pages_PSKD if span.pages is None else pages_PSKD.index_select(0, span.pages)
    return chosen.flatten(0, 1)[span.start : span.stop]


def decode_spans(tables: Sequence[Sequence[int]], lengths: Sequence[int], size: int, window: int | None) -> list[Span]:
    """What each sequence's query sees. On the CPU they are computed once for all layers."""
    return [
        span_of(pages, size, 0 if window is None else max(0, length - window), length)
        for pages, length in zip(tables, lengths)
    ]


# Of another number of queries the scratch memory of the flash kernel's threads, which is one allocation, is not aligned
# to 16 bytes, and the last bits of a sum depend on which thread computes it.
FLASH_QUERIES = 4


def attend_to_spans(q_NKED: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, spans: list[Span], group: int) -> Tensor:
    """Torch's flash kernel, with the query heads of a key head as its queries -> [N, H, D].

    In bf16 that is six times as fast as one query and `enable_gqa`.

    Args:
        q_NKED: E is a multiple of `FLASH_QUERIES`; the first `group` queries of a key head are its own.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    sequences, kv_heads, padded, head_dim = q_NKED.shape
    # of all pages: one call then gives a sequence's, where they are adjacent
    caches = [pages.flatten(0, 1).transpose(0, 1)[None] for pages in (k_PSKD, v_PSKD)]
    outs = []
    for span, q_1KED in zip(spans, q_NKED.split(1)):
        if not span.stop:
            outs.append(q_NKED.new_zeros(1, kv_heads, padded, head_dim))
            continue
        if span.pages is None:
            k_1KCD, v_1KCD = (cache.narrow(2, span.start, span.stop - span.start) for cache in caches)
        else:
            k_1KCD, v_1KCD = (read_span(pages, span).transpose(0, 1)[None] for pages in (k_PSKD, v_PSKD))
        outs.append(flash(q_1KED, k_1KCD, v_1KCD)[0])
    return torch.cat(outs).narrow(2, 0, group).reshape(sequences, -1, head_dim).contiguous()


# --------------------------------------------------------------------------------------------------------- operator


def _decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    q, k, v = unit_stride(q, k, v)
    q_NKGD = q.unflatten(1, (k.shape[2], -1))
    group = q_NKGD.shape[2]
    q_NKED = F.pad(q_NKGD, (0, 0, 0, -group % FLASH_QUERIES))
    spans = decode_spans(table.tolist(), lengths.tolist(), k.shape[1], window)
    return attend_to_spans(q_NKED, k, v, spans, group)


_decode_attention = operator(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor lengths, int? window) -> Tensor",
    cuda=_decode_attention_triton,
    cpu=_decode_attention_cpu,
    fake=lambda q, k, v, table, lengths, window: q.new_empty(q.shape),
)


def decode_attention(
    q_NHD: Tensor, k_PSKD: Tensor, v_PSKD: Tensor, table_NB: Tensor, lengths_N: Tensor, window: int | None = None
) -> Tensor:
    """`decode_attention_definition`, split among programs; S must be a power of two from 16.

    No bit of a sequence's result depends on other sequences, on which pages hold it, or on what is not visible.

    Args:
        q_NHD: like k and v, it may be a view.
    """
    return _decode_attention(q_NHD, k_PSKD, v_PSKD, table_NB, lengths_N, window)
