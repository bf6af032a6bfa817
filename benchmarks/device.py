"""The machine and its measured limits: python -m benchmarks.device [--output FOLDER]

Copy bandwidth is the bytes that `dst.copy_(src)` reads and writes per second. The matrix rate is the FLOP/s of products
of random normal matrices, sustained, in bf16, and on the CPU in fp32 too.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.common import DEVICE, clock, report, spread

CUDA = DEVICE.type == "cuda"


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB on CUDA, 256 MiB on the CPU; the median of 20."""
    source = torch.ones(2**30 if CUDA else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(20):
        start = clock()
        target.copy_(source)
        seconds.append(clock() - start)
    return 2 * source.numel() / spread(seconds)["median"]


def matmul_rate(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of products of n x n matrices, over 1 s on the CPU, 10 s on CUDA, so that its power limit shows."""
    n, min_seconds = (8192, 10) if CUDA else (1024, 1)
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    out = a @ b
    products = 0
    start = clock()
    while (seconds := clock() - start) < min_seconds:
        for _ in range(20 if CUDA else 1):
            torch.mm(a, b, out=out)
            products += 1
    return {"n": n, "seconds": seconds, "flops_per_second": products * 2 * n**3 / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description="The machine and its measured limits."
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write the JSON to this folder")
    args = parser.parse_args()
    limits = {"copy_bytes_per_second": copy_bandwidth(), "matmul_bf16": matmul_rate(torch.bfloat16)}
    if not CUDA:
        limits["matmul_fp32"] = matmul_rate(torch.float32)
    report(limits, "device", args.output)


if __name__ == "__main__":
    main()
