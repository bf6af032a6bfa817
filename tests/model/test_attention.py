"""Attention: position i sees j with 0 <= i - j < W, inside its own document.

On the CPU both implementations are tested: plain PyTorch, and with TRITON_INTERPRET=1 the Triton kernels.
"""

import contextlib
import itertools
import logging
import sys

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from minorca.model import attention as backends
from minorca.model.attention import Case, PackedAttention, candidates, flash_implementation, visible
from minorca_kernels import attention, attention_definition
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

W = 16
LENGTHS = [W - 1, W, W + 1, 3 * W, 1]
TOKENS = sum(LENGTHS)
SHORT_LENGTHS = [12, 8, 1, 19]
KERNEL_MODULE = sys.modules[attention.__module__]
# (BLOCK_M, BLOCK_N): as many queries as keys, or not
TILES = {
    "even": {"forward": (16, 16), "dq": (16, 16), "dkdv": (16, 16)},
    "uneven": {"forward": (16, 32), "dq": (32, 16), "dkdv": (16, 32)},
}


def documents(window, lengths=LENGTHS):
    return PackedAttention(torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths), window, torch.device("cpu"))


def qkv(heads, kv_heads, size, dtype=torch.float64, tokens=TOKENS):
    """[q, k, v], and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in inputs], dout


def with_gradients(function, inputs, dout):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, dout)]


def plain_attention(q, k, v, first):
    """The formula in the inputs' own dtype: a kernel's error is compared with its error."""
    token = torch.arange(len(q), device=q.device)
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill((token < first[:, None]) | (token > token[:, None]), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


@pytest.fixture(params=["even", "uneven"])
def small_blocks(request, monkeypatch):
    """Blocks so small that each implementation takes several of them."""

    tiles = {kernel: (*blocks, 4, 1) for kernel, blocks in TILES[request.param].items()}
    monkeypatch.setattr(KERNEL_MODULE, "_tiles", lambda dtype, block_d: tiles)
    for block in ("CPU_FORWARD_BLOCK", "CPU_BACKWARD_BLOCK"):
        monkeypatch.setattr(KERNEL_MODULE, block, 7 if request.param == "even" else 20)


@pytest.mark.parametrize("window", [None, 1, W, 2 * W])
def test_the_definition_equals_python_loops(window):
    """For one head."""
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
def test_first_and_last_equal_the_mask(window):
    attend = documents(window)
    token = torch.arange(TOKENS)
    blocks = [visible(torch.arange(length), torch.arange(length), window) for length in LENGTHS]
    assert torch.equal((attend.first[:, None] <= token) & (token <= token[:, None]), torch.block_diag(*blocks).bool())
    assert torch.equal((token <= token[:, None]) & (token[:, None] <= attend.last), torch.block_diag(*blocks).bool())
    assert attend.first.dtype == attend.last.dtype == torch.int32


@pytest.mark.parametrize(
    "window, heads, kv_heads, size", [(None, 4, 2, 8), (1, 2, 1, 24), (W, 3, 1, 80), (W, 2, 2, 16), (2 * W, 2, 1, 24)]
)
def test_packed_documents_equal_the_definition(window, heads, kv_heads, size, small_blocks, poisoned):
    """Values and gradients of `PackedAttention`, which the network calls."""
    attend = documents(window)
    inputs, dout = qkv(heads, kv_heads, size)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first), inputs, dout)
    assert relative_error(ours[0], exact[0]) < 1e-12
    for mine, theirs in zip(ours[1:], exact[1:]):
        # absolute too: with a window of 1 the gradients of q and k are zero
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, W, 40])
def test_chunks_equal_the_whole(window, small_blocks, poisoned):
    """Attention of a prompt's last queries to all its keys, of the operation and of the definition."""
    attend = documents(window, [53])
    inputs, _ = qkv(2, 1, 24, tokens=53)
    q, k, v = (t.detach() for t in inputs)
    whole = attention_definition(q, k, v, attend.first)
    for size, starts in ((1, (0, 52)), (9, range(0, 53, 9)), (16, range(0, 53, 16)), (37, (0, 37))):
        for start in starts:
            stop = min(start + size, 53)
            arguments = q[start:stop], k[:stop], v[:stop], attend.first[start:stop]
            assert relative_error(attention(*arguments, attend.last), whole[start:stop]) < 1e-12, (start, stop)
            assert relative_error(attention_definition(*arguments), whole[start:stop]) < 1e-12, (start, stop)


