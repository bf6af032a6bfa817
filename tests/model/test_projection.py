"""Every kind of weight storage gives the same products, and a new kind is one class in one file.

Axes: T tokens, K in, N out.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minorca import load_model
from minorca.files.weights import load_weights, open_model
from minorca.model.build import build_model, prepack
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters, init_adapters
from minorca.model.network import Mistral
from minorca_kernels import (
    Adapter,
    DenseWeight,
    FrozenWeight,
    PaddedWeight,
    PrepackedWeight,
    lora_linear,
    lora_linear_definition,
)
from tests.helpers import gradients_of, relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))


class Int8Weight(FrozenWeight):
    """A storage kind defined outside of the package: 8-bit integers, with one scale per row."""

    kind = "int8"

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        self.codes = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scales]

    @staticmethod
    def dense(tensors: list[Tensor]) -> Tensor:
        codes, scales = tensors
        return codes.to(scales.dtype) * scales[:, None]

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return x_TK @ Int8Weight.dense(tensors).t()

    @staticmethod
    def transposed_product(dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        return dy_TN @ Int8Weight.dense(tensors)

    def local_rows(self) -> tuple[int, int]:
        return 0, self.out_features

    def store_rows(self, start: int, rows: Tensor) -> None:
        scales = rows.float().abs().amax(1) / 127
        self.scales[start : start + len(rows)] = scales
        self.codes[start : start + len(rows)] = (rows / scales[:, None]).round().to(torch.int8)


def quantized(directory) -> Mistral:
    """A model whose projections store `Int8Weight`s, filled by the loader."""
    source = open_model(directory)
    model = build_model(source.arch, torch.float32).to_empty(device="cpu")
    for _, projection in model.projections():
        projection.base = Int8Weight(projection.base.out_features, projection.base.in_features)
    load_weights(model, source)
    return model


def test_a_storage_kind_from_outside(save_mistral):
    """Logits and the gradients of adapters are those of a dense model with the quantized values."""
    directory, _ = save_mistral(sliding_window=16)
    model = quantized(directory)
    dense = load_model(directory, torch.float32, "cpu")
    for (_, ours), (_, theirs) in zip(model.projections(), dense.projections()):
        theirs.base.get_parameter("weight").copy_(Int8Weight.dense(ours.base.tensors()))
    with torch.no_grad():
        assert relative_error(model(TOKENS), dense(TOKENS)) < 1e-5
    gradients = []
    for one in (model, dense):
        add_adapters(one, LoRASettings(rank=4, alpha=8))
        init_adapters(one, seed=0)
        for name, parameter in adapter_parameters(one).items():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        one(TOKENS).square().mean().backward()
        gradients.append(gradients_of(adapter_parameters(one)))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(relative_error(gradients[0][name], gradients[1][name]) < 1e-4 for name in gradients[1])


def test_a_frozen_projection_passes_gradients_through(save_mistral):
    """Of quantized weights too, without adapters."""
    directory, _ = save_mistral()
    model = quantized(directory)
    for _, projection in model.projections():
        width = projection.base.in_features * (1 + projection.gated_input)
        x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        scales = projection.base.get_parameter("scales")
        scales.data = scales.double()
        assert torch.autograd.gradcheck(projection, x)


KINDS: dict[str, Callable[[Tensor], FrozenWeight]] = {
    "dense": DenseWeight,
    "padded": lambda w: PaddedWeight(w, 8),
    "prepacked": PrepackedWeight,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_kinds_multiply_alike(kind, gated):
    """Without adapters, and with them where the kind can be trained on."""
    w = torch.randn(50, 24)
    weight = KINDS[kind](w)
    assert weight.kind == kind and (weight.out_features, weight.in_features) == (50, 24)
    x = torch.randn(7, 48 if gated else 24, requires_grad=kind != "prepacked")
    if not gated:
        assert torch.allclose(weight.linear(x), x @ w.t(), atol=1e-4)
    if kind == "prepacked":
        return
    a = torch.randn(3, 24, requires_grad=True)
    b = torch.randn(20, 3, requires_grad=True)
    adapters = [Adapter(10, 30, a, b)]
    out = lora_linear(x, weight, adapters, 0.5, of_swiglu=gated)
    expected = lora_linear_definition(x, w, adapters, 0.5, of_swiglu=gated)
    assert torch.allclose(out, expected, atol=1e-4)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), [x, a, b]) for y in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_prepacking_keeps_the_embedding_and_what_is_trained(tied, save_mistral):
    directory, _ = save_mistral(tie_word_embeddings=tied)
    model = load_model(directory, torch.float32, "cpu")
    add_adapters(model, LoRASettings(rank=4, alpha=8, targets=("q",)))
    init_adapters(model, seed=0)
    with torch.no_grad():
        before = model(TOKENS)
        prepack(model)
        assert torch.allclose(model(TOKENS), before, atol=1e-4)
    kinds = {projection.base.kind for _, projection in model.projections() if projection.lora}
    assert model.head is not None
    assert kinds == {"dense"} and model.embedding.kind == "dense" and model.head.kind == "prepacked"
    assert {projection.base.kind for _, projection in model.projections() if not projection.lora} == {"prepacked"}
