"""Trees: branches that share a prompt compute what separate documents of the prompt and a branch would.

A tree is written as its sizes, [prompt, branch, ...]. As in test_attention.py, plain PyTorch and, with
TRITON_INTERPRET=1, the Triton kernels are tested.
"""

import itertools
from unittest import mock

import pytest
import torch

from minorca import load_model
from minorca.model import attention as backends
from minorca.model.attention import PackedAttention, visible
from minorca.train.parallel import checkpoint_activations
from minorca_kernels import attention, attention_definition
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error
from tests.model.test_attention import W, qkv, small_blocks, with_gradients

CPU = torch.device("cpu")
# one, two and five branches, prompts and branches of one token and across tiles of 16, plain documents between them
TREES = [[5, 7], [W - 1, 9, W + 1], [1, 1, 1], [20], [2 * W, 2, 1, W, 3, 6], [1, 18, 4], [2]]
SHORT_TREES = [[3, 4], [5], [9, 6, 11, 2]]
WINDOWS = [None, 1, 2, W - 1, W, W + 1, 3 * W]
__all__ = ["small_blocks"]


def packed(trees, window) -> PackedAttention:
    ends = [list(itertools.accumulate(sizes)) for sizes in trees]
    lengths = [stops[-1] for stops in ends]
    branches = [stops[:-1] for stops in ends]
    return PackedAttention(
        torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths), window, CPU, branches=branches
    )


def separate(trees) -> list[torch.Tensor]:
    """Of every branch with its prompt, and of every plain document, its tokens' places in the flat batch."""
    found = []
    start = 0
    for prompt, *sizes in trees:
        edges = [prompt, *itertools.accumulate(sizes, initial=prompt)][1:]
        for begin, stop in itertools.pairwise(edges) if sizes else [(prompt, prompt)]:
            found.append(start + torch.tensor([*range(prompt), *range(begin, stop)]))
        start += edges[-1]
    return found


def by_documents(trees, window, compute):
    """What `compute(places, attend)` gives for the separate documents, as one flat batch of the trees."""
    documents = separate(trees)
    lengths = [len(places) for places in documents]
    attend = PackedAttention(torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths), window, CPU)
    places = torch.cat(documents)
    out = compute(places, attend)
    # a prompt's results are those of its first document; they are the same in all
    copy = torch.stack([(places == token).nonzero()[0, 0] for token in range(int(places.max()) + 1)])
    return out[copy]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_that_of_separate_documents(window):
    attend = packed(TREES, window)
    tokens = sum(map(sum, TREES))
    token = torch.arange(tokens)
    expected = torch.zeros(tokens, tokens, dtype=torch.bool)
    for places in separate(TREES):
        position = torch.arange(len(places))
        expected[places[:, None], places] |= visible(position, position, window)
        assert torch.equal(attend.positions[places], position)
    assert attend.tree is not None
    hidden_begin, hidden_end, reach = attend.tree
    hidden = (hidden_begin[:, None] <= token) & (token < hidden_end[:, None])
    assert torch.equal((attend.first[:, None] <= token) & (token <= token[:, None]) & ~hidden, expected)
    # the same in the kernels' words
    assert torch.equal(
        (attend.first[:, None] <= token) & (token <= token[:, None]) & (token[:, None] <= attend.last), expected
    )
    for key in range(tokens):
        assert expected[key : reach[key] + 1, key].all() and not expected[reach[key] + 1 : reach[key] + 2, key].any()
        assert expected[attend.last[key], key] and not expected[attend.last[key] + 1 :, key].any()
    nothing = hidden_begin == hidden_end
    assert torch.equal(hidden_begin[nothing], attend.first[nothing])
    assert all(t.dtype == torch.int32 for t in (attend.first, attend.last, attend.tree))


@pytest.mark.parametrize(
    "window, heads, kv_heads, size, small_blocks",
    [*((window, 2, 1, 16, "even") for window in WINDOWS), (None, 4, 2, 24, "uneven"), (W + 1, 3, 1, 8, "uneven")],
    indirect=["small_blocks"],
)
def test_trees_equal_documents(window, heads, kv_heads, size, small_blocks, poisoned):
    """Values and gradients, of our operation and of the definition; a prompt's gradients are the documents' sum."""
    attend = packed(TREES, window)
    inputs, dout = qkv(heads, kv_heads, size, tokens=sum(map(sum, TREES)))

    def documents(q, k, v):
        return by_documents(
            TREES, window, lambda places, attend: attention_definition(q[places], k[places], v[places], attend.first)
        )

    exact = with_gradients(documents, inputs, dout)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    definition = with_gradients(lambda q, k, v: attention_definition(q, k, v, attend.first, attend.tree), inputs, dout)
    for mine, defined, theirs in zip(ours, definition, exact):
        # absolute too: with a window of 1 the gradients of q and k are zero
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)
        assert torch.allclose(defined, theirs, rtol=1e-12, atol=1e-12)


def plain_attention(q, k, v, attend):
    """The formula in the inputs' own dtype: a kernel's error is compared with its error."""
    token = torch.arange(len(q))
    sees = (attend.first[:, None] <= token) & (token <= token[:, None]) & (token[:, None] <= attend.last)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def test_rounding(dtype, small_blocks):
    """Values and gradients are at most twice as far from fp64 as the formula in the same dtype."""
    attend = packed(SHORT_TREES, 12)
    inputs, dout = qkv(4, 2, 16, dtype, sum(map(sum, SHORT_TREES)))
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(
        lambda q, k, v: attention_definition(q, k, v, attend.first, attend.tree), inputs64, dout.double()
    )
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, attend), inputs, dout)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
        assert got.dtype == dtype
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps, name


