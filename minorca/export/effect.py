"""What merging and writing keep of the adapters' effect: base and adapters as they are, against the files as written.

An adapter, or the sum of several, is computed beside the base's weights; other merges are added to them in fp32.

The network runs layer by layer in fp32 on the CPU, so that one layer, embedding and head are in memory: of a 7B model
1.9 GB. Axes: T tokens, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.export.contents import Contents, ExportedTensor, merged_tensors
from minorca.export.merging import Deltas
from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.layout import SourceTensor, source_tensors
from minorca.model.lora import LoRA, PartSettings
from minorca.model.network import Mistral, RMSNorm, logits
from minorca.model.projection import Projection
from minorca_kernels import FrozenWeight

log = logging.getLogger(__name__)

# on which logits are compared
TOKENS = 128
# a smaller share of the adapters' effect is warned of
LITTLE = 0.5

# Hugging Face's name of every tensor of a model -> what reads it
Weights = Mapping[str, Callable[[], Tensor]]

CONVERSATION = [
    {
        "role": "user",
        "content": "Why is the sky blue during the day, and red when the sun sets? Explain it in a few lines.",
    },
    {
        "role": "assistant",
        "content": "Sunlight is a mixture of all colours. On its way through the air it meets molecules that are much "
        "smaller than its wavelengths, and these scatter short waves far more than long ones: blue light about four "
        "times as much as red. So by day blue light reaches your eyes from every part of the sky. In the evening the "
        "sun stands low, and its light has to cross a much longer stretch of air. Most of the blue has been scattered "
        "out of the beam before it arrives, and what is left is yellow, orange and red. Dust and smoke, such as that "
        "of a volcano or of a fire, make the colours of a sunset stronger.",
    },
]


def sample_tokens(tok: Tokenizer | None, template: str | None, vocab_size: int) -> tuple[Tensor, str]:
    """128 ids [T], and what they are: a question and its answer in the chat template, else as plain text, else random
    ids.
    """
    ids, kind = ([], "") if tok is None else _sample_text(tok, template)
    # or the tokenizer is another model's
    if not ids or max(ids) >= vocab_size:
        random = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (TOKENS,), generator=random), f"{TOKENS} random ids"
    ids = ids[:TOKENS]
    return torch.tensor(ids), f"{len(ids)} tokens of {kind}"


def _sample_text(tok: Tokenizer, template: str | None) -> tuple[list[int], str]:
    if template not in (None, "none"):
        try:
            ids = render_chat(tok, CONVERSATION, add_generation_prompt=False, template=template)
            return ids, f"an English answer in the template {template}"
        except UserError as error:
            log.info("the template %s does not render the sample: %s", template, error)
    return tok.encode("\n\n".join(message["content"] for message in CONVERSATION), bos=True), "English text"


class Effect(NamedTuple):
    """How far written files are from base and adapters, by their logits.

    Attributes:
        share: of the change that the adapters make, what the files keep: their own change from the base, projected on
            that one, sum((w - b) (a - b)) / sum((a - b)^2). 1: all of it, beside what is added in other directions;
            None: the adapters change nothing.
        mean_difference, largest_difference: of the logits, absolute.
        same_top: the places whose likeliest token is the same.
        mean_kl, largest_kl: KL(base and adapters || files) of the next token, in nats.
    """

    share: float | None
    mean_difference: float
    largest_difference: float
    same_top: int
    tokens: int
    mean_kl: float
    largest_kl: float

    def __str__(self) -> str:
        return (
            f"logits differ by {self.mean_difference:.2g} in the mean, {self.largest_difference:.2g} at most; the same "
            f"token is likeliest in {self.same_top} of {self.tokens} places; KL {self.mean_kl:.2g} nats a token in the "
            f"mean, {self.largest_kl:.2g} at most"
        )


def effect_of(base_TV: Tensor, adapted_TV: Tensor, written_TV: Tensor) -> Effect:
    """Compares logits of the written files with those of base and adapters.

    Args:
        base_TV: of the base.
        adapted_TV: of base and adapters, not rounded.
    """
    change_TV = adapted_TV - base_TV
    norm = change_TV.square().sum()
    difference_TV = (written_TV - adapted_TV).abs()
    log_p_TV, log_q_TV = adapted_TV.log_softmax(1), written_TV.log_softmax(1)
    # its terms cancel where the two are equal, to a sum that may be a rounding error below zero
    kl_T = F.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(1).clamp(min=0)
    return Effect(
        share=float(((written_TV - base_TV) * change_TV).sum() / norm) if norm > 0 else None,
        mean_difference=float(difference_TV.mean()),
        largest_difference=float(difference_TV.max()),
        same_top=int((adapted_TV.argmax(1) == written_TV.argmax(1)).sum()),
        tokens=len(kl_T),
        mean_kl=float(kl_T.mean()),
        largest_kl=float(kl_T.max()),
    )


def rounding(contents: Contents) -> str:
    """What is done to merged weights that are written as values."""
    return f"rounding to {contents.tensors[0].dtype}".replace("torch.", "")


def readers(tensors: list[ExportedTensor]) -> Weights:
    return {tensor.name: tensor.make for tensor in tensors}


def print_effect(contents: Contents, written: Weights, what: str) -> None:
    """Prints what the files keep of the effect of the adapters that were merged; nothing where none were.

    Args:
        written: what the files hold, as values.
        what: was done to the merged weights: "quantizing again", "rounding to bfloat16".
    """
    source, merge, updates = contents.source, contents.merge, contents.updates
    if merge is None:
        return
    tokens_T, sample = sample_tokens(contents.tok, contents.template, source.arch.vocab_size)
    # embedding and head count as the adapter made them
    base = readers(merged_tensors(source, None, updates, rounded=False))
    if merge.method == "linear":
        adapted_TV = logits_by_layer(source.arch, tokens_T, base, Deltas(source.arch, merge))
    else:
        adapted = merged_tensors(source, merge, updates, rounded=False)
        adapted_TV = logits_by_layer(source.arch, tokens_T, readers(adapted))
    base_TV, written_TV = (logits_by_layer(source.arch, tokens_T, weights) for weights in (base, written))
    if not all(logits_TV.isfinite().all() for logits_TV in (base_TV, adapted_TV, written_TV)):
        log.warning("logits are NaN or infinite, so that nothing is compared; is a weight of the adapters too large?")
        return
    effect = effect_of(base_TV, adapted_TV, written_TV)
    print(f"beside base and adapter in fp32, on {sample}: {effect}")
    if effect.share is None:
        print("the adapter changes no logits" if not updates else "the adapter changes embedding and head alone")
        return
    # + 0: no -0%
    print(f"{what} keeps {round(effect.share, 2) + 0:.0%} of the adapter's change of the logits")
    if effect.share < LITTLE:
        log.warning("%s loses most of the adapter's effect; use base and adapter unmerged instead", what)


@torch.no_grad()
def logits_by_layer(arch: Architecture, tokens_T: Tensor, weights: Weights, adapters: Deltas | None = None) -> Tensor:
    """The logits [T, V] of one document, in fp64, of a network that is never in memory as a whole.

    Args:
        adapters: of a linear merge, computed beside the weights: x W^T + (x A^T) B^T.
    """
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
            if adapters and isinstance(projection := block.get_submodule(name), Projection):
                projection.lora = _lora(projection, layer, adapters)
        x_TH, _ = block(x_TH, None, cos_TP, sin_TP, attend)
    fill("norm", "norm")
    if network.head is not None:
        fill("head", "head")
    _, normed_TH = network.norm(x_TH)
    return logits(normed_TH, network.embedding if network.head is None else network.head).double()


def _lora(projection: Projection, layer: int, adapters: Deltas) -> LoRA | None:
    factors = {part: adapters.factors(part.tensor_name(layer, "huggingface")) for part in projection.parts}
    found = {part: pair for part, pair in factors.items() if pair}
    if not found:
        return None
    lora = LoRA({part: PartSettings(len(a), 1.0) for part, (a, _) in found.items()}, 0.0, torch.float32, "cpu")
    for part, (a, b) in found.items():
        lora.a[part.name].copy_(a)
        lora.b[part.name].copy_(b)
    return lora


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