def test_a_chunk_has_no_gradients():
    attend = documents(None, [4])
    (q, k, v), _ = qkv(2, 1, 8, tokens=4)
    with pytest.raises(ValueError, match="2 queries, 4 keys"):
        attention(q[2:], k, v, attend.first[2:], attend.last)


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def test_rounding(dtype, small_blocks):
    """Values and gradients are at most twice as far from fp64 as the formula in the same dtype."""
    attend = documents(6, SHORT_LENGTHS)
    inputs, dout = qkv(4, 2, 16, dtype, sum(SHORT_LENGTHS))
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first), inputs64, dout.double())
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, attend.first), inputs, dout)
    ours = with_gradients(lambda q, k, v: attention(q, k, v, attend.first, attend.last), inputs, dout)
    for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
        assert got.dtype == dtype
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype, size", [(torch.float32, 16), (torch.float16, 128)], ids=str)
def test_the_tiles_of_the_gpu(dtype, size):
    """Blocks as large as a GPU's: one holds several documents, a document takes several, some are fully visible."""
    lengths = [300, 30, 20]
    attend = documents(290, lengths)
    inputs, dout = qkv(2, 1, size, dtype, sum(lengths))
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first), inputs64, dout.double())
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, attend.first), inputs, dout)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    for reference, allowed, got in zip(exact, plain, ours):
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps


def strided(t):
    """Three views of a tensor [T, H, D]: a part of a larger buffer, heads outermost, and D not innermost."""
    yield torch.cat([torch.full_like(t, torch.nan), t], 1)[:, t.shape[1] :]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.mT.contiguous().mT


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_strides_change_nothing(small_blocks):
    attend = documents(6, SHORT_LENGTHS)
    inputs, dout = qkv(2, 1, 16, torch.float32, sum(SHORT_LENGTHS))
    expected = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    assert all(t.is_contiguous() for t in expected)
    for *others, other_dout in zip(*(strided(t.detach()) for t in (*inputs, dout))):
        ours = with_gradients(lambda q, k, v: attend(0, q, k, v), [t.requires_grad_() for t in others], other_dout)
        assert all(t.is_contiguous() for t in ours)
        assert all(relative_error(mine, theirs) < 1e-6 for mine, theirs in zip(ours, expected))


@pytest.mark.parametrize("strides", [(2**27, 64), (64, 2**30)], ids=["tokens", "heads"])
def test_offsets_past_32_bits(strides):
    """Of tokens, and of heads. Memory between them is never touched."""
    attend = documents(4, [17])
    first, last = attend.first, attend.last
    memory = torch.empty(17 * strides[0] + 4 * strides[1], dtype=torch.float16)
    views = [memory.as_strided((17, 4, 16), (*strides, 1), offset) for offset in (0, 16, 32, 48)]
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
    """Other values in one document change no bit of the others, forward or backward; equal values give equal bits."""
    attend = documents(6, SHORT_LENGTHS)
    inputs, dout = qkv(2, 1, 16, torch.float32, sum(SHORT_LENGTHS))
    changed = slice(SHORT_LENGTHS[0], SHORT_LENGTHS[0] + SHORT_LENGTHS[1])
    others = [t.detach().clone() for t in (*inputs, dout)]
    for t in others:
        t[changed] = 5 * t[changed].flip(0)
    expected, again = (with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout) for _ in range(2))
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), [t.requires_grad_() for t in others[:3]], others[3])
    assert all(map(torch.equal, expected, again))
    for mine, theirs in zip(ours, expected):
        differs = (mine != theirs).flatten(1).any(1)
        assert differs[changed].any() and not differs[: changed.start].any() and not differs[changed.stop :].any()


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_gradients_are_derivatives(small_blocks):
    attend = documents(5, SHORT_LENGTHS[:2])
    inputs, _ = qkv(2, 1, 8, tokens=20)

    def operation(q, k, v):
        return attention(q, k, v, attend.first, attend.last)

    assert torch.autograd.gradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_operators_are_sound(small_blocks):
    """Schema, shapes and tracing."""
    attend = documents(5, SHORT_LENGTHS[:2])
    inputs, dout = qkv(2, 1, 8, torch.float32, 20)
    q, _, v = (t.detach() for t in inputs)
    k = torch.cat([v, v], 1)[:, 1:]
    vectors = (attend.first, attend.last)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.minorca
    torch.library.opcheck(ops.attention.default, (q, k, v, *vectors), test_utils=tests)
    out, lse = ops.attention(q, k, v, *vectors)
    torch.library.opcheck(ops.attention_backward.default, (dout, q, k, v, out, lse, *vectors), test_utils=tests)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace the interpreter")
