"""Random indices from logits: the kernel draws those of the definition."""

import sys

import pytest
import torch

from minorca_kernels import draw, draw_definition, repetition_penalty, repetition_penalty_definition
from minorca_kernels.operator import INTERPRETED


def inputs(rows: int, size: int, dtype=torch.float32):
    """Logits of which a third are minus infinity, as part of a wider buffer; the other tensors are strided too.

    Rows without filters, with one of the three, and with all.
    """
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size + 3, generator=generator).mul(3).to(dtype)[:, :size]
    logits[torch.rand(rows, size, generator=generator) < 1 / 3] = -torch.inf
    logits[:, size // 2] = 1.0
    temperature = torch.rand(rows, 2, generator=generator)[:, 0] * 2
    temperature[::10] = 0
    seed = torch.randint(-(2**63), 2**63 - 1, (rows, 2), generator=generator)[:, 0]
    filters = torch.tensor([1.0, 2.0**31, 0.0, 1.0]).repeat(rows, 2)[:, :4]
    filters[::5, 3] = 0
    filters[1::5, 0] = 0.9
    filters[2::5, 1] = size // 3 + 1
    filters[3::5, 2] = 0.02
    filters[4::5, :3] = torch.tensor([0.95, size // 2 + 1, 0.005])
    return logits, temperature, seed, torch.arange(rows) % 7, filters


@pytest.mark.parametrize("size, dtype", [(1, torch.float32), (60, torch.float16), (700, torch.float32)])
def test_equals_the_definition(size, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules[draw.__module__], "BLOCK", 256)
    arguments = logits, temperature, seed, position, filters = inputs(30, size, dtype)
    unfiltered = logits, temperature, seed, position
    plain, filtered = draw(*unfiltered), draw(*arguments)
    assert torch.equal(plain, draw_definition(*unfiltered))
    assert torch.equal(filtered, draw_definition(*arguments))
    # each row is drawn as if it were alone
    off = filters[:, 3] == 0
    assert torch.equal(plain[off], filtered[off])
    assert torch.equal(plain[temperature == 0], logits.float().argmax(-1)[temperature == 0])
    assert logits.gather(1, plain[:, None]).isfinite().all() and (size == 1 or len(plain.unique()) > 10)
    assert size == 1 or not torch.equal(plain, filtered)


def test_filters_keep_the_likeliest(monkeypatch):
    """What is ever drawn, of indices of which three are equally likely."""
    monkeypatch.setattr(sys.modules[draw.__module__], "BLOCK", 16)
    logits = torch.tensor([0.1, 0.3, 0.1, 0.4, 0.1]).log().repeat(90, 1)
    filters = torch.tensor([[0.5, 9.0, 0.0, 1.0], [1.0, 3.0, 0.0, 1.0], [1.0, 9.0, 0.3, 1.0]]).repeat_interleave(30, 0)
    index = draw(logits, torch.ones(90), torch.arange(90), torch.zeros(90, dtype=torch.int64), filters)
    assert [set(part.tolist()) for part in index.split(30)] == [{1, 3}, {0, 1, 3}, {1, 3}]


@pytest.mark.skipif(not INTERPRETED, reason="of the kernel")
@pytest.mark.parametrize("filters", [None, torch.tensor([[1.0, 2.0**31, 1e-9, 1.0]])])
def test_an_index_is_found_whatever_rounding_does(filters, monkeypatch):
    """The largest random number, and more indices than fp32 adds exactly."""
    module = sys.modules[draw.__module__]
    monkeypatch.setattr(module, "BLOCK", 256)
    logits = torch.zeros(1, 3000)
    logits[:, 2990:] = -torch.inf
    seeds = torch.arange(2**22)
    numbers = module.uniform(seeds, torch.zeros_like(seeds))
    assert numbers.max() > 1 - 1e-6
    seed = seeds[numbers.argmax()][None]
    assert 2980 < draw(logits, torch.ones(1), seed, torch.zeros(1, dtype=torch.int64), filters) < 2990


def test_repetition_penalty():
    """Of blocks and a part of one, as part of wider buffers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator).to(torch.float16)[:, :4500]
    seen = torch.rand(3, 5000, generator=generator)[:, :4500] < 0.5
    penalty = torch.tensor([[1.0, 1.3, 0.5]]).T.repeat(1, 2)[:, 0]
    out = repetition_penalty(logits, seen, penalty)
    assert torch.equal(out, repetition_penalty_definition(logits, seen, penalty))
    assert torch.equal(out[0], logits[0].float()) and out[1, seen[1]].abs().sum() < logits[1, seen[1]].abs().sum() * 1.3


def test_the_operators_are_sound():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    *arguments, filters = inputs(3, 50)
    for extra in (None, filters):
        torch.library.opcheck(torch.ops.minorca.draw.default, (*arguments, extra), test_utils=tests)
    penalized = arguments[0], arguments[0] > 0, filters[:, 0]
    torch.library.opcheck(torch.ops.minorca.repetition_penalty.default, penalized, test_utils=tests)
