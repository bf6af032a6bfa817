"""Every operation against its definition: values, gradients (fp64 gradcheck), and rounding in bf16."""

import pytest
import torch
import torch.nn.functional as F
from minorca_kernels import (
    Adapter,
    linear_cross_entropy,
    linear_cross_entropy_definition,
    lora_linear,
    lora_linear_definition,
    rms_norm,
    rms_norm_definition,
    rope,
    rope_definition,
    rope_tables,
    swiglu,
    swiglu_definition,
)
from minorca_kernels import cross_entropy as cross_entropy_module

TOKENS, HIDDEN, OUT, VOCAB, RANK = 7, 12, 10, 19, 3


def tensors(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def adapters(ab, seed=0):
    """Two adapters on rows [0, 4) and [6, 10) of ten: rows between them have none."""
    return [Adapter(0, 4, ab[0], ab[1], seed + 1), Adapter(6, 10, ab[2], ab[3], seed + 2)]


TARGETS = torch.arange(TOKENS) * 2
FROZEN = torch.randn(OUT, HIDDEN, generator=torch.Generator().manual_seed(1))
CASES = {  # name: (operation, definition, shapes); each takes tensors of the shapes
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_definition(x, w, 1e-5), [(TOKENS, HIDDEN), (HIDDEN,)]),
    "swiglu": (swiglu, swiglu_definition, [(TOKENS, 2 * HIDDEN)]),
    "rope": (
        lambda q, k: torch.cat(rope(q, k, *rope_tables(torch.arange(TOKENS), 4, 1e4)), 1),
        lambda q, k: torch.cat(rope_definition(q, k, *rope_tables(torch.arange(TOKENS), 4, 1e4)), 1),
        [(TOKENS, 4, 4), (TOKENS, 2, 4)],
    ),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, TARGETS),
        lambda x, w: linear_cross_entropy_definition(x, w, TARGETS),
        [(TOKENS, HIDDEN), (VOCAB, HIDDEN)],
    ),
    **{
        f"lora_linear, dropout {p}": (
            lambda x, *ab, p=p: lora_linear(x, FROZEN.to(x.dtype), adapters(ab), 0.7, p),
            lambda x, *ab, p=p: lora_linear_definition(x, FROZEN.to(x.dtype), adapters(ab), 0.7, p),
            [(TOKENS, HIDDEN)] + 2 * [(RANK, HIDDEN), (4, RANK)],
        )
        for p in (0.0, 0.4)
    },
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "CHUNK", 3)  # several chunks, the last one short
    return CASES[request.param]


def test_gradients_are_derivatives(case):
    operation, _, shapes = case
    assert torch.autograd.gradcheck(operation, tensors(torch.float64, *shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_definition(case, dtype):
    """Values and gradients are at most twice as far from the float64 reference as the definition's own."""
    operation, definition, shapes = case
    inputs = tensors(dtype, *shapes)

    def run(function, inputs):
        out = function(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        gradients = torch.autograd.grad((out * weights).sum() if out.dim() else out / 257, inputs, allow_unused=True)
        return [out, *(g for g in gradients if g is not None)]

    exact = run(definition, [t.detach().double().requires_grad_() for t in inputs])
    for name, ours, plain, reference in zip(["out", *"abcdef"], run(operation, inputs), run(definition, inputs), exact):
        scale = reference.abs().max() * torch.finfo(dtype).eps
        error, allowed = ((t.double() - reference).abs().max() for t in (ours, plain))
        assert error <= 2 * allowed + scale, name


def test_no_gradient_where_it_is_not_needed():
    """A frozen norm weight, head or input gets no gradient, and what is left is right."""
    x, w = tensors(torch.float32, (TOKENS, HIDDEN), (HIDDEN,))
    rms_norm(x, w.detach(), 1e-5).sum().backward()
    assert x.grad is not None and w.grad is None
    x, w = tensors(torch.float32, (TOKENS, HIDDEN), (VOCAB, HIDDEN))
    linear_cross_entropy(x.detach(), w.detach(), TARGETS)
    linear_cross_entropy(x, w.detach(), TARGETS).backward()
    assert x.grad is not None and w.grad is None


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    x, w = tensors(torch.float32, (0, HIDDEN), (VOCAB, HIDDEN))
    loss = linear_cross_entropy(x, w.detach(), TARGETS[:0])
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, HIDDEN)


def test_dropout_is_a_function_of_its_seed():
    x, *ab = tensors(torch.float32, (TOKENS, HIDDEN), *2 * [(RANK, HIDDEN), (4, RANK)])
    first, again, other = (lora_linear(x, FROZEN, adapters(ab, seed), 1.0, 0.5) for seed in (0, 0, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, 4:6], F.linear(x, FROZEN)[:, 4:6])  # rows without an adapter


def test_rope_depends_on_distance_alone():
    """Scores of rotated queries and keys do not change when all positions shift."""
    q, k = tensors(torch.float32, (TOKENS, 4, 8), (TOKENS, 4, 8))
    scores = [
        torch.einsum("qhd,khd->hqk", *rope(q, k, *rope_tables(torch.arange(TOKENS) + shift, 8, 1e4))) for shift in (0, 1000)
    ]
    assert torch.allclose(*scores, atol=1e-3)