def test_compiled():
    """One graph, the same bits."""
    attend = documents(W)
    inputs, dout = qkv(4, 2, 16, torch.float32)
    expected = with_gradients(lambda q, k, v: attention(q, k, v, attend.first, attend.last), inputs, dout)
    compiled = torch.compile(lambda q, k, v: attend(0, q, k, v), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled, inputs, dout), expected))


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_inference_mode(small_blocks):
    attend = documents(6, SHORT_LENGTHS)
    inputs, _ = qkv(2, 1, 16, torch.float32, sum(SHORT_LENGTHS))
    with torch.inference_mode():
        out = attend(0, *inputs)
    assert torch.equal(out, attend(0, *inputs))


# compute capabilities
TURING = (7, 5)
AMPERE = (8, 0)
HOPPER = (9, 0)
BLACKWELL = (10, 0)
HALF = torch.bfloat16
CPU = torch.device("cpu")
SINGLE = torch.float32


@pytest.mark.parametrize(
    "capability, dtype, size, plain, deterministic, flash, varlen, expected",
    [
        (HOPPER, HALF, 128, True, False, "FA3", True, ["FA3", "cudnn", "own"]),
        (HOPPER, HALF, 256, False, False, "FA3", True, ["FA3", "own"]),
        (BLACKWELL, HALF, 128, False, False, "FA4", True, ["FA4", "own"]),
        (BLACKWELL, HALF, 256, False, False, "FA4", True, ["own"]),
        (HOPPER, HALF, 128, True, False, None, True, ["varlen", "cudnn", "own"]),
        (HOPPER, HALF, 128, True, False, None, False, ["cudnn", "own"]),
        (HOPPER, HALF, 256, True, False, None, True, ["varlen", "own"]),
        (AMPERE, torch.float16, 64, False, False, None, True, ["varlen", "own"]),
        (AMPERE, HALF, 128, False, False, None, False, ["own"]),
        # a measurement may choose another one tomorrow
        (HOPPER, HALF, 128, True, True, "FA3", True, ["own"]),
        (HOPPER, SINGLE, 128, True, False, "FA3", True, ["own"]),
        (HOPPER, HALF, 84, True, False, "FA3", True, ["own"]),
        (HOPPER, HALF, 512, True, False, "FA3", True, ["own"]),
        (TURING, torch.float16, 128, True, False, None, True, ["own"]),
    ],
)
def test_the_backends_to_choose_from(capability, dtype, size, plain, deterministic, flash, varlen, expected):
    case = Case(torch.device("cuda"), dtype, 8, 2, size, plain, True, deterministic, flash)
    assert candidates(case, capability, varlen) == expected


