"""A GPU that computes nothing: fake tensors of device cuda, on which minorca's own code runs without a GPU.

Shapes, dtypes, strides, launches and memory are those of a GPU; there are no values, and where an operation needs one
on the host, it gets a one. For a process of its own: from then on torch answers that CUDA exists.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.compiled import target
from benchmarks.recorder import Recorder
from minorca.model import attention as backends
from minorca.train import parallel
from minorca.train.ranks import World

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICE = torch.device("cuda", 0)
# an H100 SXM
ARCH = 90
PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 10**9, multi_processor_count=132)


def unavailable() -> str | None:
    """Why there can be no fake GPU here; None where there can."""
    if torch.cuda.is_available():
        return "a GPU is here"
    return None if shutil.which("g++") else "no g++ to compile benchmarks/fake_cuda.cpp"


def load_library() -> None:
    """Compiles fake_cuda.cpp, once for each version of it and of torch, and loads it."""
    torch_path = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {torch_path}".encode()).hexdigest()[:16]
    library = Path.home() / ".cache" / "minorca" / f"fake-cuda-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        built = f"{library}.{os.getpid()}"
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_path}/include", f"-L{torch_path}/lib"]
        subprocess.run(["g++", *options, SOURCE, "-o", built, "-lc10", "-ltorch_cpu"], check=True)
        os.replace(built, library)
    ctypes.CDLL(str(library))


class _Handle:
    """A stream, an event or a graph, none of which does anything."""

    priority = 0
    device_index = 0

    def __init__(self, *arguments, **options):
        pass

    def record(self, *arguments) -> "_Handle":
        return self

    record_event = record

    def ignore(self, *arguments) -> None:
        pass

    wait = wait_event = wait_stream = synchronize = replay = ignore


def _cuda(recorder: Recorder) -> dict[str, Any]:
    """What takes the place of functions of torch.cuda."""

    def nothing(*arguments, **options):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(*arguments, **options):
        recorder.captured = True
        yield
        recorder.captured = False

    return {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: divmod(ARCH, 10),
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "synchronize": lambda device=None: recorder.wait("synchronize"),
        "is_current_stream_capturing": lambda: recorder.captured,
        "current_stream": _Handle,
        "Stream": _Handle,
        "Event": _Handle,
        "CUDAGraph": _Handle,
        "stream": nothing,
        "device": nothing,
        "device_of": nothing,
        "graph": graph,
    }


@contextlib.contextmanager
def fake_cuda(ranks: int = 1, attention: str = "own") -> Iterator[tuple[World, Recorder]]:
    """Within it, tensors are fake: this is rank 0 of a run on `ranks` H100s, and the recorder sees what it launches.

    attention: the back end that is used, "own" or "varlen".
    """
    load_library()
    target(ARCH)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    recorder = Recorder()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    swap_tensors = torch.utils.swap_tensors

    def swap(one: torch.Tensor, other: torch.Tensor) -> None:
        # modules on the meta device move by it, and it refuses tensors that the mode remembers
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap_tensors(one, other)

    def device_mesh(*arguments, **options) -> DeviceMesh:
        # it needs the numbers of the ranks
        with _disable_current_modes():
            return init_device_mesh(*arguments, **options)

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **_cuda(recorder)))
            stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", swap))
            stack.enter_context(mock.patch.object(parallel, "init_device_mesh", device_mesh))
            stack.enter_context(mock.patch.object(torch._C, "_can_use_cudnn_attention", lambda *arguments: False))
            stack.enter_context(mock.patch.object(backends, "fastest", lambda case: attention))
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
            # it would compute with single numbers that it knows, on a GPU too
            stack.enter_context(mock.patch.object(mode, "may_turn_const", lambda t: False))
            stack.enter_context(mode)
            # torch.tensor copies to the GPU where the modes see it
            torch._C._set_only_lift_cpu_tensors(True)
            stack.enter_context(recorder.recording())
            yield World(0, ranks, DEVICE), recorder
    finally:
        dist.destroy_process_group()
