"""Which keys a query may see, and the back ends that compute it.

One sentence defines it: position i sees j with 0 <= i - j < window, inside its own document. `visible` is that sentence;
every back end is tested against it. The network calls an *attend* object, `attend(layer, q_THD, k_TKD, v_TKD)`, that also
holds the tokens' positions: `Documents` here, and the key/value cache in kv_cache.py.
"""

import inspect
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None
# torch 2.11 groups heads without being asked, and has no name for it
VARLEN_OPTIONS = {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

QUERY_BLOCK = 256  # queries that share a mask where a window is active and no varlen kernel is at hand
GRADIENT_BLOCK = 64  # queries of one turn of the CPU's backward: their scores stay in its cache


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """positions [Q] and [S] of one document -> bool [Q, S]: True where the query sees the key."""
    distance = q_positions[:, None] - k_positions[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attention_definition(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Causal windowed attention inside each document, by the formula; scores and softmax in fp32 (fp64 for fp64).

    q [T, Hq, D], k and v [T, Hkv, D] with Hq a multiple of Hkv (query head h reads key head h // (Hq // Hkv)),
    documents of the given lengths end to end -> [T, Hq, D].
    """
    group, outs = q_THD.shape[1] // k_TKD.shape[1], []
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    for q, k, v in zip(q_THD.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths)):
        k, v = k.repeat_interleave(group, 1).to(wide), v.repeat_interleave(group, 1).to(wide)
        positions = torch.arange(len(q), device=q.device)
        scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible(positions, positions, window), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype))
    return torch.cat(outs)


def _blocks(length: int, window: int | None, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """A document's queries, the keys within their reach, and the mask between the two; None: plainly causal."""
    if window is None or length <= window:
        yield slice(length), slice(length), None
        return
    positions = torch.arange(length, device=device)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        queries, keys = slice(start, stop), slice(max(0, start - window + 1), stop)
        yield queries, keys, visible(positions[queries], positions[keys], window)


def _sdpa(q_SHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, window: int | None) -> Tensor:
    """One document through torch's SDPA."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q_SHD, k_SKD, v_SKD))
    outs = [
        F.scaled_dot_product_attention(q[:, :, i], k[:, :, j], v[:, :, j], attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        for i, j, mask in _blocks(len(q_SHD), window, q.device)
    ]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


class _HostAttention(torch.autograd.Function):
    """Every document on the CPU. Forward is torch's flash kernel for it; backward is our own, from the saved log-sum-exp.

    Torch's backward takes 1.4 to 3.5 times as long in bf16 (64 to 1024 tokens), and knows no window: here blocks of
    queries meet the keys within their reach alone, all query heads of a key head in one matrix product.
    """

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, lengths, window):
        kv_heads, group = k_TKD.shape[1], q_THD.shape[1] // k_TKD.shape[1]
        q, k, v = (t.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) for t in (q_THD, k_TKD, v_TKD))  # [K, G, T, D]
        k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        out_THD = torch.empty_like(q_THD)
        out = out_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for q_d, k_d, v_d, out_d, lse_d in zip(*(t.split(lengths, dim=2) for t in (q, k, v, out, lse))):
            for i, j, mask in _blocks(q_d.shape[2], window, q.device):
                mask = None if mask is None else mask.to(q.dtype).log()
                out_d[:, :, i], lse_d[:, :, i] = flash(q_d[:, :, i], k_d[:, :, j], v_d[:, :, j], is_causal=mask is None, attn_mask=mask)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse)
        ctx.lengths, ctx.window = lengths, window
        return out_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout_THD):
        q_THD, k_TKD, v_TKD, out_THD, lse_KGT = ctx.saved_tensors
        kv_heads, size, window = *k_TKD.shape[1:], ctx.window
        dq_THD, dk_KTD, dv_KTD = torch.empty_like(q_THD), *torch.zeros(2, kv_heads, len(k_TKD), size, dtype=lse_KGT.dtype)
        scale, begin = size**-0.5, 0
        for length in ctx.lengths:
            document = slice(begin, begin + length)
            q, dout, out, dq = (t[document].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) for t in (q_THD, dout_THD, out_THD, dq_THD))
            k, v = (t[document].transpose(0, 1).contiguous() for t in (k_TKD, v_TKD))
            dk, dv, lse = dk_KTD[:, document], dv_KTD[:, document], lse_KGT[:, :, document, None]
            delta = torch.linalg.vecdot(out.to(lse.dtype), dout.to(lse.dtype))[..., None]
            q, scaled_k = q * scale, k * scale
            for start in range(0, length, GRADIENT_BLOCK):
                stop, first = min(start + GRADIENT_BLOCK, length), 0 if window is None else max(0, start - window + 1)
                rows, shape = slice(start, stop), (kv_heads, -1, stop - start, stop - first)
                q_b, dout_b = (t[:, :, rows].reshape(kv_heads, -1, size) for t in (q, dout))
                k_b, v_b = k[:, first:stop], v[:, first:stop]
                p = torch.sub((q_b @ k_b.mT).view(shape), lse[:, :, rows]).exp_()
                p[..., start - first :].tril_()
                if window is not None and stop > window:
                    p[..., : stop - start].triu_(start - window + 1 - first)
                ds = torch.sub((dout_b @ v_b.mT).view(shape), delta[:, :, rows]).mul_(p)
                p, ds = (t.to(q.dtype).view(kv_heads, -1, stop - first) for t in (p, ds))
                dv[:, first:stop] += p.mT @ dout_b
                dk[:, first:stop] += ds.mT @ q_b
                dq[:, :, rows] = (ds @ scaled_k[:, first:stop]).view(kv_heads, -1, stop - start, size)
            begin += length
        return dq_THD, dk_KTD.transpose(0, 1).to(k_TKD.dtype), dv_KTD.transpose(0, 1).to(v_TKD.dtype), None, None


class Documents:
    """Attention inside each document of a flat batch of T tokens.

    cu_seqlens [N+1]: where each document starts, and T; None means one document. Kept on the host it costs no
    synchronisation. `positions` [T] int64 counts each document's tokens from 0.
    """

    def __init__(self, cu_seqlens: Tensor | None, tokens: int, window: int | None, device: torch.device):
        starts = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        self.lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if not self.lengths or starts[0] != 0 or starts[-1] != tokens or min(self.lengths) < 1:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {starts}")
        self.window, self.longest = window, max(self.lengths)
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths]).to(device, non_blocking=True)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        head_dim, half = q_THD.shape[-1], q_THD.dtype in (torch.bfloat16, torch.float16)
        if q_THD.is_cuda and varlen_attn is not None and half and head_dim % 8 == 0 and head_dim <= 256:  # flash attention's limits
            return self._varlen(q_THD, k_TKD, v_TKD)
        if not q_THD.is_cuda:
            return _HostAttention.apply(q_THD, k_TKD, v_TKD, self.lengths, self.window)
        documents = zip(q_THD.split(self.lengths), k_TKD.split(self.lengths), v_TKD.split(self.lengths))
        return torch.cat([_sdpa(q, k, v, self.window) for q, k, v in documents])

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # its window counts the keys before the query: W keys in all are (W - 1, 0)
        left = -1 if self.window is None or self.window >= self.longest else self.window - 1
        cu = self.cu_seqlens
        return varlen_attn(q, k, v, cu, cu, self.longest, self.longest, window_size=(left, 0), **VARLEN_OPTIONS)
