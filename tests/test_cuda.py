"""What only a GPU can show: attention's kernels, logits beside transformers, and that CUDA computes what the CPU does."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it, if set before its first call

import itertools

import numpy as np
import pytest
import torch
from conftest import relative_error

from minorca import load_model
from minorca.attention import Documents, attention_definition, visible
from minorca.config import OptimConfig
from minorca.data.packing import make_batch
from minorca.data.store import TokenStore
from minorca.generate import generate
from minorca.lora import LoRASettings, adapter_parameters, add_adapters, init_adapters
from minorca.objectives import next_token_loss
from minorca.optim import adamw, clip_gradients

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda")


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def plain_attention(q, k, v, lengths, window):
    """The formula in the inputs' own dtype: its error is what a kernel's is measured by."""
    outs, group = [], q.shape[1] // k.shape[1]
    for q, k, v in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        positions = torch.arange(len(q), device=q.device)
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible(positions, positions, window), -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 2, 64), (8, 2, 128), (3, 3, 32)])
@pytest.mark.parametrize("window", [64, 300, None])
@pytest.mark.parametrize("factors", [(-1,), (0,), (1,), (3,), (1, 3, -1, 0)], ids=str)  # of W: W-1, W, W+1, 3W, and all packed
def test_attention(dtype, heads, kv_heads, size, window, factors):
    """Values and gradients are at most twice as far from fp64 as the formula in the same dtype, and reach the window exactly."""
    w = window or 100
    lengths = [3 * w if factor == 3 else w + factor for factor in factors]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)

    def run(function, wide):
        leaves = [t.to(wide).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(wide))]

    attend = Documents(ends(lengths), sum(lengths), window, DEVICE)
    exact = run(lambda q, k, v: attention_definition(q, k, v, lengths, window), torch.float64)
    plain = run(lambda q, k, v: plain_attention(q, k, v, lengths, window), dtype)
    ours = run(lambda q, k, v: attend(0, q, k, v), dtype)
    for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps, name

    q, k, v = (t.requires_grad_() for t in inputs)
    (reached,) = torch.autograd.grad(attend(0, q, k, v)[ends(lengths)[1:] - 1].sum(), v)  # from each document's last query
    expected = [visible(torch.tensor([length - 1]), torch.arange(length), window)[0] for length in lengths]
    assert torch.equal(reached.abs().sum((1, 2)).cpu() > 0, torch.cat(expected))


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_transformers(dtype, window, save_mistral):
    """Of packed documents: at most twice as far from fp64 as transformers in the same dtype, and 1e-5 in fp32."""
    directory, theirs = save_mistral(sliding_window=window)
    ours, lengths = load_model(directory, dtype, DEVICE), [1, 15, 16, 17, 48]
    tokens = torch.randint(128, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        logits = ours(tokens, ends(lengths))
        theirs = theirs.to(DEVICE, dtype)
        same = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(lengths)])
        exact = torch.cat([theirs.double()(document[None]).logits[0] for document in tokens.split(lengths)])
    assert relative_error(logits, exact) <= 2 * relative_error(same, exact) + torch.finfo(dtype).eps
    assert dtype == torch.bfloat16 or relative_error(logits, same) <= 1e-5


def train(directory, dtype, device, steps):
    """Losses of LoRA steps over the same packed rows, and the adapters after them."""
    lengths, random = [40, 7, 25, 64], np.random.default_rng(0)
    store = TokenStore(
        random.integers(128, size=sum(lengths), dtype=np.int32),
        np.concatenate([np.arange(length) >= length // 3 for length in lengths]),
        ends(lengths).numpy(),
    )
    model = load_model(directory, dtype, device)
    add_adapters(model, LoRASettings(rank=4, alpha=8))
    init_adapters(model, seed=0)
    adapters = adapter_parameters(model.train())
    optimizer, losses = adamw(adapters.values(), OptimConfig(lr=1e-3)), []
    for _ in range(steps):
        step = 0.0
        for rows in ([0, 1], [2, 3]):
            batch = make_batch(store, rows).to(device)
            loss = model(batch.tokens, batch.cu_seqlens, head=next_token_loss(batch)) / int(store.trained.sum())
            loss.backward()
            step += loss.item()
        clip_gradients(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step)
    return losses, [p.detach().cpu() for p in adapters.values()]


def test_training_equals_the_cpu(save_mistral):
    """Twenty steps in fp32: every loss to 1e-4."""
    directory, _ = save_mistral(sliding_window=16)
    here, there = (train(directory, torch.float32, torch.device(device), 20)[0] for device in (DEVICE, "cpu"))
    assert here == pytest.approx(there, rel=1e-4) and here[-1] < here[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_repeats_to_the_bit(dtype, save_mistral):
    """In PyTorch's deterministic mode: the losses of three steps and the adapters they leave."""
    directory, _ = save_mistral(sliding_window=16)
    torch.use_deterministic_algorithms(True)
    try:
        (losses, adapters), (again, adapters_again) = (train(directory, dtype, DEVICE, 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again and all(map(torch.equal, adapters, adapters_again))


@pytest.mark.parametrize("window", [None, 8])
def test_generation_equals_the_cpu(window, save_mistral):
    """Greedy ids in fp32, prompts of several lengths together, past the window."""
    directory, _ = save_mistral(sliding_window=window)
    prompts = [[1, 5, 9], [7], list(range(3, 23))]
    here, there = (generate(load_model(directory, torch.float32, device), prompts, 24) for device in (DEVICE, "cpu"))
    assert here == there
