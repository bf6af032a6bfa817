"""Random indices from logits: the kernel draws those of the definition."""

import sys

import pytest
import torch

from minorca_kernels import draw, draw_definition
from minorca_kernels.operator import INTERPRETED


def inputs(rows: int, size: int, dtype=torch.float32):
    """Logits of which a third are minus infinity, as part of a wider buffer; the other vectors are strided too."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size + 3, generator=generator).mul(3).to(dtype)[:, :size]
    logits[torch.rand(rows, size, generator=generator) < 1 / 3] = -torch.inf
    logits[:, size // 2] = 1.0
    temperature = torch.rand(rows, 2, generator=generator)[:, 0] * 2
    temperature[0] = 0
    seed = torch.randint(-(2**63), 2**63 - 1, (rows, 2), generator=generator)[:, 0]
    return logits, temperature, seed, torch.arange(rows) % 7


@pytest.mark.parametrize("size, dtype", [(1, torch.float32), (60, torch.float16), (700, torch.float32)])
def test_equals_the_definition(size, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules[draw.__module__], "BLOCK", 256)
    arguments = inputs(30, size, dtype)
    (index, uniform), (expected, numbers) = draw(*arguments), draw_definition(*arguments)
    assert torch.equal(uniform, numbers) and torch.equal(index, expected)
    assert arguments[0].gather(1, index[:, None]).isfinite().all() and (size == 1 or len(index.unique()) > 10)


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
def test_an_index_is_found_whatever_rounding_does(monkeypatch):
    """The largest random number, and more indices than fp32 adds exactly."""
    module = sys.modules[draw.__module__]
    monkeypatch.setattr(module, "BLOCK", 256)
    logits = torch.zeros(1, 3000)
    logits[:, 2990:] = -torch.inf
    seeds = torch.arange(2**22)
    seed = seeds[module.uniform(seeds, torch.zeros_like(seeds)).argmax()][None]
    index, uniform = draw(logits, torch.ones(1), seed, torch.zeros(1, dtype=torch.int64))
    assert uniform > 1 - 1e-6 and 2980 < index < 2990


def test_the_operator_is_sound():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.minorca.draw.default, inputs(3, 50), test_utils=tests)
