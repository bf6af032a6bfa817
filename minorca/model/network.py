"""The Mistral network, top to bottom. Source: Jiang et al. 2023 (arXiv:2310.06825).

A batch is flat: T tokens, documents end to end, no padding and no batch axis. Axes in names: T tokens, H hidden, I
intermediate, Hq and Hkv heads (K), D head size, P = D/2 rotated pairs, V vocabulary. The file knows nothing of
adapters, of how weights are stored or of sharding, which come from outside (lora.py, projection.py, train/parallel.py).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.layout import GROUPS, projections
from minorca.model.projection import Projection
from minorca.model.vocabulary import VocabularyMatrix
from minorca_kernels import FrozenWeight, add_rms_norm, rms_norm
from minorca_kernels.operator import uses_triton


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Adds update, where there is one, to the residual stream: returns the sum and its norm."""
        if update is None:
            return x, rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, update, self.weight, self.eps)


def logits(hidden_TH: Tensor, weight: FrozenWeight) -> Tensor:
    return weight.linear(hidden_TH)


class Block(nn.Module):
    """Attention, then SwiGLU, each added to the residual stream by the norm that follows. Projections are stored as
    they are multiplied.
    """

    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        self.arch = arch
        self.layer = layer
        stacked = projections(arch)
        self.attention_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.qkv = Projection(stacked["qkv"], normed_input=True)
        self.o = Projection(stacked["o"])
        self.mlp_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.gate_up = Projection(stacked["gate_up"], normed_input=True)
        self.down = Projection(stacked["down"], gated_input=True)

    def forward(
        self, x_TH: Tensor, update_TH: Tensor | None, cos_TP: Tensor, sin_TP: Tensor, attend
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and what is still to be added to it or None -> the same after this block."""
        x_TH, qkv_TN = self.qkv.of_norm(self.attention_norm, x_TH, update_TH)
        attended_THD = attend.of_qkv(self.layer, qkv_TN, cos_TP, sin_TP, self.arch.heads, self.arch.kv_heads)
        x_TH, gate_up_TI = self.gate_up.of_norm(self.mlp_norm, x_TH, self.o(attended_THD.flatten(1)))
        down_TH = self.down(gate_up_TI)
        # a norm in Triton adds it in the same pass; a CPU gains nothing
        return (x_TH, down_TH) if uses_triton(x_TH) else (x_TH + down_TH, None)


class Mistral(nn.Module):
    """The whole network.

    Attributes:
        head: the weight that makes logits of the last hidden states; None where it is the embedding's.
        gathered_dtype: what a sharded model gathers its weights in; None: it is whole.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.embedding = VocabularyMatrix(torch.empty(arch.vocab_size, arch.hidden_size))
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.layers))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.gathered_dtype: torch.dtype | None = None
        self.head: FrozenWeight | None = None
        if not arch.tied:
            self.head = VocabularyMatrix(torch.empty(arch.vocab_size, arch.hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of computation, and of frozen weights."""
        return self.gathered_dtype or self.norm.weight.dtype

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
        cos_TP, sin_TP = attend.rope_tables(self.arch.head_dim, self.arch.rope_theta)
        x_TH, update_TH = self.embedding(tokens_T), None
        for block in self.layers:
            x_TH, update_TH = block(x_TH, update_TH, cos_TP, sin_TP, attend)
        _, normed_TH = self.norm(x_TH, update_TH)
        return head(normed_TH, self.embedding if self.head is None else self.head)
