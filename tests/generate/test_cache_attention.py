"""Attention of prompts in chunks: that of the whole prompt, and to the bit the same whatever the chunks.

Under Triton's interpreter (`TRITON_INTERPRET=1`) with the kernels of a GPU, otherwise with the CPU's blocks.
"""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from minorca.generate.kv_cache import KVCache
from minorca_kernels import attention_definition, rope
from minorca_kernels.operator import INTERPRETED
from tests.helpers import relative_error

LENGTH = 150
THETA = 10000.0
# heads, key heads, head size; the interpreter takes seconds for each
SIZES = [(6, 2, 16), (4, 4, 32), (8, 1, 16)][: 1 if INTERPRETED else None]
CHUNKS = [[33, 100, 17], [1] * 5 + [LENGTH - 5], [47, 1, 64, 38], [16] * 9 + [6], [128, 22]][
    : 2 if INTERPRETED else None
]
WINDOWS = [None, 40, 7, 100, 16, 64][: 2 if INTERPRETED else None]
# What lengths, chunks and windows are multiplied by, with the size of a page; the kernels' tiles divide the real one.
SCALES = {2: 128} if INTERPRETED else {1: 16, 6: 128}
DTYPES = {"fp32": torch.float32} if INTERPRETED else {"fp32": torch.float32, "bf16": torch.bfloat16}


def arch(sizes: tuple[int, int, int], window: int | None) -> Any:
    named = dict(zip(("heads", "kv_heads", "head_dim"), sizes))
    return cast(Any, SimpleNamespace(layers=1, rope_theta=THETA, window=window, **named))


def by_chunks(qkv_TM: torch.Tensor, of: Any, chunks: list[int], beside: int = 0) -> torch.Tensor:
    """The prompt in a slot of its own; with `beside`, each chunk shares its forward with so many tokens of another."""
    cache = KVCache(of, 2, len(qkv_TM), qkv_TM.dtype, torch.device("cpu"), chunk=len(qkv_TM))
    for slot in range(2):
        cache.open(slot, None, len(qkv_TM))
    outs, start = [], 0
    for chunk in chunks:
        segments = [(0, chunk), (1, beside)] if beside else [(0, chunk)]
        other_TM = torch.full((beside, qkv_TM.shape[1]), 0.5, dtype=qkv_TM.dtype)
        fill_TM = torch.zeros(-(chunk + beside) % 16, qkv_TM.shape[1], dtype=qkv_TM.dtype)
        rows_TM = torch.cat([qkv_TM[start : start + chunk], other_TM, fill_TM])
        attend = cache.prefill(segments, len(rows_TM))
        cos_TP, sin_TP = attend.rope_tables(of.head_dim, THETA)
        outs.append(attend.of_qkv(0, rows_TM, cos_TP, sin_TP, of.heads, of.kv_heads)[:chunk])
        start += chunk
    return torch.cat(outs)


@pytest.fixture
def rows_alike(monkeypatch):
    """In Triton's interpreter a row's product does not depend on its place in the tile, as on a GPU: numpy's would."""

    def matmul(a, b, dtype=None):
        return numpy_matmul(a, b, dtype=np.float64).astype(dtype)

    numpy_matmul = np.matmul
    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_of_a_prompt(sizes, window, dtype, scale, monkeypatch):
    monkeypatch.setattr("minorca.generate.kv_cache.PAGE", SCALES[scale])
    window = window and window * scale
    of = arch(sizes, window)
    columns = (of.heads + 2 * of.kv_heads) * of.head_dim
    generator = torch.Generator().manual_seed(0)
    qkv_TM = (1.5 * torch.randn(LENGTH * scale, columns, generator=generator)).to(DTYPES[dtype])
    whole = by_chunks(qkv_TM, of, [len(qkv_TM)])
    for chunks in CHUNKS:
        assert torch.equal(by_chunks(qkv_TM, of, [scale * chunk for chunk in chunks]), whole), chunks
    assert torch.equal(by_chunks(qkv_TM, of, [50 * scale, 100 * scale], beside=37), whole)

    position_T = torch.arange(len(qkv_TM))
    frequencies_P = THETA ** -torch.arange(0, 1, 2 / of.head_dim, dtype=torch.float64)
    angles_TP = position_T[:, None] * frequencies_P
    q_THD, k_TKD, v_TKD = rope(qkv_TM.double(), angles_TP.cos(), angles_TP.sin(), of.heads, of.kv_heads)
    first_T = torch.zeros_like(position_T) if window is None else (position_T - window + 1).clamp(0)
    expected_THD = attention_definition(q_THD, k_TKD, v_TKD, first_T)
    assert relative_error(whole.double(), expected_THD) < (1e-5 if dtype == "fp32" else 2e-2)
