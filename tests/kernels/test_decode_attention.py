"""One query a sequence against its filled slots, on both implementations a CPU has, as test_attention.py."""

import itertools
import sys

import pytest
import torch

from minorca_kernels import decode_attention, decode_attention_definition, decode_groups
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

KERNELS = sys.modules[decode_attention.__module__]


def drawn(lengths, slots, group, size, dtype=torch.float64, kv_heads=2):
    """q, k, v and lengths; keys and values are views of one buffer, NaN where no row sees them."""
    random = torch.Generator().manual_seed(0)
    q, buffer = (
        torch.randn(len(lengths), *shape, size, generator=random, dtype=torch.float64).to(dtype)
        for shape in ((kv_heads * group,), (slots, 2 * kv_heads))
    )
    lengths = torch.tensor(lengths)
    buffer[torch.arange(slots) >= lengths[:, None]] = torch.nan
    return q, *buffer.split(kv_heads, 2), lengths


def ends(slots):
    """Lengths at the ends of a buffer of so many slots."""
    return [0, 1, slots - 1, slots, slots + 5]


@pytest.fixture(params=[1, 3, 64] if INTERPRETED else [1])
def splits(request, monkeypatch):
    """Of the kernels, where there are five rows of two key heads."""
    monkeypatch.setattr(KERNELS, "processors", lambda device: 5 * request.param)


def test_the_definition_is_the_sentence():
    """Written out in Python loops."""
    q, k, v, lengths = drawn(ends(7), 7, 3, 8)
    out = decode_attention_definition(q, k, v, lengths)
    for (n, length), head in itertools.product(enumerate(lengths.tolist()), range(6)):
        filled = range(min(length, 7))
        scores = (
            torch.stack([q[n, head] @ k[n, slot, head // 3] / 8**0.5 for slot in filled]) if filled else torch.empty(0)
        )
        expected = sum(
            (weight * v[n, slot, head // 3] for weight, slot in zip(scores.softmax(0), filled)), torch.zeros(8)
        )
        assert torch.allclose(out[n, head], expected.double(), atol=1e-12)


@pytest.mark.parametrize("slots", [1, 7, 64, 200])
@pytest.mark.parametrize("group, size", [(1, 64), (3, 64), (4, 128), (8, 80)])
def test_equals_the_definition(group, size, slots, splits, poisoned):
    q, k, v, lengths = drawn(ends(slots), slots, group, size)
    out, expected = (function(q, k, v, lengths) for function in (decode_attention, decode_attention_definition))
    assert relative_error(out, expected) < 1e-12 and out.is_contiguous() and not out[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
@pytest.mark.parametrize("splits", [3], indirect=True)
def test_rounding(dtype, splits):
    """At most twice as far from fp64 as the formula in the same dtype."""
    q, k, v, lengths = drawn([200] * 5, 200, 4, 128, dtype)
    exact = decode_attention_definition(*(t.double() for t in (q, k, v)), lengths)
    weights = (torch.einsum("nkgd,nskd->nkgs", q.unflatten(1, (2, 4)), k) * 128**-0.5).softmax(-1)
    plain = torch.einsum("nkgs,nskd->nkgd", weights, v).flatten(1, 2)
    out = decode_attention(q, k, v, lengths)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1] if INTERPRETED else [1, 2])
@pytest.mark.parametrize("size, length", [(20, 150), *([] if INTERPRETED else [(64, 64), (64, 130)])])
def test_no_bit_depends_on_a_neighbour(dtype, threads, size, length, monkeypatch):
    """On its place among them, what they hold, or how much; from call to call, or on who prepared the groups."""
    monkeypatch.setattr(KERNELS, "processors", lambda device: 8)  # 3 splits
    before, slots, results = torch.get_num_threads(), 150, []
    torch.set_num_threads(threads)
    for others in ([length] * 5, [0, 64, 65, 150, 151]):
        for place in (0, 3, 4):
            lengths = [*others[:place], length, *others[place + 1 :]]
            *tensors, lengths_N = drawn(lengths, slots, 3, size, dtype, kv_heads=1)
            tensors[2][:place] = torch.nan
            for t, row in zip(tensors, drawn([length], slots, 3, size, dtype, kv_heads=1)):
                t[place] = row[0]
            results.append(decode_attention(*tensors, lengths_N)[place])
            results.append(decode_attention(*tensors, lengths_N, decode_groups(lengths, slots))[place])
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("splits", [3], indirect=True)
def test_the_order_of_slots_does_not_matter(splits):
    q, k, v, lengths = drawn([200] * 5, 200, 1, 64)
    turned = [torch.cat([t[:, 77:], t[:, :77]], 1) for t in (k, v)]  # as a rolling buffer is
    assert relative_error(decode_attention(q, *turned, lengths), decode_attention(q, k, v, lengths)) < 1e-12


@pytest.mark.parametrize("lengths", [[3], [0], [5, 5, 0, 0, 9, 12, 12]])
def test_groups_are_the_rows(lengths):
    """Each row once, in order, with what it has filled."""
    groups = decode_groups(lengths, 9)
    assert [row for start, stop, _ in groups for row in range(start, stop)] == list(range(len(lengths)))
    assert [filled for start, stop, filled in groups for _ in range(start, stop)] == [
        min(length, 9) for length in lengths
    ]


@pytest.mark.parametrize("steps", [(2**31, 64, 16), (64, 2**27, 16), (16, 32, 2**30)], ids=["rows", "slots", "heads"])
def test_offsets_past_32_bits(steps):
    """Of the memory between, nothing is touched."""
    q, k, v, lengths = drawn([17, 17], 17, 1, 8, torch.float16)
    memory = torch.empty(2 * sum(size * step for size, step in zip(k.shape, steps)), dtype=torch.float16)
    views = [memory.as_strided(k.shape, (*steps, 1), offset) for offset in (0, 2**12)]
    for view, t in zip(views, (k, v)):
        view.copy_(t)
    assert torch.equal(
        decode_attention(q, *views, lengths), decode_attention(q, *(view.clone() for view in views), lengths)
    )


def test_strides_change_nothing():
    """Queries inside a wider buffer, and vectors whose numbers are not adjacent."""
    q, k, v, lengths = drawn([7, 3, 1], 7, 3, 16)
    expected = decode_attention(q, k, v, lengths)
    wider = torch.cat([torch.full_like(q, torch.nan), q], 1)[:, q.shape[1] :]
    assert torch.equal(decode_attention(wider, k, v, lengths), expected)
    assert relative_error(decode_attention(*(t.mT.contiguous().mT for t in (q, k, v)), lengths), expected) < 1e-12


def test_the_operator_is_sound():
    """Schema, shapes and tracing."""
    arguments = drawn([7, 3], 7, 2, 16, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.minorca.decode_attention.default, arguments, test_utils=tests)
