"""Twenty LoRA steps with the kernels give the losses of twenty with their definitions, on the CPU and on a GPU.

Under Triton's interpreter (`TRITON_INTERPRET=1`), which is slow, two steps.
"""

import itertools
import sys

import numpy as np
import pytest
import torch

import minorca.model.attention
import minorca.model.lora
import minorca.model.network
import minorca.model.projection
import minorca.model.vocabulary
import minorca_kernels
from minorca.config import OptimConfig
from minorca.data.packing import make_batch
from minorca.data.store import TokenStore
from minorca.files.weights import load_weights, open_model
from minorca.model.attention import PackedAttention
from minorca.model.build import build_model
from minorca.model.lora import (
    LoRASettings,
    adapter_parameters,
    add_adapters,
    init_adapters,
    pad_for_adapters,
    seed_dropout,
)
from minorca.train.objectives import NextToken
from minorca.train.optim import adamw, clip_gradients
from minorca_kernels.operator import INTERPRETED

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


def train(directory, dtype: torch.dtype, device: str, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of LoRA steps over the same packed rows, with the model built as in minorca.train, and the adapters."""
    lengths = [40, 7, 25, 64]
    random = np.random.default_rng(0)
    store = TokenStore(
        random.integers(128, size=sum(lengths), dtype=np.int32),
        np.concatenate([np.arange(length) >= length // 3 for length in lengths]),
        np.array([0, *itertools.accumulate(lengths)]),
    )
    source = open_model(directory)
    model = build_model(source.arch, dtype)
    add_adapters(model, LoRASettings(rank=4, alpha=8, dropout=0.1))
    pad_for_adapters(model, device)
    model.to_empty(device=device)
    load_weights(model, source)
    init_adapters(model, seed=0)
    adapters = adapter_parameters(model.train())
    objective, rows = NextToken(), np.arange(len(lengths))
    counts = objective.counts(store, rows)
    optimizer = adamw(adapters.values(), OptimConfig(lr=1e-3))
    losses = []
    for n in range(steps):
        step = 0.0
        for index, rows in enumerate(np.array([[0, 1], [2, 3]])):
            seed_dropout(model, 0, n, index)
            batch = make_batch(store, rows).to(torch.device(device))
            loss = objective.loss(model(batch.tokens, batch.cu_seqlens, head=objective.head(batch)), counts)
            loss.backward()
            step += loss.item()
        clip_gradients(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step)
    return losses, [p.detach().cpu() for p in adapters.values()]


def use_definitions(monkeypatch) -> None:
    for module, names in (
        (minorca.model.network, ("rms_norm", "add_rms_norm")),
        (minorca.model.attention, ("rope",)),
        (minorca.model.projection, ("swiglu",)),
        (minorca.model.vocabulary, ("linear_cross_entropy",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(minorca_kernels, f"{name}_definition"))

    def lora_linear(x, weight, adapters, scale, dropout, of_swiglu, factors):
        return minorca_kernels.lora_linear_definition(x, weight.weight, adapters, scale, dropout, of_swiglu)

    def norm_lora_linear(x, update, norm_weight, eps, weight, adapters, scale, dropout, factors):
        arguments = x, update, norm_weight, eps, weight.weight, adapters, scale, dropout
        return minorca_kernels.norm_lora_linear_definition(*arguments)

    monkeypatch.setattr(minorca.model.lora, "lora_linear", lora_linear)
    monkeypatch.setattr(minorca.model.lora, "norm_lora_linear", norm_lora_linear)
    monkeypatch.setattr(
        PackedAttention,
        "__call__",
        lambda self, layer, q, k, v: minorca_kernels.attention_definition(q, k, v, self.first),
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps(dtype, device, save_mistral, monkeypatch):
    """In fp32 to 1e-5; in bf16 the kernels' losses are at most twice as far from the fp32 ones as the definitions'."""
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("bf16 is wrong in the interpreter")
    monkeypatch.setattr(sys.modules["minorca_kernels.lora_linear"], "MIN_TOKENS_AUGMENTED", 0)
    directory, _ = save_mistral(sliding_window=16)
    steps = 2 if INTERPRETED else 20
    ours, _ = train(directory, dtype, device, steps)
    use_definitions(monkeypatch)
    plain, _ = train(directory, dtype, device, steps)
    assert ours[-1] < ours[0]
    if dtype == torch.float32:
        assert ours == pytest.approx(plain, rel=1e-5)
    else:
        exact = np.array(train(directory, torch.float32, device, steps)[0])
        error, allowed = (np.abs(np.array(losses) - exact).mean() for losses in (ours, plain))
        assert error <= 2 * allowed + exact.mean() * torch.finfo(dtype).eps / 8
