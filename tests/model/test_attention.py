"""Attention against the one sentence: position i sees j with 0 <= i - j < W inside its own document.

The whole file passes on both implementations a CPU has: plain PyTorch's, and with TRITON_INTERPRET=1 the kernels'.
"""

import itertools
import logging
import sys

import pytest
import torch

import minorca.model.attention
from minorca.model.attention import PackedAttention, choose_backend, flash_implementation, visible
from minorca_kernels import attention, attention_definition
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

W = 16
LENGTHS = [W - 1, W, W + 1, 3 * W, 1]
FEW = [12, 8, 1, 19]
KERNELS = sys.modules[attention.__module__]
TILES = {"even": {"forward": (16, 16), "query_gradient": (16, 16), "key_gradient": (16, 16)}}
TILES["uneven"] = {"forward": (16, 32), "query_gradient": (32, 16), "key_gradient": (16, 32)}


def documents(window, lengths=LENGTHS):
    return PackedAttention(torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths), window, torch.device("cpu"))


def qkv(heads, kv_heads, size, dtype=torch.float64, tokens=sum(LENGTHS)):
    """And the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in inputs], dout


def with_gradients(function, inputs, dout):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def plain_attention(q, k, v, first):
    """The formula in the inputs' own dtype: its error is what a kernel's is measured by."""
    token, group = torch.arange(len(q), device=q.device), q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill((token < first[:, None]) | (token > token[:, None]), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


@pytest.fixture(params=["even", "uneven"])
def small_blocks(request, monkeypatch):
    """Several blocks of either implementation, as many queries as keys in a tile or not."""

    def tiles(kernel, dtype, block):
        queries, keys = TILES[request.param][kernel]
        return {"BM": queries, "BN": keys, "num_warps": 4, "num_stages": 1}

    monkeypatch.setattr(KERNELS, "_tiles", tiles)
    for block in ("QUERY_BLOCK", "GRADIENT_BLOCK"):
        monkeypatch.setattr(KERNELS, block, 7 if request.param == "even" else 20)


@pytest.mark.parametrize("window", [None, 1, W, 2 * W])
def test_the_definition_is_the_sentence(window):
    """Written out in Python loops, for one head."""
    q, k, v = (t.detach()[:, 0] for t in qkv(1, 1, 8)[0])
    out = attention_definition(q[:, None], k[:, None], v[:, None], documents(window).first)[:, 0]
    start = 0
    for length in LENGTHS:
        for i in range(length):
            seen = [start + j for j in range(length) if 0 <= i - j < (window or length)]
            weights = torch.softmax(k[seen] @ q[start + i] / 8**0.5, 0)
            assert torch.allclose(out[start + i], weights @ v[seen], atol=1e-12)
        start += length


@pytest.mark.parametrize("window", [None, 1, W, 2 * W, 1000])
def test_first_and_last_are_the_sentence(window):
    attend, token = documents(window), torch.arange(sum(LENGTHS))
    blocks = [visible(torch.arange(length), torch.arange(length), window) for length in LENGTHS]
    assert torch.equal((attend.first[:, None] <= token) & (token <= token[:, None]), torch.block_diag(*blocks).bool())
    assert torch.equal((token <= token[:, None]) & (token[:, None] <= attend.last), torch.block_diag(*blocks).bool())
    assert attend.first.dtype == attend.last.dtype == torch.int32


@pytest.mark.parametrize(
    "window, heads, kv_heads, size", [(None, 4, 2, 8), (1, 2, 1, 24), (W, 3, 1, 80), (W, 2, 2, 16), (2 * W, 2, 1, 24)]
)
def test_packed_documents_equal_the_definition(window, heads, kv_heads, size, small_blocks, poisoned):
    """Values and gradients, through what the network calls."""
    attend, (inputs, dout) = documents(window), qkv(heads, kv_heads, size)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first), inputs, dout)
    assert relative_error(ours[0], exact[0]) < 1e-12
    for mine, theirs in zip(ours[1:], exact[1:]):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)  # a window of 1 leaves q and k no gradient


@pytest.mark.parametrize("window", [None, 1, W, 40])
def test_chunks_equal_the_whole(window, small_blocks, poisoned):
    """The last tokens' queries alone, whatever came before; the definition's too."""
    attend, (inputs, _) = documents(window, [53]), qkv(2, 1, 24, tokens=53)
    q, k, v = (t.detach() for t in inputs)
    whole = attention_definition(q, k, v, attend.first)
    for size, starts in ((1, (0, 52)), (9, range(0, 53, 9)), (16, range(0, 53, 16)), (37, (0, 37))):
        for start in starts:
            stop = min(start + size, 53)
            arguments = q[start:stop], k[:stop], v[:stop], attend.first[start:stop]
            assert relative_error(attention(*arguments, attend.last), whole[start:stop]) < 1e-12, (start, stop)
            assert relative_error(attention_definition(*arguments), whole[start:stop]) < 1e-12, (start, stop)


def test_a_chunk_has_no_gradients():
    attend, ((q, k, v), _) = documents(None, [4]), qkv(2, 1, 8, tokens=4)
    with pytest.raises(ValueError, match="2 queries, 4 keys"):
        attention(q[2:], k, v, attend.first[2:], attend.last)


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def test_rounding(dtype, small_blocks):
    """Values and gradients are at most twice as far from fp64 as the formula in the same dtype."""
    first, last = (attend := documents(6, FEW)).first, attend.last
    inputs, dout = qkv(4, 2, 16, dtype, sum(FEW))
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, first), wide, dout.double())
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, first), inputs, dout)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, first, last), inputs, dout)
    for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
        assert got.dtype == dtype
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps, name


def test_the_tiles_of_the_gpu():
    """No block smaller than a GPU's: one holds several documents, and one document takes several."""
    attend, (inputs, dout) = documents(90, [150, 30, 20]), qkv(2, 1, 16, torch.float32, 200)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first), inputs, dout)
    assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(ours, exact))