def test_the_tiles_of_the_gpu():
    """Blocks as large as a GPU's, of which some are fully visible before a gap and after it."""
    trees = [[200, 30, 180], [20]]
    attend = packed(trees, None)
    inputs, dout = qkv(2, 1, 16, torch.float16, sum(map(sum, trees)))
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(
        lambda q, k, v: attention_definition(q, k, v, attend.first, attend.tree), inputs64, dout.double()
    )
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, attend), inputs, dout)
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout)
    for reference, allowed, got in zip(exact, plain, ours):
        assert relative_error(got, reference) <= 2 * relative_error(allowed, reference) + torch.finfo(got.dtype).eps


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_branches_are_isolated_and_results_repeat(small_blocks):
    """Another first branch changes no bit of the others, and reaches its prompt by gradients alone."""
    attend = packed(SHORT_TREES, None)
    inputs, dout = qkv(2, 1, 16, torch.float32, sum(map(sum, SHORT_TREES)))
    start = sum(map(sum, SHORT_TREES[:-1]))
    prompt = slice(start, start + 9)
    branch = slice(start + 9, start + 15)
    others = [t.detach().clone() for t in (*inputs, dout)]
    for t in others:
        t[branch] = 5 * t[branch].flip(0)
    expected, again = (with_gradients(lambda q, k, v: attend(0, q, k, v), inputs, dout) for _ in range(2))
    ours = with_gradients(lambda q, k, v: attend(0, q, k, v), [t.requires_grad_() for t in others[:3]], others[3])
    assert all(map(torch.equal, expected, again))
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), ours, expected):
        differs = (mine != theirs).flatten(1).any(1)
        assert differs[branch].any()
        assert not differs[: prompt.start].any() and not differs[branch.stop :].any()
        assert differs[prompt].any() == (name in ("dk", "dv"))


@pytest.mark.parametrize("small_blocks", ["even"], indirect=True)
def test_operators_are_sound(small_blocks):
    """Schema, shapes and tracing."""
    attend = packed(SHORT_TREES, 12)
    inputs, dout = qkv(2, 1, 8, torch.float32, sum(map(sum, SHORT_TREES)))
    q, k, v = (t.detach() for t in inputs)
    mask = (attend.first, attend.last, attend.tree)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.minorca
    torch.library.opcheck(ops.attention.default, (q, k, v, *mask), test_utils=tests)
    out, lse = ops.attention(q, k, v, *mask)
    torch.library.opcheck(ops.attention_backward.default, (dout, q, k, v, out, lse, *mask), test_utils=tests)


def test_one_branch_is_a_plain_document():
    """It only continues its prompt, so every back end computes it."""
    one, plain = packed([[5, 7], [3]], 4), packed([[12], [3]], 4)
    assert one.tree is None and plain.tree is None
    for name in ("positions", "first", "last"):
        assert torch.equal(getattr(one, name), getattr(plain, name))


def test_no_other_back_end_computes_a_tree(monkeypatch):
    monkeypatch.setattr(backends, "fastest", lambda case: pytest.fail("a back end was chosen"))
    (q, k, v), _ = qkv(2, 1, 8, tokens=9)
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        packed([[3, 2, 4]], None)(0, q, k, v)


@pytest.mark.parametrize("starts", [[[0, 4]], [[3, 3]], [[4, 2]], [[3, 9]]])
def test_branches_start_inside_their_document(starts):
    with pytest.raises(ValueError, match="document 0 to start at rising numbers from 1 to 8"):
        PackedAttention(None, 9, None, CPU, branches=starts)


def test_branches_belong_to_documents():
    with pytest.raises(ValueError, match="1 documents, got those of 2"):
        PackedAttention(None, 9, None, CPU, branches=[[3], []])


def test_a_tree_is_taken_as_a_whole():
    attend = packed([[1, 1, 2]], None)
    q, k, v = (t.detach() for t in qkv(2, 1, 8, tokens=4)[0])
    with pytest.raises(ValueError, match="2 queries, 4 keys"):
        attention(q[2:], k, v, attend.first[2:], attend.last, attend.tree)


@pytest.mark.skipif(INTERPRETED, reason="the network runs more kernels than are tested here")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("window", [None, 12])
def test_the_network_on_trees_equals_documents(window, checkpointing, save_mistral, monkeypatch):
    """Logits, and the gradients of the embedded tokens and of every weight that has one."""
    model = load_model(save_mistral(sliding_window=window)[0], torch.float64, "cpu").requires_grad_()
    checkpoint_activations(model, checkpointing)
    tokens = sum(map(sum, TREES))
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(tokens, 64, dtype=torch.float64, generator=generator).requires_grad_()
    dlogits = torch.randn(tokens, 128, dtype=torch.float64, generator=generator)

    def logits(places, attend):
        monkeypatch.setattr(model.embedding, "forward", lambda _: embedded[places])
        return model(places, attend=attend)

    results = []
    for compute in (
        lambda: logits(torch.arange(tokens), packed(TREES, window)),
        lambda: by_documents(TREES, window, logits),
    ):
        embedded.grad = None
        model.zero_grad()
        out = compute()
        out.backward(dlogits)
        weights = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.detach(), embedded.grad, *weights])
    assert len(results[0]) > 3
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 1e-12
