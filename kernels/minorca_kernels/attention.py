"""Causal attention over a flat batch, its documents and its window written as one number a token: the first key it sees.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691): online softmax, and a backward from the saved log-sum-exp. Neither
direction uses atomics, so results repeat to the bit: a kernel writes dQ for its queries, another dK and dV for its keys.
Axes: T tokens, H query heads, K key heads (query head h reads key head h // (H // K)), D head size; S tokens of which the keys
are held, of which the queries are the last T: more than T where a prompt comes in chunks, and then forward only.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot, dot
from minorca_kernels.operator import architecture, operator, wide

QUERY_BLOCK = 256  # queries that share a mask on the CPU, where a window is active
GRADIENT_BLOCK = 64  # queries of one turn of the CPU's backward: their scores stay in its cache


def attention_definition(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, first_T: Tensor) -> Tensor:
    """Row i, of token p = S - T + i, sees the keys j with first[i] <= j <= p: softmax of q k^T / sqrt(D) over those, times v -> [T, H, D].

    Scores and softmax in fp32 (fp64 for fp64). first is int32, rises or stays, and first[i] <= p.
    """
    dtype, group, token = (
        wide(q_THD.dtype),
        q_THD.shape[1] // k_SKD.shape[1],
        torch.arange(len(k_SKD), device=q_THD.device),
    )
    k_SHD, v_SHD = (t.repeat_interleave(group, 1).to(dtype) for t in (k_SKD, v_SKD))
    scores_HTS = torch.einsum("qhd,khd->hqk", q_THD.to(dtype), k_SHD) * q_THD.shape[-1] ** -0.5
    seen = (first_T[:, None] <= token) & (token <= token[len(token) - len(q_THD) :, None])
    weights_HTS = scores_HTS.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights_HTS, v_SHD).to(q_THD.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton
# A tile is BM queries by BN keys. A block of queries visits the tiles some query of it sees: first those not all of which is
# seen, at the near end (the diagonal) and the far one (a document's start or the window's edge), in one masked loop that
# jumps over the middle; then the middle, without a mask. So does a block of keys. Past the last token indices are clamped:
# what is read there is finite, masked where it would be summed, and never stored.

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4e38)  # of no score yet; finite, so that subtracting it from a masked score is no NaN


@triton.jit
def _load(base, token, step, D: tl.constexpr, BD: tl.constexpr):
    """Rows [BLOCK, BD] of the tokens given; past D zeros."""
    d = tl.arange(0, BD)
    pointers = base + token.to(tl.int64)[:, None] * step + d[None, :]
    if D == BD:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    return tile


@triton.jit
def _store(base, token, T, step, tile, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    inside = (token < T)[:, None] & (d < D)[None, :]
    tl.store(base + token.to(tl.int64)[:, None] * step + d[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _keys(first, m0, T, past, BM: tl.constexpr, BN: tl.constexpr):
    """The keys a block of queries sees, `past` of them before query 0: [begin, full) and [diagonal, end) in part, [full, diagonal) all."""
    begin = tl.load(first + m0) // BN * BN
    diagonal = (m0 + past) // BN * BN
    stop = tl.minimum(m0 + BM, T)
    full = tl.minimum(tl.cdiv(tl.load(first + stop - 1), BN) * BN, diagonal)
    return begin, full, diagonal, stop + past


@triton.jit
def _forward_keys(
    total, peak, mass, q, row, first_row, k, v, begin, tiles, near, gap, S, k_token, v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(0, tiles):
        n = begin + tile * BN
        if MASKED:
            n += tl.where(tile < near, 0, gap)
        key = n + tl.arange(0, BN)
        at = tl.minimum(key, S - 1) if MASKED else key
        scores = dot(q, tl.trans(_load(k, at, k_token, D, BD)), total.dtype)
        if MASKED:
            seen = (first_row[:, None] <= key[None, :]) & (key[None, :] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        # base 2: the scale and log2(e) are one factor, which the subtraction takes along
        new_peak = tl.maximum(peak, tl.max(scores, 1) * (SCALE * _LOG2E))
        p = tl.exp2(scores * (SCALE * _LOG2E) - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(p, 1)
        peak = new_peak
        total = add_dot(total * shrink[:, None], p.to(v.dtype.element_ty), _load(v, at, v_token, D, BD))
    return total, peak, mass


@triton.jit
def _forward(
    q, k, v, first, out, lse, T, S, q_token, q_head, k_token, k_head, v_token, v_head,
    SCALE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # heads that read the same keys run side by side; the blocks that see most come first
    head = (tl.program_id(0) % H).to(tl.int64)
    m0 = (tl.cdiv(T, BM) - 1 - tl.program_id(0) // H) * BM
    wide: tl.constexpr = lse.dtype.element_ty
    row = m0 + tl.arange(0, BM)
    at = tl.minimum(row, T - 1)
    q_tile = _load(q + head * q_head, at, q_token, D, BD)
    first_row = tl.load(first + at)
    token = row + (S - T)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    total = tl.zeros([BM, BD], wide)
    peak = tl.full([BM], _LOWEST, wide)
    mass = tl.zeros([BM], wide)
    begin, full, diagonal, end = _keys(first, m0, T, S - T, BM, BN)
    near, middle = (full - begin) // BN, (diagonal - full) // BN
    total, peak, mass = _forward_keys(
        total, peak, mass, q_tile, token, first_row, k, v, begin, near + tl.cdiv(end - diagonal, BN), near, diagonal - full,
        S, k_token, v_token, SCALE, D, BD, BN, True,
    )  # fmt: skip
    total, peak, mass = _forward_keys(
        total,
        peak,
        mass,
        q_tile,
        token,
        first_row,
        k,
        v,
        full,
        middle,
        middle,
        0,
        S,
        k_token,
        v_token,
        SCALE,
        D,
        BD,
        BN,
        False,
    )
    _store(out + head * D, row, T, H * D, total / mass[:, None], D, BD)
    tl.store(lse + head * T + row, (peak + tl.log2(mass)) * _LN2, mask=row < T)


@triton.jit
def _query_gradient_keys(
    dq, q, dout, row, first_row, lse2, delta, k, v, begin, tiles, near, gap, T, k_token, v_token,
    SCALE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for tile in range(0, tiles):
        n = begin + tile * BN
        if MASKED:
            n += tl.where(tile < near, 0, gap)
        key = n + tl.arange(0, BN)
        at = tl.minimum(key, T - 1) if MASKED else key
        k_tile = _load(k, at, k_token, D, BD)
        scores = dot(q, tl.trans(k_tile), dq.dtype)
        dp = dot(dout, tl.trans(_load(v, at, v_token, D, BD)), dq.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - lse2[:, None])
        if MASKED:
            seen = (first_row[:, None] <= key[None, :]) & (key[None, :] <= row[:, None])
            p = tl.where(seen, p, 0.0)
        dq = add_dot(dq, (p * (dp - delta[:, None])).to(k.dtype.element_ty), k_tile)
    return dq


@triton.jit
def _query_gradient(
    dout, q, k, v, first, out, lse, lse2, delta, dq, T, dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head,
    SCALE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % H).to(tl.int64)
    m0 = (tl.cdiv(T, BM) - 1 - tl.program_id(0) // H) * BM
    wide: tl.constexpr = lse.dtype.element_ty
    row = m0 + tl.arange(0, BM)
    at = tl.minimum(row, T - 1)
    q_tile = _load(q + head * q_head, at, q_token, D, BD)
    dout_tile = _load(dout + head * dout_head, at, dout_token, D, BD)
    # two numbers a row that the keys' gradient needs too: the log-sum-exp in base 2, and how much all of its scores' gradients share
    lse2_row = tl.load(lse + head * T + at) * _LOG2E
    delta_row = tl.sum(_load(out + head * D, at, H * D, D, BD).to(wide) * dout_tile.to(wide), 1)
    tl.store(lse2 + head * T + row, lse2_row, mask=row < T)
    tl.store(delta + head * T + row, delta_row, mask=row < T)
    first_row = tl.load(first + at)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    grad = tl.zeros([BM, BD], wide)
    begin, full, diagonal, end = _keys(first, m0, T, 0, BM, BN)
    near, middle = (full - begin) // BN, (diagonal - full) // BN
    grad = _query_gradient_keys(
        grad, q_tile, dout_tile, row, first_row, lse2_row, delta_row, k, v,
        begin, near + tl.cdiv(end - diagonal, BN), near, diagonal - full, T, k_token, v_token, SCALE, D, BD, BN, True,
    )  # fmt: skip
    grad = _query_gradient_keys(
        grad, q_tile, dout_tile, row, first_row, lse2_row, delta_row, k, v,
        full, middle, middle, 0, T, k_token, v_token, SCALE, D, BD, BN, False,
    )  # fmt: skip
    _store(dq + head * D, row, T, H * D, grad * SCALE, D, BD)


@triton.jit
def _key_gradient_queries(
    dk, dv, k, v, key, last_key, q, dout, lse2, delta, begin, tiles, near, gap, T, dout_token, dout_head, q_token, q_head,
    SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # one loop over the group's heads and their queries, so that loads are ahead across heads too;
    # keys by queries, so that the products that sum over queries find their left side in registers
    per_head = tl.maximum(tiles, 1)  # a prefetch may divide by it though there is no turn
    for turn in range(0, tiles * GROUP):
        head, tile = (turn // per_head).to(tl.int64), turn % per_head
        m = begin + tile * BM
        if MASKED:
            m += tl.where(tile < near, 0, gap)
        row = tl.multiple_of(m, BM) + tl.arange(0, BM)
        at = tl.minimum(row, T - 1) if MASKED else row
        q_tile = _load(q + head * q_head, at, q_token, D, BD)
        scores = dot(k, tl.trans(q_tile), dk.dtype)
        p = tl.exp2(scores * (SCALE * _LOG2E) - tl.load(lse2 + head * T + at)[None, :])
        if MASKED:
            seen = (key[:, None] <= row[None, :]) & (row[None, :] <= last_key[:, None])
            p = tl.where(seen, p, 0.0)
        dout_tile = _load(dout + head * dout_head, at, dout_token, D, BD)
        dv = add_dot(dv, p.to(dout.dtype.element_ty), dout_tile)
        dp = dot(v, tl.trans(dout_tile), dk.dtype)
        ds = p * (dp - tl.load(delta + head * T + at)[None, :])
        dk = add_dot(dk, ds.to(q.dtype.element_ty), q_tile)
    return dk, dv


@triton.jit
def _key_gradient(
    dout, q, k, v, last, lse2, delta, dk, dv, T, dout_token, dout_head, q_token, q_head, k_token, k_head, v_token, v_head,
    SCALE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # the first keys are seen by most
    kv_head = (tl.program_id(0) % K).to(tl.int64)
    n0 = tl.program_id(0) // K * BN
    wide: tl.constexpr = lse2.dtype.element_ty
    key = n0 + tl.arange(0, BN)
    at = tl.minimum(key, T - 1)
    k_tile = _load(k + kv_head * k_head, at, k_token, D, BD)
    v_tile = _load(v + kv_head * v_head, at, v_token, D, BD)
    last_key = tl.load(last + at)
    q += kv_head * GROUP * q_head
    dout += kv_head * GROUP * dout_head
    lse2 += kv_head * GROUP * T
    delta += kv_head * GROUP * T
    dk_tile = tl.zeros([BN, BD], wide)
    dv_tile = tl.zeros([BN, BD], wide)
    # the queries: [begin, full) and [edge, end) see the block in part, [full, edge) all of it
    begin, full = n0 // BM * BM, tl.cdiv(n0 + BN, BM) * BM
    edge = tl.maximum((tl.load(last + n0) + 1) // BM * BM, full)
    end = tl.load(last + tl.minimum(n0 + BN, T) - 1) + 1
    near, middle = tl.cdiv(tl.minimum(full, end) - begin, BM), (edge - full) // BM
    dk_tile, dv_tile = _key_gradient_queries(
        dk_tile, dv_tile, k_tile, v_tile, key, last_key, q, dout, lse2, delta,
        begin, near + tl.cdiv(tl.maximum(end, edge) - edge, BM), near, edge - full,
        T, dout_token, dout_head, q_token, q_head, SCALE, GROUP, D, BD, BM, True,
    )  # fmt: skip
    dk_tile, dv_tile = _key_gradient_queries(
        dk_tile, dv_tile, k_tile, v_tile, key, last_key, q, dout, lse2, delta, full, middle, middle, 0,
        T, dout_token, dout_head, q_token, q_head, SCALE, GROUP, D, BD, BM, False,
    )  # fmt: skip
    _store(dk + kv_head * D, key, T, K * D, dk_tile * SCALE, D, BD)
    _store(dv + kv_head * D, key, T, K * D, dv_tile, D, BD)


_TILES = {  # queries, keys, warps and stages; none spills a register on the GPUs named
    "half, Hopper": {"forward": (128, 64, 8, 3), "query_gradient": (128, 64, 8, 3), "key_gradient": (64, 128, 8, 2)},
    "half": {"forward": (128, 64, 8, 3), "query_gradient": (128, 32, 8, 2), "key_gradient": (64, 64, 8, 2)},
    "half, wide heads": {"forward": (64, 64, 8, 2), "query_gradient": (64, 32, 8, 2), "key_gradient": (32, 32, 8, 2)},
    "single": {"forward": (32, 32, 8, 1), "query_gradient": (32, 32, 8, 2), "key_gradient": (32, 32, 8, 1)},
    "single, wide heads": {"forward": (16, 16, 8, 2), "query_gradient": (16, 16, 8, 2), "key_gradient": (16, 16, 8, 1)},
}


def _tiles(kernel: str, dtype: torch.dtype, block: int) -> dict[str, int]:
    """For heads padded to `block`."""
    if architecture() < 80:  # 64 KiB a block, which only the smallest tiles fit
        kind = "single, wide heads"
    elif dtype in (torch.bfloat16, torch.float16):
        kind = "half, wide heads" if block > 128 else "half, Hopper" if 90 <= architecture() < 110 else "half"
    else:
        kind = "single" if block * dtype.itemsize <= 512 else "single, wide heads"
    queries, keys, warps, stages = _TILES[kind][kernel]
    return {"BM": queries, "BN": keys, "num_warps": warps, "num_stages": stages}


def _constants(kernel: str, q_THD: Tensor, k_TKD: Tensor) -> dict[str, int | float]:
    (heads, size), kv_heads = q_THD.shape[1:], k_TKD.shape[1]
    block = max(triton.next_power_of_2(size), 16)  # no product is shorter
    constants = {"SCALE": size**-0.5, "GROUP": heads // kv_heads, "D": size, "BD": block}
    constants |= {"K": kv_heads} if kernel == "key_gradient" else {"H": heads}
    return constants | _tiles(kernel, q_THD.dtype, block)


def _adjacent(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose heads have adjacent numbers; the distances between tokens and between heads may be anything."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _attention_triton(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _adjacent(q, k, v)
    tokens, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=wide(q.dtype))
    constants = _constants("forward", q, k)
    steps = (step for t in (q, k, v) for step in t.stride()[:2])
    _forward[(triton.cdiv(tokens, constants["BM"]) * heads,)](
        q, k, v, first, out, lse, tokens, len(k), *steps, **constants
    )
    return out, lse


def _attention_backward_triton(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = _adjacent(dout, q, k, v)
    tokens, heads, _ = q.shape
    dq, dk, dv, lse2, delta = (t.new_empty(t.shape) for t in (q, k, v, lse, lse))
    steps = [step for t in (dout, q, k, v) for step in t.stride()[:2]]
    constants = _constants("query_gradient", q, k)
    grid = (triton.cdiv(tokens, constants["BM"]) * heads,)
    _query_gradient[grid](dout, q, k, v, first, out, lse, lse2, delta, dq, tokens, *steps, **constants)
    constants = _constants("key_gradient", q, k)
    grid = (triton.cdiv(tokens, constants["BN"]) * k.shape[1],)
    _key_gradient[grid](dout, q, k, v, last, lse2, delta, dk, dv, tokens, *steps, **constants)
    return dq, dk, dv


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _documents(first: Tensor) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether every row sees from the start on) of each document: rows that see themselves first start one."""
    starts = (first == torch.arange(len(first), dtype=first.dtype)).nonzero()[:, 0]
    stops = torch.cat([starts[1:], starts.new_tensor([len(first)])])
    return zip(starts.tolist(), stops.tolist(), (first[stops - 1] == starts).tolist())


