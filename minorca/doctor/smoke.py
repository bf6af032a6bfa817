"""A small random model, run on a device and by the definitions of its operations, which say what is right.

Axes: T tokens, D features, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minorca.generate.batch import generate
from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.build import build_model
from minorca.model.layout import TARGETS
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters, pad_for_adapters
from minorca.model.network import Mistral, RMSNorm
from minorca.model.projection import Projection
from minorca_kernels import (
    NF4Weight,
    attention_definition,
    linear_cross_entropy,
    linear_cross_entropy_definition,
    rms_norm_definition,
    rope_definition,
    swiglu_definition,
)

# two documents, the first of them longer than the window
LENGTHS = (40, 24)
ARCHITECTURE = Architecture(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    window=32,
    tied=False,
)
NEW_TOKENS = 8
# relative errors: a right kernel has 1e-5 in fp32 and, of gradients in bf16, 0.1; a wrong one about 1
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}


def smoke_tests(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str | None]]:
    """What was tried on the device, and what is wrong with it; None: nothing. What was not possible raises."""
    exact = _by_definition(dtype)
    model = _on_device(exact, device, dtype)
    tokens = torch.randint(ARCHITECTURE.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    tolerance = TOLERANCE[dtype]
    hidden, expected_hidden = _hidden(model, tokens.to(device), cu_seqlens), _hidden_by_definition(exact, tokens)
    yield "forward", _compare(hidden, expected_hidden, tolerance)

    targets = tokens.roll(-1)
    loss = linear_cross_entropy(hidden, model.head.weight, targets.to(device)).sum()
    expected_loss = linear_cross_entropy_definition(expected_hidden, exact.head.weight, targets).sum()
    found, expected = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(parameters.values()))])
        for loss, parameters in ((loss, adapter_parameters(model)), (expected_loss, adapter_parameters(exact)))
    )
    yield "backward", _compare(found, expected, tolerance)

    exact = _by_definition(torch.float32)
    prompt = tokens[: LENGTHS[0]].tolist()
    (answer,) = generate(_on_device(exact, device, torch.float32).eval(), [prompt], NEW_TOKENS)
    yield "generation", None if answer == _answer_by_definition(exact, prompt) else "other tokens than the most likely"

    yield "nf4", _nf4(device, dtype)


def _compare(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    found, expected = found.detach().double().cpu(), expected.detach()
    error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    # a NaN is not within either
    return None if error <= tolerance else f"a relative error of {error:.1g}; expected at most {tolerance:g}"


def _by_definition(dtype: torch.dtype) -> Any:
    """The model in fp64 on the CPU, its values those of `dtype`."""
    model = build_model(ARCHITECTURE, dtype)
    add_adapters(model, LoRASettings(8, 16, TARGETS))
    model.to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        is_norm = isinstance(module, RMSNorm)
        for parameter in module.parameters(recurse=False):
            size = parameter.shape[-1]
            torch.nn.init.normal_(parameter, float(is_norm), 0.1 if is_norm else size**-0.5, random)
    return model.double()


def _on_device(exact: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same model as training builds it."""
    model = build_model(ARCHITECTURE, dtype)
    add_adapters(model, LoRASettings(8, 16, TARGETS))
    pad_for_adapters(model, device)
    model.to_empty(device=device)
    sources = dict(exact.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Projection):
            module.base.store_rows(0, sources[f"{name}.base"].weight.detach())
        elif isinstance(module, RMSNorm):
            module.weight.detach().copy_(sources[name].weight)
    for vocabulary in ("embedding", "head"):
        getattr(model, vocabulary).store_rows(0, getattr(exact, vocabulary).weight.detach())
    values = adapter_parameters(exact)
    for name, parameter in adapter_parameters(model).items():
        parameter.detach().copy_(values[name])
    return model


def _hidden(model: Mistral, tokens_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last hidden states [T, D]."""
    return model(tokens_T, cu_seqlens, head=lambda hidden_TD, weight: hidden_TD)


def _hidden_by_definition(model: Any, tokens_T: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The network in the definitions of its operations."""
    arch = model.arch
    attend = PackedAttention(
        torch.tensor([0, *itertools.accumulate(lengths)]), len(tokens_T), arch.window, tokens_T.device
    )
    cos, sin = (table.double() for table in attend.rope_tables(arch.head_dim, arch.rope_theta))
    x_TD = model.embedding.weight[tokens_T].detach()
    for block in model.layers:
        qkv = _linear(_norm(x_TD, block.attention_norm), block.qkv)
        q, k, v = rope_definition(qkv, cos, sin, arch.heads, arch.kv_heads)
        x_TD = x_TD + _linear(attention_definition(q, k, v, attend.first).flatten(1), block.o)
        gate_up = _linear(_norm(x_TD, block.mlp_norm), block.gate_up)
        x_TD = x_TD + _linear(swiglu_definition(gate_up), block.down)
    return _norm(x_TD, model.norm)


def _norm(x_TD: Tensor, norm: RMSNorm) -> Tensor:
    return rms_norm_definition(x_TD, norm.weight.detach(), norm.eps)


def _linear(x_TD: Tensor, projection: Any) -> Tensor:
    """The product with the frozen weight, and what its adapters add: scale * x A^T B^T."""
    y = x_TD @ projection.base.weight.detach().T
    lora = projection.lora
    updates = [lora.scale * x_TD @ lora.a[part.name].T @ lora.b[part.name].T for part in lora.parts]
    return y + torch.cat(updates, -1)


def _answer_by_definition(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        hidden = _hidden_by_definition(model, torch.tensor(ids), (len(ids),))
        ids.append(int((hidden[-1] @ model.head.weight.detach().T).argmax()))
    return ids[len(prompt) :]


def _nf4(device: torch.device, dtype: torch.dtype) -> str | None:
    weight = NF4Weight([64], 256, dtype).to_empty(device=device)
    random = torch.Generator().manual_seed(2)
    values, x_TK = (torch.randn(64, 256, generator=random).to(dtype) for _ in range(2))
    weight.store_part(0, lambda start, stop: values[start:stop])
    dequantized = weight.quantized_part(0).dequantize(dtype).view(64, 256).cpu()
    return _compare(weight.linear(x_TK.to(device)), x_TK.double() @ dequantized.double().T, TOLERANCE[dtype])
