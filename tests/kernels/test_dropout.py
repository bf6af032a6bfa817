"""Dropout's mask: its statistics, and the same bits in Triton; the products with it against definitions in fp64."""

import pytest
import torch
from torch import Tensor

from minorca_kernels.dropout import a_gradient, add_x_gradient, dropout_definition, dropout_mask, dropped_product
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="needs Triton")


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Of corresponding rows, in standard deviations of what independent ones have."""
    first, second = (t.double() - t.double().mean() for t in (first, second))
    size = first.shape[1]
    return (first * second).mean(1) / (first.std() * second.std()) * size**0.5


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_rates(p):
    """Of the whole mask, within 4 standard deviations of 1 - p."""
    mask = dropout_mask(512, 1024, p, 7, DEVICE).double()
    assert (mask.mean() - (1 - p)).abs() < 4 * (p * (1 - p) / mask.numel()) ** 0.5


# less probable drops coincide too rarely for their number to be normally distributed
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_elements_are_independent(p):
    """Rates and correlations of rows, columns, shifted rows, and seeds, within 5 standard deviations; 1 on average."""
    mask = dropout_mask(512, 1024, p, 7, DEVICE)
    deviation = (p * (1 - p)) ** 0.5
    statistics = [(mask.double().mean(axis) - (1 - p)) / deviation * mask.shape[axis] ** 0.5 for axis in (0, 1)]
    for other_seed in (8, 6, 7 + 2**32, 7 + 2**31, 2**63 - 1):
        statistics.append(correlations(mask, dropout_mask(512, 1024, p, other_seed, DEVICE)))
        # a neighbouring row of another seed
        statistics.append(correlations(mask[1:], dropout_mask(511, 1024, p, other_seed, DEVICE)))
    for distance in (1, 2, 16, 256):
        statistics.append(correlations(mask[distance:], mask[:-distance]))
        statistics.append(correlations(mask.t()[distance:], mask.t()[:-distance]))
        statistics.append(correlations(mask[:-1, distance:], mask[1:, :-distance]))
    for values in statistics:
        assert values.abs().max() < 5 and 0.8 < values.square().mean() < 1.25


def test_the_mask_never_changes():
    """A checkpoint resumes with the masks that it would have had: these bits are part of its format."""
    bits = dropout_mask(2, 16, 0.5, 3, DEVICE).int().tolist()
    assert ["".join(map(str, row)) for row in bits] == ["1100011000100111", "1000110111111000"]


@needs_triton
@pytest.mark.parametrize("seed", [3, 2**63 - 25])
def test_triton_computes_the_same_bits(seed):
    """The product with an identity is the input where the mask is true."""
    x = torch.ones(130, 48, device=DEVICE)
    s = dropped_product(x, [torch.eye(48, device=DEVICE)], [seed], 0.5)
    assert torch.equal(s != 0, dropout_mask(130, 48, 0.5, seed, DEVICE))


@pytest.mark.parametrize(
    "dtype, ranks", [(torch.float16, (3, 20)), (torch.float32, (8,)), (torch.float16, (300,))], ids=str
)
def test_products(dtype, ranks, poisoned):
    """Of strided inputs, against fp64; twice to the bit."""
    generator = torch.Generator().manual_seed(0)
    shapes = (70, 103), (70, sum(ranks)), (70, 99), *((rank, 99) for rank in ranks)
    x, ds, dx, *a = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    x, seeds, p = x[:, :99], [5, 6][: len(ranks)], 0.3
    dropped = [dropout_definition(x.double(), p, seed) for seed in seeds]
    own_ds = ds.double().split(ranks, 1)
    exact = [
        torch.cat([x_i @ a_i.double().t() for x_i, a_i in zip(dropped, a)], 1),
        torch.cat([ds_i.t() @ x_i for ds_i, x_i in zip(own_ds, dropped)]),
        dx + sum(dropout_definition(ds_i @ a_i.double(), p, seed) for ds_i, a_i, seed in zip(own_ds, a, seeds)),
    ]

    def run() -> list[Tensor]:
        sum_TK, parts = dx.clone(), list(ds.split(ranks, 1))
        add_x_gradient(sum_TK, parts, a, seeds, p)
        return [dropped_product(x, a, seeds, p), a_gradient(x, parts, seeds, p), sum_TK]

    results = run()
    for got, again, reference in zip(results, run(), exact, strict=True):
        assert torch.equal(got, again)
        assert relative_error(got, reference) < max(torch.finfo(dtype).eps, 1e-6)
