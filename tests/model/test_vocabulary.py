"""What is trained of the embedding and head, compared with PEFT's definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

from minorca.model.vocabulary import TrainedRows, VocabularyLoRA, VocabularyMatrix
from minorca_kernels.dropout import dropout_mask
from tests.helpers import relative_error

V, H, M, FIRST, COUNT = 50, 16, 40, 44, 3
TOKENS = torch.randint(V, (M,), generator=torch.Generator().manual_seed(0))
TARGETS = torch.cat([torch.arange(FIRST, FIRST + COUNT), TOKENS[COUNT:]])
CPU = torch.device("cpu")
# of a gradient
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def matrix(dtype: torch.dtype) -> VocabularyMatrix:
    torch.manual_seed(1)
    return VocabularyMatrix(torch.randn(V, H).to(dtype))


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and what losses and embedded tokens are multiplied by."""
    torch.manual_seed(2)
    return torch.randn(M, H).to(dtype).requires_grad_(), torch.rand(M)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_trained_rows(dtype):
    """As if the matrix were a copy with these rows: values and gradients of both uses; other rows stay, to the bit."""
    weight = matrix(dtype)
    before = weight.weight.detach().clone()
    weight.rows = TrainedRows(FIRST, COUNT, H, CPU)
    values = weight.rows.values_NH
    with torch.no_grad():
        values.normal_()
    x, factors = inputs(dtype)
    embedded, losses = weight(TOKENS), weight.losses(x, TARGETS)
    total = (losses * factors).sum() + (embedded.float() * factors[:, None]).sum()
    gradients = torch.autograd.grad(total, (values, x))

    rows = values.detach().to(dtype).double().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    whole = before.double().index_copy(0, torch.arange(FIRST, FIRST + COUNT), rows)
    expected = F.cross_entropy(exact_x @ whole.t(), TARGETS, reduction="none")
    total = (expected * factors).sum() + (F.embedding(TOKENS, whole) * factors[:, None]).sum()
    exact = torch.autograd.grad(total, (rows, exact_x), retain_graph=True)
    assert torch.equal(embedded.double(), F.embedding(TOKENS, whole))
    for ours, theirs in ((losses, expected), *zip(gradients, exact)):
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    others = torch.ones(V, dtype=torch.bool)
    others[FIRST : FIRST + COUNT] = False
    assert torch.equal(weight.weight[others], before[others])

    (gradient,) = torch.autograd.grad((weight.linear(x).double() * factors[:, None]).sum(), values)
    (exact_gradient,) = torch.autograd.grad(((exact_x @ whole.t()) * factors[:, None]).sum(), rows)
    assert relative_error(gradient, exact_gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_whole_matrix(dtype):
    """It is stored in fp32 and computed with in the model's dtype."""
    weight = matrix(dtype)
    values = weight.weight.detach().clone()
    weight.train_whole()
    with torch.no_grad():
        weight.weight.copy_(values)
    x, factors = inputs(dtype)
    embedded, losses = weight(TOKENS), weight.losses(x, TARGETS)
    total = (losses * factors).sum() + (embedded.float() * factors[:, None]).sum()
    (gradient,) = torch.autograd.grad(total, weight.weight)
    exact = values.double().requires_grad_()
    expected = F.cross_entropy(x.detach().double() @ exact.t(), TARGETS, reduction="none")
    total = (expected * factors).sum() + (F.embedding(TOKENS, exact) * factors[:, None]).sum()
    (exact_gradient,) = torch.autograd.grad(total, exact)
    assert embedded.dtype == weight.linear(x).dtype == dtype and gradient.dtype == torch.float32
    assert relative_error(losses, expected) <= TOLERANCE[dtype]
    assert relative_error(gradient, exact_gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_low_rank_update_of_the_head(dtype):
    """Its dropout is that of a projection: the mask is a function of seed and place, and inference has none."""
    weight = matrix(dtype)
    lora = weight.lora = VocabularyLoRA((H, V), 4, 0.5, 0.3, torch.float32, CPU)
    lora.seed = 5
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    x, factors = inputs(dtype)
    for kept in (dropout_mask(M, H, 0.3, 5, CPU) / 0.7, torch.ones(M, H)):
        losses = weight.losses(x, TARGETS)
        gradients = torch.autograd.grad((losses * factors).sum(), (lora.a, lora.b, x))
        a, b, exact_x = (tensor.detach().double().requires_grad_() for tensor in (lora.a, lora.b, x))
        logits = exact_x @ weight.weight.double().t() + 0.5 * (exact_x * kept) @ a.t() @ b.t()
        expected = F.cross_entropy(logits, TARGETS, reduction="none")
        exact = torch.autograd.grad((expected * factors).sum(), (a, b, exact_x))
        assert relative_error(losses, expected) <= TOLERANCE[dtype]
        for ours, theirs in zip(gradients, exact):
            assert relative_error(ours, theirs) <= TOLERANCE[dtype]
        weight.eval()


def test_a_low_rank_update_of_the_embedding():
    weight = matrix(torch.float32)
    lora = weight.lora = VocabularyLoRA((V, H), 4, 0.5, 0.0, torch.float32, CPU)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    whole = weight.weight.double() + 0.5 * (lora.b.double() @ lora.a.double()).t()
    assert relative_error(weight(TOKENS), F.embedding(TOKENS, whole)) <= 1e-6
