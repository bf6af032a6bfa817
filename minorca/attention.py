"""Which keys a query may see, and the back ends that compute it.

One sentence defines it: position i sees j with 0 <= i - j < window, inside its own document. `visible` is that sentence;
every back end is tested against it. The network calls an *attend* object, `attend(layer, q_THD, k_TKD, v_TKD)`, that also
holds the tokens' positions: `Documents` here, and the key/value cache in kv_cache.py.
"""

import inspect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None

QUERY_BLOCK = 256  # queries a masked block has where a window is active and no varlen kernel is at hand


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


def _sdpa(q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, mask_QS: Tensor | None) -> Tensor:
    heads_first = (t.transpose(0, 1)[None] for t in (q_QHD, k_SKD, v_SKD))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask_QS, is_causal=mask_QS is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def _one_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if window is None or len(q) <= window:
        return _sdpa(q, k, v, None)
    outs = []
    for start in range(0, len(q), QUERY_BLOCK):  # keys outside a block's reach are never touched
        stop, first = min(start + QUERY_BLOCK, len(q)), max(0, start - window + 1)
        positions = torch.arange(first, stop, device=q.device)
        mask = visible(positions[start - first :], positions, window)
        outs.append(_sdpa(q[start:stop], k[first:stop], v[first:stop], mask))
    return torch.cat(outs)


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
        if q_THD.is_cuda and varlen_attn is not None and q_THD.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(q_THD, k_TKD, v_TKD)
        documents = zip(q_THD.split(self.lengths), k_TKD.split(self.lengths), v_TKD.split(self.lengths))
        return torch.cat([_one_document(q, k, v, self.window) for q, k, v in documents])

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # its window counts the keys before the query: W keys in all are (W - 1, 0); torch 2.11 has no enable_gqa and needs none
        left = -1 if self.window is None or self.window >= self.longest else self.window - 1
        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        cu = self.cu_seqlens
        return varlen_attn(q, k, v, cu, cu, self.longest, self.longest, window_size=(left, 0), **gqa)
