# Triton takes plain numbers for constexpr parameters.
# pyright: reportArgumentType=false
"""Attention of one query a sequence to a rolling buffer of keys and values, for generating a token at a time.

Source: Flash-Decoding (Dao et al. 2023): the filled slots are split among programs, whose partial outputs are combined
by their log-sum-exp. The query heads of a key head are the rows of one tile, so that keys and values, nearly all of
what is read, are read once. Nothing is atomic, so results repeat to the bit. For inference only: they have no backward.

Axes: N sequences, S slots of each, H query heads, K key heads (query head h reads key head h // (H // K)), G = H // K
query heads of a key head, D head size. In the CPU's implementation, a lowercase n is a group of sequences.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.attention import _INITIAL_MAX, _forward_inner, _load_rows, _store_rows, unit_stride
from minorca_kernels.operator import accumulate_dtype, compute_capability, multiprocessor_count, operator, uses_triton

# Filled slots of a split: a constant, so that no bit of a sequence's result depends on the others. Partial outputs are
# then a sixty-fourth of the keys and values of 8 heads of 128 in bf16, if 4 query heads share each. At 32 x 4,096 slots
# on an H200, splits of 128 took 1.26 times as long as a number of splits chosen to fill the GPU.
SPLIT = 256
# Partial outputs that one program combines at once.
BLOCK_SPLITS = 16


def decode_attention_definition(q_NHD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, lengths_N: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the filled slots of each sequence's own buffer.

    Args:
        q_NHD: queries [N, H, D].
        k_NSKD: keys [N, S, K, D], rotated already, so that their order does not matter.
        v_NSKD: values [N, S, K, D].
        lengths_N: integers [N]. Sequence n sees the slots [0, lengths[n]), all S where it is longer; 0 gives zeros.

    Returns:
        [N, H, D] in q's dtype; scores and softmax are in fp32 (fp64 for fp64).
    """
    slots, kv_heads, head_dim = k_NSKD.shape[1:]
    dtype = accumulate_dtype(q_NHD.dtype)
    empty_NS = torch.arange(slots, device=q_NHD.device) >= lengths_N[:, None]
    empty_N11S = empty_NS[:, None, None]
    q_NKGD = q_NHD.unflatten(1, (kv_heads, -1)).to(dtype)
    scores_NKGS = torch.einsum("nkgd,nskd->nkgs", q_NKGD, k_NSKD.to(dtype)) * head_dim**-0.5
    weights_NKGS = scores_NKGS.masked_fill(empty_N11S, -torch.inf).softmax(-1).masked_fill(empty_N11S, 0)
    # an empty slot may hold NaN, and 0 * NaN is NaN
    v_NSKD = v_NSKD.to(dtype).masked_fill(empty_NS[..., None, None], 0)
    return torch.einsum("nkgs,nskd->nkgd", weights_NKGS, v_NSKD).flatten(1, 2).to(q_NHD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# Lengths are read on the device alone and the grid depends on shapes alone, so a CUDA graph of a step fits all later
# steps. The programs of a key head take the splits of all sequences in turn, so that each has as much to do as the
# others, whether one sequence is long or all are: a split is SPLIT filled slots of a sequence.


@triton.jit
def _load_filled(lengths_ptr, n, mask, S):
    """The number of filled slots of sequence n, or of several."""
    return tl.minimum(tl.load(lengths_ptr + n, mask=mask, other=0), S).to(tl.int32)


# `max_splits` is not specialised, so that the code compiled without a GPU is the code that runs on one.
@triton.jit(do_not_specialize=["max_splits"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, partial_out_ptr, lse2_ptr, S, max_splits,
    stride_q_row, stride_q_head, stride_k_row, stride_k_slot, stride_k_head, stride_v_row, stride_v_slot, stride_v_head,
    SCALE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    N: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    # The heads of a slot are adjacent in memory, and so run side by side.
    kv_head = tl.program_id(0).to(tl.int64)
    q_ptr += kv_head * GROUP * stride_q_head
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    acc_dtype: tl.constexpr = lse2_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M)
    sequence = tl.arange(0, BLOCK_SEQUENCES)
    splits = tl.cdiv(_load_filled(lengths_ptr, sequence, sequence < N, S), SPLIT)
    # Splits are counted through all sequences.
    ends = tl.cumsum(splits, 0)
    for item in range(tl.program_id(1), tl.sum(splits, 0), tl.num_programs(1)):
        n = tl.sum((ends <= item).to(tl.int64), 0)
        split = item - tl.max(tl.where(ends <= item, ends, 0), 0)
        begin = split * SPLIT
        end = tl.minimum(begin + SPLIT, _load_filled(lengths_ptr, n, True, S))
        q = _load_rows(q_ptr + n * stride_q_row, tl.minimum(row, GROUP - 1), stride_q_head, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], acc_dtype)
        m_i = tl.full([BLOCK_M], _INITIAL_MAX, acc_dtype)
        l_i = tl.zeros([BLOCK_M], acc_dtype)
        first = tl.full([BLOCK_M], begin, tl.int32)
        last = tl.full([BLOCK_M], end - 1, tl.int32)
        tiles = tl.cdiv(end - begin, BLOCK_N)
        acc, m_i, l_i = _forward_inner(
            acc, m_i, l_i, q, last, first, None, k_ptr + n * stride_k_row, v_ptr + n * stride_v_row,
            (begin, tiles, ()),
            end, stride_k_slot, stride_v_slot, SCALE, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
        offset = (n * K + kv_head) * GROUP * max_splits + split
        _store_rows(partial_out_ptr + offset * D, row, GROUP, max_splits * D, acc / l_i[:, None], D, BLOCK_D)
        tl.store(lse2_ptr + offset + row * max_splits, m_i + tl.log2(l_i), mask=row < GROUP)


@triton.jit(do_not_specialize=["max_splits"])
def _combine_kernel(
    partial_out_ptr,
    lse2_ptr,
    lengths_ptr,
    out_ptr,
    S,
    max_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    head = n * H + tl.program_id(0)
    splits = tl.cdiv(_load_filled(lengths_ptr, n, True, S), SPLIT)
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


def _decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = unit_stride(q, k, v)
    sequences, heads, head_dim = q.shape
    slots, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    # a product takes at least 16 rows
    block_m = max(triton.next_power_of_2(group), 16)
    max_splits = triton.cdiv(slots, SPLIT)
    # two programs a multiprocessor, at most as many as there may be splits
    programs = min(max(2 * multiprocessor_count(q.device) // kv_heads, 1), sequences * max_splits)
    out = q.new_empty(q.shape)
    dtype = accumulate_dtype(q.dtype)
    partial_out = q.new_empty(sequences, heads, max_splits, head_dim, dtype=dtype)
    lse2 = q.new_empty(sequences, heads, max_splits, dtype=dtype)
    constants: dict[str, Any] = {"D": head_dim, "BLOCK_D": block_d, "SPLIT": SPLIT}
    split_constants = {"SCALE": head_dim**-0.5, "K": kv_heads, "GROUP": group, "BLOCK_M": block_m, **constants}
    split_constants |= {"N": sequences, "BLOCK_SEQUENCES": triton.next_power_of_2(sequences)}
    strides = *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]
    _split_kernel[kv_heads, programs](
        q, k, v, lengths, partial_out, lse2, slots, max_splits, *strides, **split_constants, **_tiles(q.dtype, block_d)
    )
    _combine_kernel[heads, sequences](
        partial_out, lse2, lengths, out, slots, max_splits, **constants, H=heads, BLOCK_SPLITS=BLOCK_SPLITS
    )
    return out


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def decode_groups(lengths: list[int], slots: int) -> list[tuple[int, int, int]]:
    """Groups adjacent sequences that have filled as many slots: (first sequence, one past the last, filled slots).

    On the CPU, `decode_attention` makes one call of torch's kernel a group, which reads the filled slots alone. The
    groups can be computed once for all layers.
    """
    groups = []
    start = 0
    for filled, members in itertools.groupby(min(length, slots) for length in lengths):
        stop = start + len(list(members))
        groups.append((start, stop, filled))
        start = stop
    return groups


def _decode_attention_torch(q: Tensor, k: Tensor, v: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """Torch's flash kernel, with the query heads of a key head as its queries.

    In bf16 that is six times as fast as one query and `enable_gqa`. The number of queries is padded to a multiple of 4:
    otherwise the scratch memory of torch's threads, which is one allocation, is not aligned to 16 bytes, and the last
    bits of a sum depend on which thread computes it, and so on the number of sequences.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    sequences, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q_NKGD = q.view(sequences, kv_heads, group, head_dim)
    if group % 4:
        q_NKGD = F.pad(q_NKGD, (0, 0, 0, -group % 4))
    outs = []
    for start, stop, filled in groups:
        q_nKGD = q_NKGD[start:stop]
        k_nKSD = k[start:stop, :filled].transpose(1, 2)
        v_nKSD = v[start:stop, :filled].transpose(1, 2)
        outs.append(flash(q_nKGD, k_nKSD, v_nKSD)[0] if filled else torch.zeros_like(q_nKGD))
    out_NKGD = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out_NKGD[:, :, :group].reshape(q.shape).contiguous()


# --------------------------------------------------------------------------------------------------------- operator


def _decode_attention_cpu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = unit_stride(q, k, v)
    return _decode_attention_torch(q, k, v, decode_groups(lengths.tolist(), k.shape[1]))


_decode_attention = operator(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths) -> Tensor",
    cuda=_decode_attention_triton,
    cpu=_decode_attention_cpu,
    fake=lambda q, k, v, lengths: q.new_empty(q.shape),
)


def decode_attention(
    q_NHD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, lengths_N: Tensor, groups: list[tuple[int, int, int]] | None = None
) -> Tensor:
    """`decode_attention_definition`, split among programs.

    No bit of a sequence's result depends on other sequences, or on the contents or number of empty slots.

    Args:
        q_NHD: like k and v, it may be a view; with groups, its last stride is 1.
        groups: `decode_groups` of the lengths, which the CPU otherwise computes for each layer; CUDA ignores them.
    """
    if groups is None or uses_triton(q_NHD):
        return _decode_attention(q_NHD, k_NSKD, v_NSKD, lengths_N)
    return _decode_attention_torch(q_NHD, k_NSKD, v_NSKD, groups)