def _by_head(t_THD: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] as [K, G, T, D]: the G query heads of each key head."""
    return t_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _attention_torch(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's flash kernel for the CPU, which gives the log-sum-exp too."""
    q, k, v = _adjacent(q, k, v)  # the kernel's demand, of which it does not tell
    (tokens, heads, _), kv_heads, past = q.shape, k.shape[1], len(k) - len(q)
    out, lse = q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=wide(q.dtype))
    q, k, v, out_KGTD, lse_KGT = *(_by_head(t, kv_heads) for t in (q, k, v, out)), lse.unflatten(0, (kv_heads, -1))
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    flash, token = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.arange(tokens + past, dtype=first.dtype),
    )
    for start, stop, plain in [(0, tokens, False)] if past else _documents(first):
        for begin in (start,) if plain else range(start, stop, QUERY_BLOCK):
            i = slice(begin, stop if plain else min(begin + QUERY_BLOCK, stop))
            j, mask = slice(start if plain else int(first[begin]), past + i.stop), None
            if not plain:
                mask = ((first[i, None] <= token[j]) & (token[j] <= past + token[i, None])).to(q.dtype).log()
            out_KGTD[:, :, i], lse_KGT[:, :, i] = flash(
                q[:, :, i], k[:, :, j], v[:, :, j], is_causal=plain, attn_mask=mask
            )
    return out, lse


