"""Attention of one query a sequence to its pages, and the write into them before it.

On the CPU, as test_attention.py, in both implementations.
"""

import itertools
import sys

import pytest
import torch

from minorca_kernels import (
    DecodeOnCPU,
    decode_attention,
    decode_attention_definition,
    decode_positions,
    decode_spans,
    read_span,
    rope_frequencies,
    rope_into_cache,
    rope_into_cache_definition,
    rope_tables,
    span_of,
)
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

KERNEL_MODULE = sys.modules[decode_attention.__module__]
PAGE = 16


def random_inputs(lengths, group, size, dtype=torch.float64, kv_heads=2, seed=0, page=PAGE):
    """q, pages of k and v, page tables and lengths. Keys and values are views of one buffer; pages lie in no order, and
    all that no sequence has filled is NaN."""
    generator = torch.Generator().manual_seed(seed)
    places = -(-max(lengths) // page) + 1
    q, buffer = (
        torch.randn(len(lengths), *shape, size, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((kv_heads * group,), (places * page, 2 * kv_heads))
    )
    lengths_N = torch.tensor(lengths)
    buffer[torch.arange(places * page) >= lengths_N[:, None]] = torch.nan
    table_NB = torch.randperm(len(lengths) * places, generator=generator).view(len(lengths), places).int()
    pages = torch.empty(table_NB.numel(), page, 2 * kv_heads, size, dtype=dtype)
    pages[table_NB.long()] = buffer.unflatten(1, (places, page))
    k, v = pages.split(kv_heads, 2)
    return q, k, v, table_NB, lengths_N


def edge_lengths(longest):
    return [0, 1, longest - 1, longest, longest // 2 + 1]


@pytest.fixture(params=[16, 64] if INTERPRETED else [None])
def splits(request, monkeypatch):
    """The positions of a split, several of which one program combines at once, and the programs of two key heads."""
    monkeypatch.setattr(KERNEL_MODULE, "SPLIT", request.param)
    monkeypatch.setattr(KERNEL_MODULE, "BLOCK_SPLITS", 4)
    monkeypatch.setattr(KERNEL_MODULE, "multiprocessor_count", lambda device: 3)


@pytest.mark.parametrize("window", [None, 5, 20])
def test_the_definition_equals_python_loops(window):
    q, k, v, table, lengths = random_inputs(edge_lengths(23), 3, 8)
    out = decode_attention_definition(q, k, v, table, lengths, window)
    for (n, length), head in itertools.product(enumerate(lengths.tolist()), range(6)):
        seen = range(max(0, length - (window or length)), length)
        at = [(table[n, position // PAGE], position % PAGE, head // 3) for position in seen]
        scores = torch.stack([q[n, head] @ k[place] / 8**0.5 for place in at]) if at else torch.empty(0)
        expected = sum((weight * v[place] for weight, place in zip(scores.softmax(0), at)), torch.zeros(8))
        assert torch.allclose(out[n, head], expected.double(), atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 63])
@pytest.mark.parametrize("longest", [1, 64, 200])
@pytest.mark.parametrize("group, size", [(1, 64), (4, 128), (8, 80)])
def test_equals_the_definition(group, size, longest, window, splits, poisoned):
    inputs = random_inputs(edge_lengths(longest), group, size)
    out, expected = (function(*inputs, window) for function in (decode_attention, decode_attention_definition))
    assert relative_error(out, expected) < 1e-12 and out.is_contiguous() and not out[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
@pytest.mark.parametrize("splits", [64], indirect=True)
def test_rounding(dtype, splits):
    """At most twice as far from fp64 as the formula in the same dtype."""
    q, k, v, table, lengths = random_inputs([208] * 5, 4, 128, dtype)
    exact = decode_attention_definition(q.double(), k.double(), v.double(), table, lengths)
    k_NCKD, v_NCKD = (pages[table.long()][:, :-1].flatten(1, 2) for pages in (k, v))
    weights = (torch.einsum("nkgd,nskd->nkgs", q.unflatten(1, (2, 4)), k_NCKD) * 128**-0.5).softmax(-1)
    plain = torch.einsum("nkgs,nskd->nkgd", weights, v_NCKD).flatten(1, 2)
    out = decode_attention(q, k, v, table, lengths)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1] if INTERPRETED else [1, 2])
@pytest.mark.parametrize("size, length", [(20, 150), *([] if INTERPRETED else [(64, 64), (64, 130)])])
@pytest.mark.parametrize("window", [None, 90])
def test_no_bit_depends_on_a_neighbour(dtype, threads, size, length, window, monkeypatch):
    """On the sequence's position, the others' contents, lengths or number, the call, or the order of the pages."""
    # 3 splits
    monkeypatch.setattr(KERNEL_MODULE, "SPLIT", 64)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    alone_q, alone_k, alone_v, alone_table, _ = random_inputs([length], 3, size, dtype, kv_heads=1)
    ordered_k, ordered_v = (t[alone_table[0].long()] for t in (alone_k, alone_v))
    ordered_table = torch.arange(alone_table.numel()).view(1, -1).int()
    results = [
        decode_attention(alone_q, alone_k, alone_v, alone_table, torch.tensor([length]), window)[0],
        decode_attention(alone_q, ordered_k, ordered_v, ordered_table, torch.tensor([length]), window)[0],
    ]
    for others in ([length] * 5, [0, 64, 65, 150, 151]):
        for position in (0, 3, 4):
            lengths = [*others[:position], length, *others[position + 1 :]]
            q, k, v, table, lengths_N = random_inputs(lengths, 3, size, dtype, kv_heads=1, seed=1 + position)
            q[position] = alone_q[0]
            used = -(-length // PAGE)
            for t, alone in ((k, alone_k), (v, alone_v)):
                t[table[position, :used].long()] = alone[alone_table[0, :used].long()]
            results.append(decode_attention(q, k, v, table, lengths_N, window)[position])
    torch.set_num_threads(threads_before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(INTERPRETED, reason="no kernel matters")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (9, 3), (8, 2), (2, 2), (14, 2)])
def test_a_layer_on_the_cpu_equals_the_definitions(heads, kv_heads, window, poisoned):
    """Of sequences in adjacent pages and in others, and of an inactive one; the cache too."""
    size, lengths = 16, [1, 40, 0, 33]
    generator = torch.Generator().manual_seed(0)
    qkv, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, (heads + 2 * kv_heads) * size), *2 * [(12, PAGE, kv_heads, size)])
    )
    table = torch.tensor([[1, 0, 0], [2, 3, 4], [0, 0, 0], [9, 5, 7]], dtype=torch.int32)
    index = torch.tensor([PAGE, 4 * PAGE + 7, 3, 7 * PAGE])
    tables = rope_tables(torch.tensor(lengths) - 1, size, 10000.0)
    expected_k, expected_v = k.clone(), v.clone()
    caches = expected_k.flatten(0, 1), expected_v.flatten(0, 1)
    q = rope_into_cache_definition(qkv, *tables, *caches, index)
    expected = decode_attention_definition(q, expected_k, expected_v, table, torch.tensor(lengths), window)
    out = DecodeOnCPU(*tables, index, decode_spans(table.tolist(), lengths, PAGE, window))(qkv, k, v)
    assert (
        relative_error(out, expected) < 1e-12 and relative_error(k, expected_k) < 1e-12 and torch.equal(v, expected_v)
    )


def test_pages_can_be_shared():
    """Two sequences with one beginning."""
    q, k, v, table, lengths = random_inputs([40, 40], 2, 16)
    table[1, :2] = table[0, :2]
    expected = decode_attention_definition(q, k, v, table, lengths)
    assert relative_error(decode_attention(q, k, v, table, lengths), expected) < 1e-12


@pytest.mark.parametrize("pages", [[3, 4, 5], [3, 5, 4], [4]])
@pytest.mark.parametrize("start, stop", [(0, 16), (3, 20), (17, 18), (0, 48), (16, 16), (0, 0)])
def test_spans_are_the_positions(pages, start, stop):
    values = torch.randn(7, 16, 2, 4)
    stop = min(stop, 16 * len(pages))
    expected = values[pages].flatten(0, 1)[start:stop]
    assert torch.equal(read_span(values, span_of(pages, 16, start, stop)), expected)


@pytest.mark.parametrize(
    "strides", [(2**29, 64, 16), (64 * 16, 2**27, 16), (16 * 16, 16, 2**30)], ids=["pages", "slots", "heads"]
)
def test_offsets_past_32_bits(strides):
    """Memory between the elements is never touched."""
    q, k, v, table, lengths = random_inputs([17, 17], 1, 8, torch.float16)
    memory = torch.empty(2 * sum(size * stride for size, stride in zip(k.shape, strides)), dtype=torch.float16)
    far_k, far_v = (memory.as_strided(k.shape, (*strides, 1), offset) for offset in (0, 2**12 + 8))
    far_k.copy_(k)
    far_v.copy_(v)
    expected = decode_attention(q, far_k.clone(), far_v.clone(), table, lengths)
    assert torch.equal(decode_attention(q, far_k, far_v, table, lengths), expected)


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
    """Sequences at a page's beginning, middle and end; two that are not active, one of them as long as its table."""
    lengths, active = torch.tensor([0, 5, 15, 16, 50, 64]), torch.tensor([1, 1, 1, 1, 0, 0])
    frequencies = rope_frequencies(size, 1e6, lengths.device)
    angles = (lengths[:, None] * frequencies).double()
    table = torch.arange(24).flip(0).view(6, 4).int()
    cos, sin, index, filled = decode_positions(lengths, active, frequencies, table, 16)
    assert (cos - angles.cos()).abs().max() < 1e-7 and (sin - angles.sin()).abs().max() < 1e-7
    assert index.tolist() == [23 * 16, 19 * 16 + 5, 15 * 16 + 15, 10 * 16, 4, 5]
    assert filled.tolist() == [1, 6, 16, 17, 0, 0]
    assert lengths.tolist() == [1, 6, 16, 17, 50, 64]


def test_strides_change_nothing():
    """Queries that are part of a larger buffer, and tensors whose last stride is not 1."""
    q, k, v, table, lengths = random_inputs([7, 3, 1], 3, 16)
    expected = decode_attention(q, k, v, table, lengths)
    part = torch.cat([torch.full_like(q, torch.nan), q], 1)[:, q.shape[1] :]
    assert torch.equal(decode_attention(part, k, v, table, lengths), expected)
    q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    assert relative_error(decode_attention(q, k, v, table, lengths), expected) < 1e-12


def test_the_operator_is_sound():
    """Schema, shapes and tracing."""
    arguments = *random_inputs([7, 3], 2, 16, torch.float32), None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.minorca.decode_attention.default, arguments, test_utils=tests)
    arguments = rope_inputs(4, 2, 16, torch.float32)
    torch.library.opcheck(torch.ops.minorca.rope_into_cache.default, arguments, test_utils=tests)
    table = torch.ones(3, 2, dtype=torch.int32)
    frequencies = rope_frequencies(8, 1e4, torch.device("cpu"))
    positions = torch.arange(3), torch.ones(3, dtype=torch.int64), frequencies, table, 16
    torch.library.opcheck(torch.ops.minorca.decode_positions.default, positions, test_utils=tests)