def strided(t):
    """Three layouts a tensor [T, H, D] may come in: inside a wider buffer, head by head, and D not innermost."""
    yield torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.mT.contiguous().mT


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_strides_change_nothing(small_blocks):
    attend, (inputs, dout) = documents(6, FEW), qkv(2, 1, 16, torch.float32, sum(FEW))
    expected = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    assert all(t.is_contiguous() for t in expected)
    for *others, other_dout in zip(*(strided(t.detach()) for t in (*inputs, dout))):
        ours = with_gradients(lambda q, k, v: attend(0, q, k, v), [t.requires_grad_() for t in others], other_dout)
        assert all(t.is_contiguous() for t in ours)
        assert all(relative_error(mine, theirs) < 1e-6 for mine, theirs in zip(ours, expected))


@pytest.mark.parametrize("steps", [(2**27, 64), (64, 2**30)], ids=["tokens", "heads"])
def test_offsets_past_32_bits(steps):
    """Of tokens, and of heads; of the memory between, nothing is touched."""
    first, last = (attend := documents(4, [17])).first, attend.last
    memory = torch.empty(17 * steps[0] + 4 * steps[1], dtype=torch.float16)
    views = [memory.as_strided((17, 4, 16), (*steps, 1), offset) for offset in (0, 16, 32, 48)]
    inputs, dout = qkv(4, 4, 16, torch.float16, 17)
    for view, t in zip(views, (*inputs, dout)):
        view.copy_(t.detach())
    expected = with_gradients(lambda q, k, v: attention(q, k, v, first, last), inputs, dout)
    ours = with_gradients(
        lambda q, k, v: attention(q, k, v, first, last), [t.requires_grad_() for t in views[:3]], views[3]
    )
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_documents_are_isolated_and_results_repeat(small_blocks):
    """Other values in one document move no bit of the others, forward or backward; the same values give the same bits."""
    attend, (inputs, dout) = documents(6, FEW), qkv(2, 1, 16, torch.float32, sum(FEW))
    changed = slice(FEW[0], FEW[0] + FEW[1])
    others = [t.detach().clone() for t in (*inputs, dout)]
    for t in others:
        t[changed] = 5 * t[changed].flip(0)
    expected, again = (with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout) for _ in range(2))
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), [t.requires_grad_() for t in others[:3]], others[3])
    assert all(map(torch.equal, expected, again))
    for mine, theirs in zip(ours, expected):
        moved = (mine != theirs).flatten(1).any(1)
        assert moved[changed].any() and not moved[: changed.start].any() and not moved[changed.stop :].any()


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_gradients_are_derivatives(small_blocks):
    first, last = (attend := documents(5, FEW[:2])).first, attend.last
    inputs, _ = qkv(2, 1, 8, tokens=20)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, first, last), inputs, fast_mode=True)


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_operators_are_sound(small_blocks):
    """Schema, shapes and tracing."""
    attend, (inputs, dout) = documents(5, FEW[:2]), qkv(2, 1, 8, torch.float32, 20)
    q, _, v = (t.detach() for t in inputs)
    k, vectors = torch.cat([v, v], 1)[:, 1:], (attend.first, attend.last)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.minorca
    torch.library.opcheck(ops.attention.default, (q, k, v, *vectors), test_utils=tests)
    out, lse = ops.attention(q, k, v, *vectors)
    torch.library.opcheck(ops.attention_backward.default, (dout, q, k, v, out, lse, *vectors), test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace the interpreter")
def test_compiled():
    """One graph, the same bits."""
    attend, (inputs, dout) = documents(W), qkv(4, 2, 16, torch.float32)
    expected = with_gradients(lambda q, k, v: attention(q, k, v, attend.first, attend.last), inputs, dout)
    compiled = torch.compile(lambda q, k, v: attend(0, q, k, v), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, inputs, dout), expected))


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_inference_mode(small_blocks):
    attend, (inputs, _) = documents(6, FEW), qkv(2, 1, 16, torch.float32, sum(FEW))
    with torch.inference_mode():
        out = attend(0, *inputs)
    assert torch.equal(out, attend(0, *inputs))


