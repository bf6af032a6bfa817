"""How an operation becomes an operator of torch: one schema, an implementation a device, and the shapes of what it returns.

Registered, an operation is opaque to `torch.compile`, can be named by selective activation checkpointing, and is checked by
`torch.library.opcheck`. All are functional: no operator changes an element of its arguments. An `autograd.Function` calls them.
"""

from collections.abc import Callable

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the Triton kernels run on CPU tensors, for tests


def operator(schema: str, cuda: Callable, cpu: Callable, fake: Callable) -> Callable:
    """Registers `minorca::SCHEMA` and returns it, ready to be called.

    Args:
        schema: as torch.library.define takes it, the operator's name in front.
        cuda: launches the Triton kernels. Where Triton is interpreted, CPU tensors take this one too.
        cpu: the same in plain PyTorch.
        fake: from the arguments' shapes to empty results of the right shapes, strides and dtypes.
    """
    name = schema[: schema.index("(")]

    @torch.no_grad()  # autograd sees the operator, not what it is made of
    def on_cuda(first, *arguments):
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its arguments' is
            return cuda(first, *arguments)

    @torch.no_grad()
    def on_cpu(*arguments):
        return (cuda if INTERPRETED else cpu)(*arguments)

    torch.library.define(f"minorca::{name}", schema[len(name) :])
    torch.library.impl(f"minorca::{name}", "CUDA")(on_cuda)
    torch.library.impl(f"minorca::{name}", "CPU")(on_cpu)
    torch.library.register_fake(f"minorca::{name}")(fake)
    return getattr(torch.ops.minorca, name).default


def uses_triton(x: torch.Tensor) -> bool:
    """Whether operators on x launch the Triton kernels."""
    return x.is_cuda or INTERPRETED


def can_skip_dispatch(x: torch.Tensor) -> bool:
    """Whether nobody differentiates or traces what is done with x on the CPU: then the operator's way there, some 20 microseconds
    of each of hundreds of calls a token, is saved."""
    return not (x.is_cuda or INTERPRETED or torch.is_grad_enabled() or torch.compiler.is_compiling())


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., N] as [M, N] with adjacent columns; the distance between rows may be anything."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; elsewhere a small number, so that a test's program loops too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def architecture() -> int:
    """What Triton compiles for, 90 for sm_90: the current GPU's."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch
