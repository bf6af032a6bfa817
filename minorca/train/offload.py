"""Inputs of blocks in pinned host memory from forward to backward, copied beside the computation.

While a block computes, its input is copied to the host; while a block goes backward, the input of the one before it is
copied back. The copies have a stream of their own, and two inputs at most are on the GPU. The host waits for none of
them: a stream waits for the other where it reads what that one writes, or overwrites what that one reads.
"""

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Stored:
    """A tensor on the GPU, on the host, or on the way.

    Attributes:
        gpu: the tensor, until its copy to the host has ended, and again since the copy back began.
        buffer: holds it in host memory, until the copy back began.
        copied: the end of its last copy.
        previous: what was stored before it and is loaded after it; None where there is nothing, or it is gone.
    """

    def __init__(self, gpu: Tensor, buffer: Tensor, previous: Callable[[], "_Stored | None"]):
        self.gpu: Tensor | None = gpu
        self.buffer: Tensor | None = buffer
        self.shape = gpu.shape
        self.device = gpu.device
        self.copied: torch.Event
        self.previous = previous


class HostMemory:
    """A stack of tensors in host memory. Its buffers, one for each tensor at a time, serve all micro-batches."""

    def __init__(self):
        self._free: list[Tensor] = []
        self._newest: Callable[[], _Stored | None] = lambda: None

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @torch.no_grad()
    def store(self, tensor: Tensor) -> _Stored:
        """Begins to copy a tensor, which nothing may change. What was stored before it leaves the GPU."""
        previous = self._newest()
        if previous is not None and previous.gpu is not None:
            torch.cuda.current_stream().wait_event(previous.copied)
            previous.gpu = None
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = _pinned(tensor)
        stored = _Stored(tensor, buffer, self._newest)
        stored.copied = self._copy(tensor, buffer[: tensor.numel()].view(tensor.shape))
        self._newest = weakref.ref(stored)
        return stored

    @torch.no_grad()
    def load(self, stored: _Stored) -> Tensor:
        """The tensor, and begins to copy back the one that was stored before it."""
        tensor = self._fetch(stored) if stored.gpu is None else stored.gpu
        stored.gpu = None
        torch.cuda.current_stream().wait_event(stored.copied)
        # the newest one never left the GPU
        if stored.buffer is not None:
            self._free.append(stored.buffer)
            stored.buffer = None
        previous = stored.previous()
        if previous is not None and previous.buffer is not None and previous.gpu is None:
            self._fetch(previous)
        return tensor

    def _fetch(self, stored: _Stored) -> Tensor:
        buffer, stored.buffer = stored.buffer, None
        if buffer is None:
            raise RuntimeError("backward ran twice through a block whose input was kept in host memory")
        stored.gpu = torch.empty(stored.shape, dtype=buffer.dtype, device=stored.device)
        stored.copied = self._copy(buffer[: stored.gpu.numel()].view(stored.shape), stored.gpu)
        # the next copy into it is in the same stream, after this one
        self._free.append(buffer)
        return stored.gpu

    def _copy(self, source: Tensor, target: Tensor) -> torch.Event:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)


def _is_in_host_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def input_on_host(forward: Callable, memory: HostMemory, x_TH: Tensor, *arguments):
    """Calls a block's forward, which saves its arguments alone; of these, x [T, H] is saved in host memory."""
    if _is_in_host_memory(x_TH):
        return forward(x_TH, *arguments)
    # autograd keeps both functions, and so what they refer to
    shape = x_TH.shape

    def pack(saved: Tensor) -> Tensor | _Stored:
        return memory.store(saved) if saved.shape == shape else saved

    def unpack(saved: Tensor | _Stored) -> Tensor:
        return memory.load(saved) if isinstance(saved, _Stored) else saved

    with saved_tensors_hooks(pack, unpack):
        return forward(x_TH, *arguments)
