"""Registers an operation as a PyTorch operator: a schema, an implementation for each device, and its results' shapes.

A registered operation is opaque to `torch.compile`, can be named by selective activation checkpointing, and is checked
by `torch.library.opcheck`. Operators change no argument but those that their schema says. An `autograd.Function` calls
those that have a backward.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton import knobs

# TRITON_INTERPRET=1: the Triton kernels run on CPU tensors, for tests.
INTERPRETED = knobs.runtime.interpret


def operator(schema: str, cuda: Callable, cpu: Callable, fake: Callable) -> Callable:
    """Registers `minorca::SCHEMA` and returns the operator, a callable.

    Args:
        schema: as in `torch.library.define`, beginning with the operator's name.
        cuda: launches the Triton kernels. Where Triton is interpreted, it runs for CPU tensors too.
        cpu: the same operation in plain PyTorch.
        fake: returns empty results of the right shapes, strides and dtypes.
    """
    name = schema[: schema.index("(")]

    # Autograd differentiates the autograd.Function around the operator, not its implementation.
    @torch.no_grad()
    def on_cuda(first, *arguments):
        # Triton launches on the current device, which may not be the arguments' device.
        with torch.cuda.device_of(first):
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
    """Whether an operation on x can call its CPU implementation directly: without gradients, tracing or Triton.

    Dispatching an operator takes some 20 microseconds, and generating a token takes hundreds of calls.
    """
    return not (x.is_cuda or INTERPRETED or torch.is_grad_enabled() or torch.compiler.is_compiling())


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshapes x [..., N] to [M, N] with a last stride of 1; the stride of rows may be anything."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def zero_scratch(row_end_ptr, SCRATCH: tl.constexpr):
    """Writes zeros into the scratch columns after a row."""
    zeros = tl.zeros([triton.next_power_of_2(SCRATCH)], row_end_ptr.dtype.element_ty)
    column = tl.arange(0, triton.next_power_of_2(SCRATCH))
    tl.store(row_end_ptr + column, zeros, mask=column < SCRATCH)


def multiprocessor_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 for the interpreter, so that programs loop in tests too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compute_capability() -> int:
    """What Triton compiles for, the current GPU's: 90 for sm_90. The interpreter counts as sm_90."""
    if INTERPRETED:
        return 90
    # the checker sees the driver's abstract base class, which returns None
    return triton.runtime.driver.active.get_current_target().arch  # pyright: ignore[reportAttributeAccessIssue]
