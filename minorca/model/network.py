"""The Mistral network, top to bottom. Source: Jiang et al. 2023 (arXiv:2310.06825).

A batch is flat: T tokens, documents end to end, no padding and no batch axis. Axes in names: T tokens, H hidden, I
intermediate, Hq and Hkv heads (K), D head size, V vocabulary. The file knows nothing of adapters or of sharding, which
come from outside (lora.py, parallel.py).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca_kernels import add_rms_norm, rms_norm, rope, rope_tables, swiglu


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """Adds to the residual stream: returns the sum and its norm."""

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, update, self.weight, self.eps)


class SwiGLULinear(nn.Linear):
    """A projection of its input's SwiGLU: gate and up side by side, [T, 2 in] -> [T, out]."""

    def forward(self, gate_up_TI: Tensor) -> Tensor:
        return super().forward(swiglu(gate_up_TI))


class Block(nn.Module):
    """Attention, then SwiGLU, each added to the residual stream. Projections are stored as they are multiplied."""

    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        self.arch, self.layer = arch, layer
        hidden, attended, kv = arch.hidden_size, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.attention_norm = RMSNorm(hidden, arch.norm_eps)
        self.qkv = nn.Linear(hidden, attended + 2 * kv, bias=False)
        self.o = nn.Linear(attended, hidden, bias=False)
        self.mlp_norm = AddRMSNorm(hidden, arch.norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * arch.intermediate_size, bias=False)
        self.down = SwiGLULinear(arch.intermediate_size, hidden, bias=False)

    def forward(self, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, attend) -> Tensor:
        qkv_TN = self.qkv(self.attention_norm(x_TH))
        q_THD, k_TKD, v_TKD = rope(qkv_TN, cos_TD, sin_TD, self.arch.heads, self.arch.kv_heads)
        x_TH, normed_TH = self.mlp_norm(x_TH, self.o(attend(self.layer, q_THD, k_TKD, v_TKD).flatten(1)))
        return x_TH + self.down(self.gate_up(normed_TH))


class Mistral(nn.Module):
    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.embedding = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.head = None if arch.tied else nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)

    def forward(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor | None = None,
        attend=None,
        head: Callable[[Tensor, Tensor], Any] = F.linear,
    ) -> Any:
        """tokens [T] int64 -> logits [T, V] in the weights' dtype.

        Args:
            cu_seqlens: [N+1] where each document starts, then T (best on the host); None: one document.
            attend: instead of cu_seqlens, what computes attention (a KVCache's prefill or step).
            head: what to make of the last hidden states [T, H] and the head's weight [V, H]. A loss goes here, so that
                under FSDP it is computed while the root's parameters are gathered.
        """
        if attend is None:
            attend = PackedAttention(cu_seqlens, len(tokens_T), self.arch.window, tokens_T.device)
        cos_TD, sin_TD = rope_tables(attend.positions, self.arch.head_dim, self.arch.rope_theta)
        x_TH = self.embedding(tokens_T)
        for block in self.layers:
            x_TH = block(x_TH, cos_TD, sin_TD, attend)
        return head(self.norm(x_TH), (self.head or self.embedding).weight)