def _attention_backward_torch(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of queries meet the keys within their reach alone, all query heads of a key head in one matrix product.

    Torch's backward takes 1.4 to 3.5 times as long in bf16 (64 to 1024 tokens), and knows no window.
    """
    (_, kv_heads, size), dq_THD = k.shape, q.new_empty(q.shape)
    dk_KTD, dv_KTD = torch.zeros(2, kv_heads, len(k), size, dtype=lse.dtype)
    lse_KGT = lse.unflatten(0, (kv_heads, -1))
    for begin, end, plain in _documents(first):
        document = slice(begin, end)
        q_d, dout_d, out_d, dq_d = (_by_head(t[document], kv_heads) for t in (q, dout, out, dq_THD))
        k_d, v_d = (t[document].transpose(0, 1).contiguous() for t in (k, v))
        dk_d, dv_d, lse_d = dk_KTD[:, document], dv_KTD[:, document], lse_KGT[:, :, document, None]
        delta = torch.linalg.vecdot(out_d.to(lse.dtype), dout_d.to(lse.dtype))[..., None]
        q_d, scaled_k, first_d = q_d * size**-0.5, k_d * size**-0.5, first[document] - begin
        for start in range(0, end - begin, GRADIENT_BLOCK):
            stop = min(start + GRADIENT_BLOCK, end - begin)
            low, high = (0, 0) if plain else first_d[[start, stop - 1]].tolist()  # rows differ in the keys between
            rows, keys, shape = slice(start, stop), slice(low, stop), (kv_heads, -1, stop - start, stop - low)
            q_b, dout_b = (t[:, :, rows].reshape(kv_heads, -1, size) for t in (q_d, dout_d))
            p = torch.sub((q_b @ k_d[:, keys].mT).view(shape), lse_d[:, :, rows]).exp_()
            p[..., start - low :].tril_()
            if high > low:
                p[..., : high - low].masked_fill_(torch.arange(low, high) < first_d[rows, None], 0)
            ds = torch.sub((dout_b @ v_d[:, keys].mT).view(shape), delta[:, :, rows]).mul_(p)
            p, ds = (t.to(q.dtype).view(kv_heads, -1, stop - low) for t in (p, ds))
            dv_d[:, keys] += p.mT @ dout_b
            dk_d[:, keys] += ds.mT @ q_b
            dq_d[:, :, rows] = (ds @ scaled_k[:, keys]).view(kv_heads, -1, stop - start, size)
    return dq_THD, *(t.new_empty(t.shape).copy_(dt.transpose(0, 1)) for t, dt in ((k, dk_KTD), (v, dv_KTD)))


# ------------------------------------------------------------------------------------------- operators and autograd


_attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last) -> (Tensor, Tensor)",
    cuda=_attention_triton,
    cpu=_attention_torch,
    fake=lambda q, k, v, first, last: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide(q.dtype))),
)
_attention_backward = operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor first, Tensor last)"
    " -> (Tensor, Tensor, Tensor)",
    cuda=_attention_backward_triton,
    cpu=_attention_backward_torch,
    fake=lambda dout, q, k, v, out, lse, first, last: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and one number a query and head; the weights are computed again in backward."""

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
    """`attention_definition`, in tiles; last [T], int32, is first's mirror, for backward: the last row that sees the key.

    Where S > T there is one document, last is not read, and gradients are refused with a ValueError.
    """
    if len(k_SKD) != len(q_THD) and torch.is_grad_enabled() and any(t.requires_grad for t in (q_THD, k_SKD, v_SKD)):
        raise ValueError(
            f"attention has gradients only where every key's token is a query's too: {len(q_THD)} queries, {len(k_SKD)} keys"
        )
    return _Attention.apply(q_THD, k_SKD, v_SKD, first_T, last_T)
