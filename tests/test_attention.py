"""Every attention back end against the one sentence: position i sees j with 0 <= i - j < W inside its own document."""

import itertools

import pytest
import torch
from conftest import relative_error

from minorca import attention
from minorca.attention import Documents, attention_definition

W = 32
LENGTHS = [W - 1, W, W + 1, 3 * W, 1]


def qkv(heads, kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(LENGTHS), n, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("window", [None, 1, W, 2 * W])
def test_the_definition_is_the_sentence(window):
    """Written out in Python loops, for one head."""
    q, k, v = (t.detach()[:, 0] for t in qkv(1, 1))
    out = attention_definition(q[:, None], k[:, None], v[:, None], LENGTHS, window)[:, 0]
    start = 0
    for length in LENGTHS:
        for i in range(length):
            seen = [start + j for j in range(length) if 0 <= i - j < (window or length)]
            weights = torch.softmax(k[seen] @ q[start + i] / 8**0.5, 0)
            assert torch.allclose(out[start + i], weights @ v[seen], atol=1e-12)
        start += length


def documents(q, k, v, window):
    """What the network calls on this device."""
    return Documents(torch.tensor([0, *itertools.accumulate(LENGTHS)]), sum(LENGTHS), window, q.device)(0, q, k, v)


def sdpa(q, k, v, window):
    """What it calls on CUDA where the varlen kernel cannot run."""
    return torch.cat([attention._sdpa(*parts, window) for parts in zip(*(t.split(LENGTHS) for t in (q, k, v)))])


@pytest.mark.parametrize("back_end", [documents, sdpa])
@pytest.mark.parametrize("block", [7, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("window", [None, 1, W, 2 * W])
def test_packed_documents_equal_the_definition(window, heads, kv_heads, block, back_end, monkeypatch):
    """Values and gradients, in blocks of queries shorter and longer than the window."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(attention, "GRADIENT_BLOCK", block)
    inputs = qkv(heads, kv_heads)
    out = back_end(*inputs, window)
    expected = attention_definition(*inputs, LENGTHS, window)
    assert relative_error(out, expected) < 1e-12
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(torch.autograd.grad(out, inputs, weights), torch.autograd.grad(expected, inputs, weights)):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)  # a window of 1 leaves q and k no gradient
