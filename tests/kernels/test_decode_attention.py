"""Attention of one query a sequence to its filled slots, and the write into them before it.

On the CPU, as test_attention.py, in both implementations.
"""

import itertools
import sys

import pytest
import torch

from minorca_kernels import (
    decode_attention,
    decode_attention_definition,
    decode_groups,
    decode_positions,
    rope_frequencies,
    rope_into_cache,
    rope_into_cache_definition,
    rope_tables,
)
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

KERNEL_MODULE = sys.modules[decode_attention.__module__]


def random_inputs(lengths, slots, group, size, dtype=torch.float64, kv_heads=2):
    """q, k, v and lengths; keys and values are views of one buffer, NaN in empty slots."""
    generator = torch.Generator().manual_seed(0)
    q, buffer = (
        torch.randn(len(lengths), *shape, size, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((kv_heads * group,), (slots, 2 * kv_heads))
    )
    lengths_N = torch.tensor(lengths)
    buffer[torch.arange(slots) >= lengths_N[:, None]] = torch.nan
    k, v = buffer.split(kv_heads, 2)
    return q, k, v, lengths_N


def edge_lengths(slots):
    """Lengths at both ends of a buffer, and one past it."""
    return [0, 1, slots - 1, slots, slots + 5]


@pytest.fixture(params=[16, 64] if INTERPRETED else [None])
def splits(request, monkeypatch):
    """The filled slots of a split, several of which one program combines at once, and the programs of two key heads."""
    monkeypatch.setattr(KERNEL_MODULE, "SPLIT", request.param)
    monkeypatch.setattr(KERNEL_MODULE, "BLOCK_SPLITS", 4)
    monkeypatch.setattr(KERNEL_MODULE, "multiprocessor_count", lambda device: 3)


def test_the_definition_equals_python_loops():
    q, k, v, lengths = random_inputs(edge_lengths(7), 7, 3, 8)
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
    q, k, v, lengths = random_inputs(edge_lengths(slots), slots, group, size)
    out, expected = (function(q, k, v, lengths) for function in (decode_attention, decode_attention_definition))
    assert relative_error(out, expected) < 1e-12 and out.is_contiguous() and not out[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
@pytest.mark.parametrize("splits", [64], indirect=True)
def test_rounding(dtype, splits):
    """At most twice as far from fp64 as the formula in the same dtype."""
    q, k, v, lengths = random_inputs([200] * 5, 200, 4, 128, dtype)
    exact = decode_attention_definition(q.double(), k.double(), v.double(), lengths)
    weights = (torch.einsum("nkgd,nskd->nkgs", q.unflatten(1, (2, 4)), k) * 128**-0.5).softmax(-1)
    plain = torch.einsum("nkgs,nskd->nkgd", weights, v).flatten(1, 2)
    out = decode_attention(q, k, v, lengths)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1] if INTERPRETED else [1, 2])
