"""Every Triton kernel at every shape, compiled for GPUs that are not here: python -m benchmarks.compiled [--arch 80 90 100]

The operators' own launchers run on tensors without storage, so each kernel is specialised as on a GPU, and is compiled but not
launched. Refused are kernels that spill, need more shared memory than a block has, have no load of 128 bits, or on Hopper multiply
without wgmma, where the product has the 64 rows that it takes. Registers and stack are what cuobjdump says of the machine code.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as on the GPU; Triton 3.10 will default to none

import argparse
import contextlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.cases import MISTRAL_7B, NEMO, SMOLLM2, Case, cases
from benchmarks.table import grid
from minorca_kernels import STRATEGIES

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have
WIDE = (
    r"ld\.global\S*\.(v[48]\.[bfu]32|v[24]\.[bfu]64)|cp\.async\.cg\.shared\.global|cp\.async\.bulk"  # 16 bytes or more
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launchers(TorchDispatchMode):
    """Here our operators do on tensors without storage what they do on CUDA's."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "minorca":
            return operator.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments, **(options or {})
            )
        return operator(*arguments, **(options or {}))


@contextlib.contextmanager
def recorded(warmup: bool) -> Iterator[list]:
    """A list that every kernel called meanwhile is added to, compiled; where `warmup`, none is launched."""
    run, kernels = JITFunction.run, []

    def record(self, *arguments, **options):
        kernels.append(run(self, *arguments, **options | ({"warmup": True} if warmup else {})))
        return kernels[-1]

    JITFunction.run = record
    try:
        yield kernels
    finally:
        JITFunction.run = run


def target(arch: int) -> None:
    """Makes Triton compile for this architecture."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # a device an architecture: each has its own cache of kernels
            get_current_stream=lambda device: 0,
        )
    )


def traced(case: Case, function: Callable, dtype: torch.dtype) -> list:
    """The kernels of a case, its backward included where it has one."""
    inputs = case.inputs(torch.device("meta"), dtype)
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    with Launchers(), recorded(warmup=True) as kernels:
        outs = tree_leaves(function(*inputs))
        if case.direction != "forward":
            torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])
    return kernels


def selection() -> Iterator[tuple[str, Case, Callable, torch.dtype]]:
    """What is compiled: label, case, one of our implementations, dtype. The last shape also in fp16 and fp32."""
    for case in cases(MISTRAL_7B):
        yield from (
            (f"{case.name}, Mistral 7B", case, case.providers[way], torch.bfloat16)
            for way in STRATEGIES
            if way in case.providers
        )
    for name, shape in {"Mistral 7B": MISTRAL_7B, "Nemo": NEMO, "SmolLM2": SMOLLM2}.items():
        for case in cases(shape, small=(8,)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if shape is SMOLLM2 else 1]:
                yield f"{case.name}, {name}", case, case.providers["ours"], dtype
    # what the cases leave out: a number of tokens that nothing divides, weights that are trained, and a loss without gradients
    for case in cases(MISTRAL_7B, 8191, small=()):
        yield f"{case.name}, Mistral 7B", case, case.providers["ours"], torch.bfloat16
        if "Norm backward" in case.name or case.kernel == "cross-entropy":
            yield (
                f"{case.name}, trained, Mistral 7B",
                replace(case, inputs=_trained(case)),
                case.providers["ours"],
                torch.bfloat16,
            )
        if case.kernel == "cross-entropy":
            forward = replace(case, direction="forward")
            yield f"{forward.name}, Mistral 7B", forward, torch.no_grad()(case.providers["ours"]), torch.bfloat16


def _trained(case: Case) -> Callable:
    def inputs(device, dtype):
        tensors = case.inputs(device, dtype)
        return tree_map(
            lambda leaf: leaf.requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
            tensors,
        )

    return inputs


def examine(kernel, arch: int) -> dict:
    """What the machine code needs, and which gates refuse it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    ptx, products = kernel.asm["ptx"], re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>", kernel.asm["ttir"])
    wide, wgmma = len(re.findall(WIDE, ptx)), ptx.count("wgmma.mma_async")
    gates = {
        f"spills: {stack} bytes of stack": stack > 0,
        f"{kernel.metadata.shared} bytes of shared memory": kernel.metadata.shared > SHARED[arch],
        "no loads of 128 bits": not wide,
        "no wgmma": arch == 90 and any(int(rows) >= 64 for rows in products) and not wgmma,
    }
    return {
        "kernel": kernel.metadata.name,
        "arch": f"sm_{arch}",
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "wide loads": wide,
        "wgmma": wgmma,
        "refused": ", ".join(reason for reason, refused in gates.items() if refused),
    }


def compiled(arch: int) -> list[dict]:
    target(arch)
    rows = {}
    for label, case, call, dtype in selection():
        for kernel in traced(case, call, dtype):
            if kernel.hash not in rows:
                rows[kernel.hash] = {"of": f"{label}, {str(dtype).removeprefix('torch.')}", **examine(kernel, arch)}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description="Every Triton kernel, compiled without a GPU."
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED), choices=SHARED, help="default: all")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("an interpreted kernel is not compiled: unset TRITON_INTERPRET")
    with multiprocessing.Pool(min(2, len(args.arch))) as pool:
        rows = sum(pool.map(compiled, args.arch, chunksize=1), [])
    print(grid(list(rows[0]), [list(row.values()) for row in rows]))
    if refused := [row for row in rows if row["refused"]]:
        reasons = (f"{row['kernel']} of {row['of']} on {row['arch']}: {row['refused']}" for row in refused)
        sys.exit("\n".join(f"benchmarks.compiled: error: {reason}" for reason in reasons))


if __name__ == "__main__":
    main()