@pytest.fixture
def hopper(monkeypatch):
    """What asks for a GPU is answered as on a Hopper; what runs there runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    backends.fastest.cache_clear()
    yield
    backends.fastest.cache_clear()


def window_too_large_by(keys: int):
    """A varlen_attn by our kernels, whose window may be wrong."""

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size, **_):
        window = None if window_size[0] < 0 else window_size[0] + 1 + keys
        attend = PackedAttention(cu_q, len(q), window, q.device)
        return attention(q, k, v, attend.first, attend.last)

    return varlen


def fails(*_, **__):
    raise TypeError("varlen_attn() got an unexpected keyword argument 'enable_gqa'")


@pytest.mark.skipif(INTERPRETED, reason="bf16 is wrong in the interpreter")
@pytest.mark.parametrize("in_inference_mode", [False, True])
@pytest.mark.parametrize(
    "varlen, seconds, expected, message",
    [
        (window_too_large_by(0), {"varlen": 1.0, "own": 2.0}, "varlen", None),
        (window_too_large_by(0), {"varlen": 2.0, "own": 1.0}, "own", None),
        (window_too_large_by(1), {"varlen": 1.0, "own": 2.0}, "own", "relative error"),
        (fails, {"varlen": 1.0, "own": 2.0}, "own", "unexpected keyword"),
    ],
)
def test_the_fastest_backend_that_is_right_is_used(
    hopper, varlen, seconds, expected, message, in_inference_mode, monkeypatch, caplog
):
    """Measured once, in any mode that the first attention is in."""
    measured = []
    monkeypatch.setattr(backends, "varlen_attn", lambda: varlen)
    monkeypatch.setattr(backends, "_seconds", lambda name, case: measured.append(name) or seconds[name])
    case = Case(torch.device("cpu"), HALF, 4, 2, 16, False, not in_inference_mode, False, None)
    with torch.inference_mode(in_inference_mode), caplog.at_level(logging.INFO):
        assert [backends.fastest(case) for _ in range(3)] == [expected] * 3
    assert measured.count("own") == 1 and len([line for line in caplog.messages if "is not used" not in line]) == 1
    assert message is None or message in caplog.text


@pytest.mark.skipif(INTERPRETED, reason="bf16 is wrong in the interpreter")
def test_measuring_inside_a_checkpointed_block_leaves_it_alone(hopper, monkeypatch):
    """The gradients are those without a measurement, though it differentiates in the middle of a forward."""

    def seconds(name: str, case: Case) -> float:
        return float(len(backends._run(name, case, [4], None)()))

    def block(x):
        backends.fastest(Case(CPU, HALF, 4, 2, 16, False, True, False, None))
        return x.sin().exp()

    monkeypatch.setattr(backends, "varlen_attn", lambda: window_too_large_by(0))
    monkeypatch.setattr(backends, "_seconds", seconds)
    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert torch.allclose(found, x.cos() * x.sin().exp())


@pytest.mark.parametrize(
    "version, capability, expected",
    [("2.11.0", HOPPER, "FA3"), ("2.11.0", BLACKWELL, None), ("2.13.0", BLACKWELL, "FA4"), ("2.13.0", AMPERE, None)],
)
def test_the_choice_of_a_flash_implementation(version, capability, expected, monkeypatch):
    """By GPU and torch, and only where it can be activated."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(backends, "_check", lambda name, case: None)
    assert flash_implementation.__wrapped__(CPU) == expected

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(backends, "activate_flash_attention_impl", missing)
    assert flash_implementation.__wrapped__(CPU) is None


@pytest.mark.skipif(INTERPRETED, reason="bf16 is wrong in the interpreter")
@pytest.mark.parametrize("in_inference_mode", [False, True])
@pytest.mark.parametrize(
    "varlen, expected", [(window_too_large_by(0), "FA3"), (window_too_large_by(1), None), (fails, None)]
)
def test_a_flash_implementation_that_is_wrong_is_not_used(hopper, varlen, expected, in_inference_mode, monkeypatch):
    """One whose window is one key too large, or whose interface is another version's; also where generation asks."""
    restored = []
    monkeypatch.setattr(backends, "varlen_attn", lambda: varlen)
    monkeypatch.setattr(backends, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(backends, "restore_flash_attention_impl", lambda: restored.append(True))
    with torch.inference_mode(in_inference_mode):
        assert flash_implementation.__wrapped__(CPU) == expected
    assert bool(restored) == (expected is None)