@pytest.mark.parametrize("size, length", [(20, 150), *([] if INTERPRETED else [(64, 64), (64, 130)])])
def test_no_bit_depends_on_a_neighbour(dtype, threads, size, length, monkeypatch):
    """On the sequence's position, the others' contents, lengths or number, the call, or where groups are computed."""
    # 3 splits
    monkeypatch.setattr(KERNEL_MODULE, "SPLIT", 64)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    slots = 150
    results = []
    for others in ([length] * 5, [0, 64, 65, 150, 151]):
        for position in (0, 3, 4):
            lengths = [*others[:position], length, *others[position + 1 :]]
            q, k, v, lengths_N = random_inputs(lengths, slots, 3, size, dtype, kv_heads=1)
            v[:position] = torch.nan
            for t, alone in zip((q, k, v), random_inputs([length], slots, 3, size, dtype, kv_heads=1)):
                t[position] = alone[0]
            results.append(decode_attention(q, k, v, lengths_N)[position])
            results.append(decode_attention(q, k, v, lengths_N, decode_groups(lengths, slots))[position])
            q, k, v, lengths_N = (t[position : position + 1] for t in (q, k, v, lengths_N))
            results.append(decode_attention(q, k, v, lengths_N)[0])
    torch.set_num_threads(threads_before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("splits", [64], indirect=True)
def test_the_order_of_slots_does_not_matter(splits):
    q, k, v, lengths = random_inputs([200] * 5, 200, 1, 64)
    # as in a buffer that has rolled over
    rolled_k, rolled_v = (t.roll(-77, dims=1) for t in (k, v))
    assert relative_error(decode_attention(q, rolled_k, rolled_v, lengths), decode_attention(q, k, v, lengths)) < 1e-12


@pytest.mark.parametrize("lengths", [[3], [0], [5, 5, 0, 0, 9, 12, 12]])
def test_groups_are_the_sequences(lengths):
    """Each sequence once, in order, with its number of filled slots."""
    groups = decode_groups(lengths, 9)
    assert [row for start, stop, _ in groups for row in range(start, stop)] == list(range(len(lengths)))
    assert [filled for start, stop, filled in groups for _ in range(start, stop)] == [
        min(length, 9) for length in lengths
    ]


@pytest.mark.parametrize("strides", [(2**31, 64, 16), (64, 2**27, 16), (16, 32, 2**30)], ids=["rows", "slots", "heads"])
def test_offsets_past_32_bits(strides):
    """Memory between the elements is never touched."""
    q, k, v, lengths = random_inputs([17, 17], 17, 1, 8, torch.float16)
    memory = torch.empty(2 * sum(size * stride for size, stride in zip(k.shape, strides)), dtype=torch.float16)
    far_k, far_v = (memory.as_strided(k.shape, (*strides, 1), offset) for offset in (0, 2**12))
    far_k.copy_(k)
    far_v.copy_(v)
    expected = decode_attention(q, far_k.clone(), far_v.clone(), lengths)
    assert torch.equal(decode_attention(q, far_k, far_v, lengths), expected)


def rope_inputs(heads, kv_heads, size, dtype=torch.float64):
    """qkv as part of a wider buffer, tables, a cache and three of its positions."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    qkv = random(3, (heads + 2 * kv_heads) * size + 5)[:, :-5]
    tables = rope_tables(torch.tensor([0, 700, 9]), size, 1e4)
    return qkv, *tables, random(11, kv_heads, size), random(11, kv_heads, size), torch.tensor([4, 0, 10])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 2, 64), (9, 3, 20), (3, 3, 128)])
def test_rotation_and_cache_write(heads, kv_heads, size, dtype, poisoned):
    """As the definition, at the positions given; all other positions keep their bits."""
    inputs = rope_inputs(heads, kv_heads, size, dtype)
    ours, plain = [t.clone() for t in inputs], [t.clone() for t in inputs]
    q, expected = rope_into_cache(*ours), rope_into_cache_definition(*plain)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-3
    for got, wanted in ((q, expected), *zip(ours[3:5], plain[3:5])):
        assert got.dtype == dtype and relative_error(got, wanted) < tolerance
    untouched = [n for n in range(11) if n not in inputs[-1].tolist()]
    assert all(torch.equal(now[untouched], before[untouched]) for now, before in zip(ours[3:5], inputs[3:5]))
    assert torch.equal(ours[4], plain[4])


@pytest.mark.parametrize("size", [2, 96])
def test_positions_of_a_step(size):
    """Buffers that are empty, have room, are just full and wrap around; a sequence that is not active."""
    lengths, active = torch.tensor([0, 5, 7, 8, 100_003, 3]), torch.tensor([1, 1, 1, 1, 1, 0])
    frequencies = rope_frequencies(size, 1e6, lengths.device)
    angles = (lengths[:, None] * frequencies).double()
    cos, sin, index, filled = decode_positions(lengths, active, frequencies, 8)
    assert (cos - angles.cos()).abs().max() < 1e-7 and (sin - angles.sin()).abs().max() < 1e-7
    assert index.tolist() == [0, 8 + 5, 16 + 7, 24 + 0, 32 + 3, 40 + 3]
    assert filled.tolist() == [1, 6, 8, 8, 8, 0]
    assert lengths.tolist() == [1, 6, 8, 9, 100_004, 3]


def test_strides_change_nothing():
    """Queries that are part of a larger buffer, and tensors whose last stride is not 1."""
    q, k, v, lengths = random_inputs([7, 3, 1], 7, 3, 16)
    expected = decode_attention(q, k, v, lengths)
    part = torch.cat([torch.full_like(q, torch.nan), q], 1)[:, q.shape[1] :]
    assert torch.equal(decode_attention(part, k, v, lengths), expected)
    q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    assert relative_error(decode_attention(q, k, v, lengths), expected) < 1e-12


def test_the_operator_is_sound():
    """Schema, shapes and tracing."""
    arguments = random_inputs([7, 3], 7, 2, 16, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.minorca.decode_attention.default, arguments, test_utils=tests)
    arguments = rope_inputs(4, 2, 16, torch.float32)
    torch.library.opcheck(torch.ops.minorca.rope_into_cache.default, arguments, test_utils=tests)
    positions = torch.arange(3), torch.ones(3, dtype=torch.int64), rope_frequencies(8, 1e4, torch.device("cpu")), 4
    torch.library.opcheck(torch.ops.minorca.decode_positions.default, positions, test_utils=tests)
