"""Times attention's kernels with other tiles on this GPU: python -m benchmarks.attention_tiles [--output FOLDER]

The table in minorca_kernels/attention.py was chosen by it. Heads of Mistral 7B in bf16; every configuration of a kernel
runs in turn on the same inputs, the one in use first. Processes side by side compile them before.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.cases import MISTRAL_7B
from benchmarks.common import DEVICE, report
from minorca.model.attention import PackedAttention
from minorca_kernels import attention

# `import minorca_kernels.attention` would give the function of that name
MODULE: Any = sys.modules[attention.__module__]
# (BLOCK_M, BLOCK_N, warps, stages)
TILES = {
    "forward": [(128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)],
    "dq": [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
    "dkdv": [(64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)],
}
LENGTHS = ([8192], [4096] * 2, [512] * 16)
# matrix products of a kernel, of the two of forward
PRODUCTS = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}


def launches(lengths: list[int]) -> dict[str, Callable[[], object]]:
    """A call of each kernel on documents of these lengths."""
    tokens = sum(lengths)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    attend = PackedAttention(ends, tokens, None, DEVICE)
    heads = (MISTRAL_7B.heads, MISTRAL_7B.kv_heads, MISTRAL_7B.kv_heads, MISTRAL_7B.heads)
    q, k, v, dout = (torch.randn(tokens, n, MISTRAL_7B.head_dim, device=DEVICE).bfloat16() for n in heads)
    out, lse = MODULE._attention_triton(q, k, v, attend.first, attend.last)
    dq, dk, dv, lse2, delta = map(torch.empty_like, (q, k, v, lse, lse))
    strides = [stride for t in (dout, q, k, v) for stride in t.stride()[:2]]

    def run_dq() -> None:
        constants = MODULE._constants("dq", q, k)
        grid = (triton.cdiv(tokens, constants["BLOCK_M"]) * q.shape[1],)
        tensors: tuple[Tensor, ...] = (dout, q, k, v, attend.first, out, lse, lse2, delta, dq)
        MODULE._dq_kernel[grid](*tensors, tokens, *strides, **constants)

    def run_dkdv() -> None:
        constants = MODULE._constants("dkdv", q, k)
        grid = (triton.cdiv(tokens, constants["BLOCK_N"]) * k.shape[1],)
        tensors: tuple[Tensor, ...] = (dout, q, k, v, attend.last, lse2, delta, dk, dv)
        MODULE._dkdv_kernel[grid](*tensors, tokens, *strides, **constants)

    run_dq()
    return {
        "forward": lambda: MODULE._attention_triton(q, k, v, attend.first, attend.last),
        "dq": run_dq,
        "dkdv": run_dkdv,
    }


def use(kernel: str, tile: tuple[int, ...]) -> None:
    tiles = MODULE._tiles(torch.bfloat16, MISTRAL_7B.head_dim) | {kernel: tile}
    MODULE._tiles = lambda dtype, block_d: tiles


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_tiles", description="Attention's tiles, timed."
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write the JSON to this folder")
    # what a process of its own compiles
    parser.add_argument("--compile", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        kernel, *tile = args.compile
        use(kernel, tuple(map(int, tile)))
        launches([256])[kernel]()
        return
    in_use = MODULE._tiles(torch.bfloat16, MISTRAL_7B.head_dim)
    tiles = {kernel: [in_use[kernel], *(tile for tile in TILES[kernel] if tile != in_use[kernel])] for kernel in TILES}
    command = [sys.executable, "-m", "benchmarks.attention_tiles", "--compile"]
    compilers = [
        subprocess.Popen([*command, kernel, *map(str, tile)]) for kernel, found in tiles.items() for tile in found
    ]
    for process in compilers:
        process.wait()
    rows = []
    for lengths in LENGTHS:
        calls = launches(lengths)
        flops = 4 * MISTRAL_7B.head_dim * MISTRAL_7B.heads * sum(n * (n + 1) // 2 for n in lengths)
        for kernel, found in tiles.items():
            for tile in found:
                use(kernel, tile)
                seconds = cast(float, do_bench(calls[kernel], warmup=5, rep=40, return_mode="median")) / 1e3
                rate = flops * PRODUCTS[kernel] / seconds
                shape = f"{len(lengths)} x {lengths[0]}"
                rows.append(
                    {"kernel": kernel, "shape": shape, "tile": tile, "seconds": seconds, "flops_per_second": rate}
                )
            use(kernel, in_use[kernel])
    report({"rows": rows}, "attention-tiles", args.output)


if __name__ == "__main__":
    main()