HOPPER, AMPERE, TURING, BLACKWELL = (9, 0), (8, 0), (7, 5), (10, 0)
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "capability, dtype, size, plain, deterministic, flash, varlen, expected",
    [
        (HOPPER, HALF, 128, True, False, "FA3", True, "FA3"),
        (HOPPER, HALF, 256, False, True, "FA3", True, "FA3"),
        (BLACKWELL, HALF, 128, False, False, "FA4", True, "FA4"),
        (BLACKWELL, HALF, 256, False, False, "FA4", True, "varlen"),
        (HOPPER, HALF, 128, True, False, None, True, "cudnn"),
        (HOPPER, HALF, 128, True, False, None, False, "cudnn"),
        (HOPPER, HALF, 128, True, True, None, True, "varlen"),  # cuDNN's gradients do not repeat
        (HOPPER, HALF, 256, True, False, None, True, "varlen"),
        (HOPPER, HALF, 128, False, False, None, True, "varlen"),
        (AMPERE, torch.float16, 64, False, False, None, True, "varlen"),
        (AMPERE, HALF, 128, False, False, None, False, "own"),
        (HOPPER, SINGLE, 128, True, False, "FA3", True, "own"),
        (HOPPER, HALF, 84, True, False, "FA3", True, "own"),
        (HOPPER, HALF, 512, True, False, "FA3", True, "own"),
        (TURING, torch.float16, 128, True, False, None, True, "own"),
    ],
)
def test_the_choice_of_a_back_end(capability, dtype, size, plain, deterministic, flash, varlen, expected):
    choice = choose_backend(
        capability, dtype, size, plain=plain, deterministic=deterministic, flash=flash, varlen=varlen
    )
    assert choice == expected


@pytest.mark.parametrize(
    "version, capability, expected",
    [("2.11.0", HOPPER, "FA3"), ("2.11.0", BLACKWELL, None), ("2.13.0", BLACKWELL, "FA4"), ("2.13.0", AMPERE, None)],
)
def test_the_choice_of_a_flash_implementation(version, capability, expected, monkeypatch):
    """By GPU and torch, and only where it can be activated."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(minorca.model.attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(minorca.model.attention, "_varlen_error", lambda device: 0.0)
    assert flash_implementation.__wrapped__(capability) == expected

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(minorca.model.attention, "activate_flash_attention_impl", missing)
    assert flash_implementation.__wrapped__(capability) is None


@pytest.mark.skipif(INTERPRETED, reason="bf16 is wrong in the interpreter")
@pytest.mark.parametrize("off, expected", [(0, "FA3"), (1, None)])
def test_a_flash_implementation_that_is_wrong_is_not_used(off, expected, monkeypatch):
    """One whose window is a key too wide is found out."""
    restored = []

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size, **_):
        attend = PackedAttention(cu_q, len(q), window_size[0] + 1 + off, q.device)
        return attention(q, k, v, attend.first, attend.last)

    error = minorca.model.attention._varlen_error
    monkeypatch.setattr(minorca.model.attention, "_varlen_error", lambda device: error("cpu"))
    monkeypatch.setattr(minorca.model.attention, "varlen_attn", varlen)
    monkeypatch.setattr(minorca.model.attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(minorca.model.attention, "restore_flash_attention_impl", lambda: restored.append(True))
    assert flash_implementation.__wrapped__(HOPPER) == expected and bool(restored) == (expected is None)


def test_a_choice_is_reported_once(caplog):
    minorca.model.attention._report.cache_clear()
    with caplog.at_level(logging.INFO, logger="minorca.model.attention"):
        for choice in ("varlen", "own", "varlen"):
            minorca.model.attention._report(choice, torch.bfloat16, 128)
    assert caplog.messages == [f"attention by {choice} (bfloat16, head size 128)" for choice in ("varlen", "own")]
