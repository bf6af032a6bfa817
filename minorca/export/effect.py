"""How much of an adapter's effect is left where the merged weights are quantized again.

The network runs layer by layer in fp32 on the CPU, so that one layer, embedding and head are in memory: of a 7B model
1.9 GB.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.layout import SourceTensor, source_tensors
from minorca.model.network import Mistral, RMSNorm, logits
from minorca.model.projection import Projection
from minorca_kernels import FrozenWeight

# of the batch on which logits are compared
TOKENS = 128

# Hugging Face's name of every tensor of a model -> what reads it
Weights = Mapping[str, Callable[[], Tensor]]


def share_kept(arch: Architecture, base: Weights, merged: Weights, quantized: Weights) -> float | None:
    """The share of the change of the logits, from `base` to `merged`, that `quantized` keeps: its own change from
    `base`, projected on that one, sum((q - b) (m - b)) / sum((m - b)^2) over 128 random tokens and the vocabulary.

    1: all of it, beside what quantization adds in other directions; 0: nothing. None where the adapter changes nothing.
    """
    tokens_T = torch.randint(arch.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    base_TV, merged_TV, quantized_TV = (logits_by_layer(arch, tokens_T, read) for read in (base, merged, quantized))
    change_TV = merged_TV - base_TV
    norm = change_TV.square().sum()
    return float(((quantized_TV - base_TV) * change_TV).sum() / norm) if norm > 0 else None


@torch.no_grad()
def logits_by_layer(arch: Architecture, tokens_T: Tensor, weights: Weights) -> Tensor:
    """The logits [T, V] of one document, in fp64, of a network that is never in memory as a whole."""
    network = Mistral(dataclasses.replace(arch, layers=1)).requires_grad_(False)
    block = network.layers[0]
    tensors = source_tensors(arch, "huggingface")

    def fill(place: str, module: str) -> None:
        _fill(network.get_submodule(place), tensors[module], weights)

    fill("embedding", "embedding")
    x_TH = network.embedding(tokens_T)
    attend = PackedAttention(None, len(tokens_T), arch.window, tokens_T.device)
    cos_TP, sin_TP = attend.rope_tables(arch.head_dim, arch.rope_theta)
    for layer in range(arch.layers):
        for name in ("attention_norm", "qkv", "o", "mlp_norm", "gate_up", "down"):
            fill(f"layers.0.{name}", f"layers.{layer}.{name}")
        x_TH, _ = block(x_TH, None, cos_TP, sin_TP, attend)
    fill("norm", "norm")
    if network.head is not None:
        fill("head", "head")
    _, normed_TH = network.norm(x_TH)
    return logits(normed_TH, network.embedding if network.head is None else network.head).double()


def _fill(module: torch.nn.Module, tensors: list[SourceTensor], weights: Weights) -> None:
    weight = module.base if isinstance(module, Projection) else module
    if isinstance(weight, RMSNorm):
        weight.weight.copy_(weights[tensors[0].name]())
        return
    assert isinstance(weight, FrozenWeight)
    first = 0
    for tensor in tensors:
        weight.store_rows(first, weights[tensor.name]())
        first += tensor.rows
