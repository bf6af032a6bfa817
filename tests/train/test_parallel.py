"""Whether a model is sharded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minorca.config import ParallelConfig
from minorca.train import parallel


@pytest.mark.parametrize(
    "ranks, gigabytes, settings, expected",
    [
        # 14.5 GB of weights on one GPU of 24: sharding would copy each weight, and make no room
        (1, 24, {}, False),
        (8, 24, {}, True),
        (8, 80, {}, False),
        (1, 80, {"shard": "fsdp"}, True),
        (8, 24, {"shard": "none"}, False),
        (1, 24, {"cpu_offload": True}, True),
        (4, 80, {"replicate": 2}, True),
    ],
)
def test_sharding_by_default(ranks, gigabytes, settings, expected, monkeypatch):
    model = torch.nn.Linear(29, 250_000_000, bias=False, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(parallel, "memory_per_rank", lambda device: int(gigabytes * 1e9))
    world: Any = SimpleNamespace(size=ranks, device=None, sum=lambda values: [ranks * value for value in values])
    assert parallel.shards(model, ParallelConfig(**settings), world) == expected
