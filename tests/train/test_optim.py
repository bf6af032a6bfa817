"""The optimizer beside torch's."""

import pytest
import torch
from torch import nn

from minorca.train.optim import GRAIN_SIZE, AdamW

pytestmark = pytest.mark.usefixtures("two_threads")


def draw(sizes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(len(parameter), generator=generator)
    return parameters


@pytest.mark.parametrize("sizes, threads", [((1, 100, GRAIN_SIZE), 1), ((100, GRAIN_SIZE + 1), 2)])
def test_small_parameters_are_updated_by_one_thread_to_the_same_values(sizes, threads, monkeypatch):
    ours, theirs = draw(sizes), draw(sizes)
    optimizer = AdamW(ours, lr=0.1, weight_decay=0.1, fused=True)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(2):
        reference.step()
    step, seen = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: seen.append(torch.get_num_threads()) or step(*args))
    for _ in range(2):
        optimizer.step()
    assert seen == [threads, threads]
    assert torch.get_num_threads() == 2
    for parameter, other in zip(ours, theirs):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)


def test_an_error_leaves_the_number_of_threads_as_it_was():
    parameters = draw((4,))
    optimizer = AdamW(parameters, lr=0.1, fused=True)
    parameters[0].grad = torch.zeros(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.get_num_threads() == 2
