"""The Mistral network, top to bottom. Source: Jiang et al. 2023 (arXiv:2310.06825).

A batch is flat: T tokens, documents end to end, no padding and no batch axis. Axes in names: T tokens, H hidden, I
intermediate, Hq and Hkv heads (K), D head size, P = D/2 rotated pairs, V vocabulary. The file knows nothing of
adapters, of how weights are stored or of sharding, which come from outside (lora.py, projection.py, train/parallel.py).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.layout import GROUPS, projections
from minorca.model.projection import Projection
from minorca_kernels import DenseWeight, FrozenWeight, add_rms_norm, rms_norm, rope_tables


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """Adds to the residual stream: returns the sum and its norm."""

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, update, self.weight, self.eps)


class Embedding(DenseWeight):
    """A row [H] for each id of the vocabulary; where a model ties the two, also the weight of the head."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


def logits(hidden_TH: Tensor, weight: FrozenWeight) -> Tensor:
    return weight.linear(hidden_TH)


class Block(nn.Module):
    """Attention, then SwiGLU, each added to the residual stream. Projections are stored as they are multiplied."""

    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        self.arch = arch
        self.layer = layer
        stacked = projections(arch)
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.qkv = Projection(stacked["qkv"])
        self.o = Projection(stacked["o"])
        self.mlp_norm = AddRMSNorm(arch.hidden_size, arch.norm_eps)
        self.gate_up = Projection(stacked["gate_up"])
        self.down = Projection(stacked["down"], gated_input=True)

    def forward(self, x_TH: Tensor, cos_TP: Tensor, sin_TP: Tensor, attend) -> Tensor:
        qkv_TN = self.qkv(self.attention_norm(x_TH))
        attended_THD = attend.of_qkv(self.layer, qkv_TN, cos_TP, sin_TP, self.arch.heads, self.arch.kv_heads)
        x_TH, normed_TH = self.mlp_norm(x_TH, self.o(attended_THD.flatten(1)))
        return x_TH + self.down(self.gate_up(normed_TH))


class Mistral(nn.Module):
    """The whole network.

    Attributes:
        head: the weight that makes logits of the last hidden states; None where it is the embedding's.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.embedding = Embedding(torch.empty(arch.vocab_size, arch.hidden_size))
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.head: FrozenWeight | None = None
        if not arch.tied:
            self.head = DenseWeight(torch.empty(arch.vocab_size, arch.hidden_size))

    def projections(self) -> Iterator[tuple[int, Projection]]:
        """The layer and every projection of it, in order."""
        for layer, block in enumerate(self.layers):
            for group in GROUPS:
                yield layer, getattr(block, group)

    def forward(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor | None = None,
        attend=None,
        head: Callable[[Tensor, FrozenWeight], Any] = logits,
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
        cos_TP, sin_TP = rope_tables(attend.positions, self.arch.head_dim, self.arch.rope_theta)
        x_TH = self.embedding(tokens_T)
        for block in self.layers:
            x_TH = block(x_TH, cos_TP, sin_TP, attend)
        return head(self.norm(x_TH), self.embedding if self.head is None else self.head)
