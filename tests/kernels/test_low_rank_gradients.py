"""dy B and dy^T S, by one pass and by two products, against fp64; and the grid of the single pass."""

import pytest
import torch

import minorca_kernels.low_rank_gradients as module
from minorca_kernels.low_rank_gradients import low_rank_gradients
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs Triton")
@pytest.mark.parametrize("dtype, rank", [(torch.float16, 24), (torch.float32, 24), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_gradients(dtype, rank, scale, poisoned):
    """Into rows that lie apart."""
    generator = torch.Generator().manual_seed(0)
    dy, b, s = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in ((600, 330), (330, rank), (600, rank))
    )
    exact = [scale * dy.double() @ b.double(), scale * dy.t().double() @ s.double()]
    both = torch.zeros(600, rank + 2, dtype=dtype, device=DEVICE)
    ds = both[:, 1:-1]
    db = low_rank_gradients(dy, b, s, scale, ds)
    assert db.dtype == torch.float32 and not both[:, [0, -1]].any()
    for got, reference in zip((ds, db), exact, strict=True):
        assert relative_error(got, reference) < max(torch.finfo(got.dtype).eps, 1e-6)


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("columns", [4096, 14336])
@pytest.mark.parametrize("tokens", [4096, 8192, 8191, 32768, 70000])
def test_the_grid_fills_whole_waves(tokens, columns, rank):
    """At most a ninth of the time of 132 multiprocessors, two programs each, passes without work."""
    programs_t, blocks_n = -(-tokens // 256), columns // 64
    blocks = module._blocks_per_program(programs_t, blocks_n, rank, 132)
    waves = -(-programs_t * -(-blocks_n // blocks) // 264)
    assert programs_t * blocks_n / (waves * blocks * 264) > 8 / 9
