"""Every Triton kernel compiles for GPUs that are not here and passes the gates of benchmarks.compiled, and each gate can refuse."""

import json
import os
import subprocess
import sys

from tests.helpers import ROOT


def run(*command, **options) -> subprocess.CompletedProcess:
    """A Python of its own: here Triton may be interpreted, and has its own idea of the device."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, **options
    )


def test_every_kernel():
    result = run("-m", "benchmarks.compiled", stderr=subprocess.STDOUT)
    print(result.stdout)
    assert result.returncode == 0, result.stdout.splitlines()[-1]


KERNELS = """
import json
import torch
import triton
import triton.language as tl
from benchmarks.compiled import examine, recorded, target

@triton.jit
def good(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + 1)

@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i, value / tl.sum(value, 0))  # all of it is live while it is summed

@triton.jit
def narrow(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + 3 * i) + 1)

@triton.jit
def product(x, y, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    a, b = tl.load(x + m[:, None] * K + k), tl.load(x + k[:, None] * M + m)
    tl.store(y + m[:, None] * M + m, tl.dot(a, b))

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
print(json.dumps({name: examine(kernel, 90)["refused"] for name, kernel in kernels.items()}))
"""


def test_gates(tmp_path):
    (tmp_path / "gates.py").write_text(KERNELS)
    refused = json.loads(run(tmp_path / "gates.py", check=True).stdout)
    print(refused)
    assert refused.pop("spilling").startswith("spills")
    assert refused.pop("large").endswith("bytes of shared memory")
    assert refused == {"good": "", "wgmma": "", "narrow": "no loads of 128 bits", "no wgmma": "no wgmma"}
