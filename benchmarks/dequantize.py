"""What bounds the read-back of NF4 weights, counted without a GPU: python -m benchmarks.dequantize [--gpu NAME]

The kernel is compiled at a Mistral-7B's shapes, and its machine code counted: it has no loops, so each thread executes
every instruction once. Its time is that of the bytes that it moves or of the busiest part of a multiprocessor,
whichever is longer, and a constant; the share of a copy is the time of a copy of the same bytes in relation to it.
All of it is a prediction: benchmarks.kernels measures.
"""

import argparse
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.cases import MISTRAL_7B, dequantizations
from benchmarks.compiled import target, traced
from benchmarks.table import grid
from minorca_kernels.dequantize_nf4 import BLOCKS
from minorca_kernels.nf4 import BLOCK

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# of the units of 64 lanes: integers, comparisons, selections, conversions; the others have 128, or are the memory's
ALU = {"F2FP", "IADD3", "IADD", "ISETP", "LEA", "LOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD"}
# bytes that a multiprocessor's shared memory and first cache move in a cycle
CACHE_LINE = 128
WARP = 32
# as benchmarks.predict assumes them: what memory-bound kernels reach of a copy, and seconds of a launch
OF_COPY, LAUNCH = 0.93, 2.5e-6


@dataclass(frozen=True)
class GPU:
    """Multiprocessors, and assumptions: cycles a second under load, and bytes a second that a copy reads and writes."""

    arch: int
    multiprocessors: int
    clock: float
    copy: float


GPUS = {
    "A100": GPU(80, 108, 1.41e9, 1.75e12),
    "RTX 3090": GPU(86, 82, 1.7e9, 0.85e12),
    "RTX 4090": GPU(89, 128, 2.5e9, 0.92e12),
    "H100": GPU(90, 132, 1.7e9, 3.0e12),
    "H200": GPU(90, 132, 1.7e9, 4.1e12),
    "B200": GPU(100, 148, 1.8e9, 7.0e12),
    "RTX 5090": GPU(120, 170, 2.4e9, 1.6e12),
}


def instructions(kernel) -> Counter[str]:
    """How often each instruction stands in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = subprocess.run([NVDISASM, file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)", code, re.MULTILINE)
    # it is filled up with these
    return Counter(name for name in found if name not in ("NOP", "BRA"))


def cycles(found: Counter[str]) -> dict[str, float]:
    """Cycles of a multiprocessor for a warp, by what they are spent on."""

    def count(kinds: set[str]) -> int:
        return sum(n for name, n in found.items() if name.split(".")[0] in kinds)

    def lines(name: str) -> int:
        width = re.search(r"\.(128|64)\b", name)
        return WARP * (int(width[1]) // 8 if width else 4) // CACHE_LINE

    memory = ("LDG", "STG", "LDS", "LDSM", "STS")
    return {
        "issue": found.total() / 4,
        "ALU": count(ALU) * WARP / 64,
        "L1 and shared memory": sum(n * lines(name) for name, n in found.items() if name.split(".")[0] in memory),
    }


def predict(name: str) -> list[dict]:
    """A row of each of the kernel's shapes."""
    gpu = GPUS[name]
    target(gpu.arch)
    rows = []
    for case in dequantizations(MISTRAL_7B):
        (kernel,) = traced(case, case.providers["ours"], torch.bfloat16)
        found = instructions(kernel)
        weights_of_warp = BLOCKS * BLOCK / kernel.metadata.num_warps
        weights = math.prod(map(int, re.findall(r"(\d+) x (\d+)", case.shape)[0]))
        part, most = max(cycles(found).items(), key=lambda item: item[1])
        busiest = weights / weights_of_warp * most / (gpu.multiprocessors * gpu.clock)
        moving = case.bytes / (OF_COPY * gpu.copy)
        seconds = LAUNCH + max(moving, busiest)
        rows.append(
            {
                "GPU": name,
                "weight": case.shape,
                "bytes a weight": round(case.bytes / weights, 3),
                "instructions a weight": round(found.total() * WARP / weights_of_warp, 1),
                "busiest": part,
                "of the time of the bytes": f"{busiest / moving:.0%}",
                "us": round(1e6 * seconds, 1),
                "of copy": f"{case.bytes / gpu.copy / seconds:.1%}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dequantize", description="What bounds the read-back of NF4 weights, without a GPU."
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), metavar="NAME", help="default: all")
    rows = [row for name in parser.parse_args().gpu for row in predict(name)]
    print(grid(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
