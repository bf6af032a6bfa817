"""Compiles every Triton kernel at every shape without a GPU: python -m benchmarks.compiled [--arch 80 90]

The operators' own launchers run on meta tensors, so each kernel is specialised as on a GPU; it is compiled but not
launched. A kernel is rejected if it spills registers, needs more shared memory than a block has, has no 128-bit load,
or on Hopper multiplies without wgmma although the product has the 64 rows that wgmma takes. Registers and stack are
those that cuobjdump reports for the machine code.
"""

import os

# as on the GPU; Triton 3.10 changes the default
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.cases import (
    MISTRAL_7B,
    NEMO,
    SMOLLM2,
    Case,
    Shape,
    attentions,
    cases,
    decoding,
    dropout_projections,
    norm_projections,
    norms,
    projections,
    ropes,
    ropes_into_cache,
    swiglus,
    tree_attentions,
)
from benchmarks.table import grid
from minorca.plan.fake_device import target
from minorca_kernels import STRATEGIES

# bytes of shared memory that a block may use, by architecture
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# of LoRA
RANKS = (8, 16, 32, 64, 128, 256)
LARGE_HEADS = replace(MISTRAL_7B, head_dim=256)
# PTX loads of 16 bytes or more
WIDE_LOAD = r"ld\.global\S*\.(v[48]\.[bfu]32|v[24]\.[bfu]64)|cp\.async\.cg\.shared\.global|cp\.async\.bulk"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class RunAsCUDA(TorchDispatchMode):
    """Makes our operators run their CUDA implementations on meta tensors, also where one calls another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minorca":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded(warmup: bool) -> Iterator[list]:
    """Yields a list to which each kernel launched in the block is appended; `warmup` compiles them only."""
    run = JITFunction.run
    kernels = []

    def record(self, *arguments, **options):
        kernels.append(run(self, *arguments, **options | ({"warmup": True} if warmup else {})))
        return kernels[-1]

    JITFunction.run = record
    try:
        yield kernels
    finally:
        JITFunction.run = run


def traced(case: Case, function: Callable, dtype: torch.dtype) -> list:
    """The kernels of a case, including those of its backward."""
    inputs = case.inputs(torch.device("meta"), dtype)
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    # some operations choose an implementation before they reach an operator
    with RunAsCUDA(), mock.patch.object(torch.Tensor, "is_cuda", True), recorded(warmup=True) as kernels:
        outs = tree_leaves(function(*inputs))
        if case.direction != "forward":
            torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])
    return kernels


def selection(ranks: list[int]) -> Iterator[tuple[str, Case, Callable, torch.dtype]]:
    """What is compiled: (label, case, one of our implementations, dtype). Rank 16 is always among it."""
    for case in cases(MISTRAL_7B):
        for strategy in STRATEGIES:
            if strategy in case.providers:
                yield f"{case.name}, Mistral 7B", case, case.providers[strategy], torch.bfloat16
    for name, shape in {"Mistral 7B": MISTRAL_7B, "Nemo": NEMO, "SmolLM2": SMOLLM2}.items():
        for case in _steps(shape, ranks):
            yield f"{case.name}, {name}", case, case.providers["ours"], torch.bfloat16
    for dtype in (torch.float16, torch.float32):
        for case in (*cases(SMOLLM2, small=(8,)), *_of_ranks(SMOLLM2, ranks)):
            yield f"{case.name}, SmolLM2", case, case.providers["ours"], dtype
    for case in itertools.chain(
        ropes(LARGE_HEADS, 8192),
        attentions(LARGE_HEADS, [8192], None),
        tree_attentions(LARGE_HEADS, 8192),
        decoding(LARGE_HEADS, 8, 4096),
        ropes_into_cache(LARGE_HEADS, 8),
    ):
        yield f"{case.name}, heads of 256", case, case.providers["ours"], torch.bfloat16
    # not among the cases: a prime number of tokens, trained weights, and a loss without gradients
    for case in cases(MISTRAL_7B, 8191, small=()):
        yield f"{case.name}, Mistral 7B", case, case.providers["ours"], torch.bfloat16
        if "Norm backward" in case.name or case.kernel == "cross-entropy":
            trained = replace(case, inputs=_all_trained(case))
            yield f"{case.name}, trained, Mistral 7B", trained, case.providers["ours"], torch.bfloat16
        if case.kernel == "cross-entropy":
            forward = replace(case, direction="forward")
            yield f"{forward.name}, Mistral 7B", forward, torch.no_grad()(case.providers["ours"]), torch.bfloat16


def _steps(shape: Shape, ranks: list[int]) -> Iterator[Case]:
    """What a step of training launches, at these ranks, and one of decoding for 1 and 8 sequences."""
    yield from cases(shape, small=())
    yield from _of_ranks(shape, ranks)
    for tokens in (8, 1):
        step = itertools.chain(
            norms(shape, tokens),
            ropes(shape, tokens),
            swiglus(shape, tokens),
            projections(shape, tokens, 16),
            norm_projections(shape, tokens, 16),
        )
        yield from (case for case in step if case.direction == "forward")


def _of_ranks(shape: Shape, ranks: list[int]) -> Iterator[Case]:
    """The projections of a step of training, forward and backward."""
    for rank, kind in itertools.product(ranks, (projections, norm_projections, dropout_projections)):
        for case in kind(shape, 8192, rank):
            if case.direction == "forward":
                yield from (case, replace(case, direction="backward"))


def _all_trained(case: Case) -> Callable:
    """The case's inputs, all of which require gradients."""

    def trained(leaf):
        return leaf.requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return lambda device, dtype: tree_map(trained, case.inputs(device, dtype))


