"""Every Triton kernel compiles without a GPU and passes the checks of benchmarks.compiled; each check can fail."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def run(*command, **options) -> subprocess.CompletedProcess:
    """Runs another Python process: in this one Triton may be interpreted, and its device is fixed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, **options
    )


@pytest.mark.parametrize(
    "options", ["--arch 90 --ranks 16", pytest.param("--arch 80 86 89 90 100 120", marks=pytest.mark.slow)]
)
def test_every_kernel(options):
    result = run("-m", "benchmarks.compiled", *options.split(), stderr=subprocess.STDOUT)
    print(result.stdout)
    assert result.returncode == 0, result.stdout.splitlines()[-1]


KERNELS = """
import json
import torch
import triton
import triton.language as tl
from benchmarks.compiled import examine, recorded, target

@triton.jit
def good(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + 1)

@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + i)
    # the whole block is live while it is summed
    tl.store(y_ptr + i, value / tl.sum(value, 0))

@triton.jit
def narrow(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + 3 * i) + 1)

@triton.jit
def product(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    a = tl.load(x_ptr + m[:, None] * K + k)
    b = tl.load(x_ptr + k[:, None] * M + m)
    tl.store(y_ptr + m[:, None] * M + m, tl.dot(a, b))

target(90)
with recorded(warmup=True):
    x = torch.empty(1 << 20, device="meta")
    half = x.to(torch.bfloat16)
    kernels = {
        "good": good[(1,)](x, x, BLOCK=1024),
        "spilling": spilling[(1,)](x, x, BLOCK=16384, num_warps=1),
        "narrow": narrow[(1,)](x, x, BLOCK=1024),
        "wgmma": product[(1,)](half, x, M=64, K=64),
        "no wgmma": product[(1,)](half, x, M=64, K=64, num_warps=2),
        "large": product[(1,)](half, x, M=128, K=512),
    }
print(json.dumps({name: examine(kernel, 90)["rejected"] for name, kernel in kernels.items()}))
"""


def test_checks(tmp_path):
    (tmp_path / "checks.py").write_text(KERNELS)
    rejected = json.loads(run(tmp_path / "checks.py", check=True).stdout)
    print(rejected)
    assert rejected.pop("spilling").startswith("spills")
    assert rejected.pop("large").endswith("bytes of shared memory")
    assert rejected == {"good": "", "wgmma": "", "narrow": "no loads of 128 bits", "no wgmma": "no wgmma"}


def test_reading_nf4_back_is_bound_by_memory():
    """Of the large weights at least 88% of a copy's rate, as predicted for an H100 from the machine code."""
    table = run("-m", "benchmarks.dequantize", "--gpu", "H100", check=True).stdout
    print(table)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    shares = {row[1].split(",")[0]: float(row[-1].rstrip("%")) for row in rows[2:]}
    assert shares["gate_up"] >= 88 and shares["down"] >= 88
    # the multiprocessors have time to spare for each byte
    assert all(float(row[5].rstrip("%")) < 60 for row in rows[2:])
