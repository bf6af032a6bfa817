"""Attention of one query a sequence to a rolling buffer of keys and values: what a generated token costs beside the weights.

Source: Flash-Decoding (Dao et al. 2023): the filled slots are split among programs, and their parts are put together by their
log-sum-exp. The query heads of a key head are the rows of one tile, so that keys and values, nearly all of what is read, are
read once. Nothing is atomic, so results repeat to the bit. For inference: there are no gradients.
Axes: N sequences, S slots of each, H query heads, K key heads (query head h reads key head h // (H // K)), D head size.
"""

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.attention import _LOWEST, _adjacent, _forward_keys, _load, _store
from minorca_kernels.operator import architecture, operator, processors, uses_triton, wide

MOST_SPLITS = 64  # whose parts one program puts together at once


def decode_attention_definition(q_NHD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, lengths_N: Tensor) -> Tensor:
    """Row n sees the slots [0, lengths[n]) of its own buffer, all S where it is longer: softmax of q k^T / sqrt(D) over those,
    times v -> [N, H, D]. A row of length 0 gives zeros.

    Scores and softmax in fp32 (fp64 for fp64). lengths are integers; keys come rotated, so that their order does not matter.
    """
    dtype, (slots, kv_heads, size) = wide(q_NHD.dtype), k_NSKD.shape[1:]
    unseen_NS = torch.arange(slots, device=q_NHD.device) >= lengths_N[:, None]
    scores_NKGS = (
        torch.einsum("nkgd,nskd->nkgs", q_NHD.unflatten(1, (kv_heads, -1)).to(dtype), k_NSKD.to(dtype)) * size**-0.5
    )
    weights_NKGS = (
        scores_NKGS.masked_fill(unseen_NS[:, None, None], -torch.inf)
        .softmax(-1)
        .masked_fill(unseen_NS[:, None, None], 0)
    )
    seen_v_NSKD = v_NSKD.to(dtype).masked_fill(unseen_NS[..., None, None], 0)  # 0 times what is there may be NaN
    return torch.einsum("nkgs,nskd->nkgd", weights_NKGS, seen_v_NSKD).flatten(1, 2).to(q_NHD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# Lengths are read on the device alone and the grid is one of shapes, so a CUDA graph of a step fits all later steps. A split
# does a contiguous part of what its own row has filled: of a short row in a large buffer too, all of them do some.


@triton.jit
def _part(lengths, n, S, splits, BN: tl.constexpr):
    """The row's filled slots, and how many of them a split does: whole blocks."""
    filled = tl.minimum(tl.load(lengths + n), S).to(tl.int32)
    return filled, tl.cdiv(tl.cdiv(filled, splits), BN) * BN


@triton.jit(do_not_specialize=["splits"])  # what is compiled without a GPU is what runs on one
def _decode_part(
    q, k, v, lengths, parts, lse2, S, splits, q_row, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head,
    SCALE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # the heads of a slot lie side by side, and so run
    kv_head, split, n = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    filled, length = _part(lengths, n, S, splits, BN)
    begin = split * length
    end = tl.minimum(begin + length, filled)
    if begin >= end:
        return
    wide: tl.constexpr = lse2.dtype.element_ty
    row = tl.arange(0, BM)
    q_tile = _load(q + n * q_row + kv_head * GROUP * q_head, tl.minimum(row, GROUP - 1), q_head, D, BD)
    total = tl.zeros([BM, BD], wide)
    peak = tl.full([BM], _LOWEST, wide)
    mass = tl.zeros([BM], wide)
    first_row, last_row = tl.full([BM], begin, tl.int32), tl.full([BM], end - 1, tl.int32)
    tiles = tl.cdiv(end - begin, BN)
    total, peak, mass = _forward_keys(
        total, peak, mass, q_tile, last_row, first_row, k + n * k_row + kv_head * k_head, v + n * v_row + kv_head * v_head,
        begin, tiles, tiles, 0, end, k_slot, v_slot, SCALE, D, BD, BN, True,
    )  # fmt: skip
    place = (n * K + kv_head) * GROUP * splits + split
    _store(parts + place * D, row, GROUP, splits * D, total / mass[:, None], D, BD)
    tl.store(lse2 + place + row * splits, peak + tl.log2(mass), mask=row < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _decode_combine(
    parts,
    lse2,
    lengths,
    out,
    S,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    head = n * H + tl.program_id(0)
    filled, length = _part(lengths, n, S, splits, BN)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BD)
    used = split * length < filled  # the others have written nothing
    score = tl.load(lse2 + head * splits + split, mask=used, other=float("-inf"))
    weight = tl.exp2(score - tl.maximum(tl.max(score, 0), _LOWEST))
    inside = used[:, None] & (d < D)[None, :]
    part = tl.load(parts + (head * splits + split)[:, None] * D + d[None, :], mask=inside, other=0.0)
    # the sum of the weights is at least that of the largest, 1, but where nothing is filled
    total = tl.sum(weight[:, None] * part, 0) / tl.maximum(tl.sum(weight, 0), 1.0)
    tl.store(out + head * D + d, total.to(out.dtype.element_ty), mask=d < D)


def _tiles(dtype: torch.dtype, block: int) -> dict[str, int]:
    """For heads padded to `block`; none spills a register on the GPUs that benchmarks.compiled knows."""
    if architecture() < 80:  # 64 KiB a block
        keys, warps, stages = 16, 8, 1
    elif dtype in (torch.bfloat16, torch.float16):
        keys, warps, stages = min(max(8192 // block, 16), 64), 4, 3  # 16 KiB of keys a turn
    else:
        keys, warps, stages = 32, 8, 2
    return {"BN": keys, "num_warps": warps, "num_stages": stages}


def _decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = _adjacent(q, k, v)
    (sequences, heads, size), (slots, kv_heads) = q.shape, k.shape[1:3]
    group, block = heads // kv_heads, max(triton.next_power_of_2(size), 16)
    splits = min(max(2 * processors(q.device) // (sequences * kv_heads), 1), MOST_SPLITS)  # two programs a processor
    out, dtype = q.new_empty(q.shape), wide(q.dtype)
    parts, lse2 = (
        q.new_empty(sequences, heads, splits, size, dtype=dtype),
        q.new_empty(sequences, heads, splits, dtype=dtype),
    )
    constants = {"D": size, "BD": block} | _tiles(q.dtype, block)
    _decode_part[kv_heads, splits, sequences](
        q, k, v, lengths, parts, lse2, slots, splits, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        SCALE=size**-0.5, K=kv_heads, GROUP=group, BM=max(triton.next_power_of_2(group), 16),  # no product has fewer rows
        **constants,
    )  # fmt: skip
    _decode_combine[heads, sequences](
        parts, lse2, lengths, out, slots, splits, H=heads, SPLITS=MOST_SPLITS, **constants
    )
    return out


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def decode_groups(lengths: list[int], slots: int) -> list[tuple[int, int, int]]:
    """Neighbours that have filled as many slots share a call of torch's kernel, as (first row, behind the last, filled slots):
    what `decode_attention` does on the CPU, prepared once for all layers. A call reads what is filled and no more."""
    groups, start = [], 0
    for filled, rows in itertools.groupby(min(length, slots) for length in lengths):
        groups.append((start, start := start + len(list(rows)), filled))
    return groups


def _decode_attention_torch(q: Tensor, k: Tensor, v: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """The query heads of a key head are torch's queries: six times as fast in bf16 as one query and `enable_gqa`.

    Their number is filled up to a multiple of 4. Else the scratch memory of torch's threads, which lies side by side, is not
    aligned to 16 bytes, and the last bits of a sum depend on which thread computes it, and so on how many rows there are.
    """
    flash, (rows, heads, size), kv_heads = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        q.shape,
        k.shape[2],
    )
    group, outs = heads // kv_heads, []
    q_NKGD = q.view(rows, kv_heads, group, size)
    if group % 4:
        q_NKGD = F.pad(q_NKGD, (0, 0, 0, -group % 4))
    for start, stop, filled in groups:
        q_nKGD, k_nKSD, v_nKSD = (
            q_NKGD[start:stop],
            k[start:stop, :filled].transpose(1, 2),
            v[start:stop, :filled].transpose(1, 2),
        )
        outs.append(flash(q_nKGD, k_nKSD, v_nKSD)[0] if filled else torch.zeros_like(q_nKGD))
    out_NKGD = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out_NKGD[:, :, :group].reshape(q.shape).contiguous()


# --------------------------------------------------------------------------------------------------------- operator

_decode_attention = operator(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths) -> Tensor",
    cuda=_decode_attention_triton,
    cpu=lambda q, k, v, lengths: _decode_attention_torch(
        *_adjacent(q, k, v), decode_groups(lengths.tolist(), k.shape[1])
    ),
    fake=lambda q, k, v, lengths: q.new_empty(q.shape),
)


def decode_attention(
    q_NHD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, lengths_N: Tensor, groups: list[tuple[int, int, int]] | None = None
) -> Tensor:
    """`decode_attention_definition`, split among programs. Queries, keys and values may be views; with groups, D innermost.

    No bit of a row depends on what other rows hold or how long they are, nor on what lies in slots that are not filled; on
    CUDA it does on how many rows there are.
    groups: `decode_groups` of the lengths, which on the CPU saves the same for every layer; CUDA needs none.
    """
    if groups is None or uses_triton(q_NHD):
        return _decode_attention(q_NHD, k_NSKD, v_NSKD, lengths_N)
    return _decode_attention_torch(q_NHD, k_NSKD, v_NSKD, groups)