def examine(kernel, arch: int) -> dict:
    """The resources that the machine code needs, and the reasons to reject it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    ptx = kernel.asm["ptx"]
    wide_loads = len(re.findall(WIDE_LOAD, ptx))
    wgmma = ptx.count("wgmma.mma_async")
    product_rows = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>", kernel.asm["ttir"])
    checks = {
        f"spills: {stack} bytes of stack": stack > 0,
        f"{kernel.metadata.shared} bytes of shared memory": kernel.metadata.shared > SHARED[arch],
        "no loads of 128 bits": not wide_loads,
        "no wgmma": arch == 90 and any(int(rows) >= 64 for rows in product_rows) and not wgmma,
    }
    return {
        "kernel": kernel.metadata.name,
        "arch": f"sm_{arch}",
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "wide loads": wide_loads,
        "wgmma": wgmma,
        "rejected": ", ".join(reason for reason, failed in checks.items() if failed),
    }


def compiled(arch: int, ranks: list[int]) -> list[dict]:
    target(arch)
    rows = {}
    for label, case, call, dtype in selection(ranks):
        for kernel in traced(case, call, dtype):
            if kernel.hash not in rows:
                rows[kernel.hash] = {"case": f"{label}, {str(dtype).removeprefix('torch.')}", **examine(kernel, arch)}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description="Every Triton kernel, compiled without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED), choices=SHARED, help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of LoRA; default: 8 to 256")
    args = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("interpreted kernels are not compiled; unset TRITON_INTERPRET")
    with multiprocessing.Pool(min(2, len(args.arch))) as pool:
        rows = sum(pool.map(functools.partial(compiled, ranks=args.ranks), args.arch, chunksize=1), [])
    print(grid(list(rows[0]), [list(row.values()) for row in rows]))
    if rejected := [row for row in rows if row["rejected"]]:
        reasons = (f"{row['kernel']} of {row['case']} on {row['arch']}: {row['rejected']}" for row in rejected)
        sys.exit("\n".join(f"benchmarks.compiled: error: {reason}" for reason in reasons))


if __name__ == "__main__":
    main()
