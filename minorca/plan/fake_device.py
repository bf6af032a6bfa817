"""A GPU that computes nothing: fake tensors of device cuda, on which minorca's own code runs without a GPU.

Shapes, dtypes, strides, launches and memory are those of a GPU; there are no values, and where an operation needs one
on the host, it gets a one. For a process of its own, which sees no GPU and has run no backward: from then on torch
answers that CUDA exists. The CPU can be faked too, in any process without a process group.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import _utils as placement
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from minorca.errors import UserError
from minorca.files.safe_io import cache_directory
from minorca.model import attention as backends
from minorca.plan.devices import Machine, machine
from minorca.plan.recorder import Recorder
from minorca.train import parallel
from minorca.train.ranks import World

# which rows of a sharded parameter a rank stores
PLACE = "compute_local_shape_and_global_offset"
SOURCE = Path(__file__).with_name("fake_cuda.cpp")
H100 = machine("H100", 1)


def unavailable() -> str | None:
    """Why there can be no fake GPU in this process; None where there can."""
    if torch.cuda.is_available():
        return "this process sees a GPU; set CUDA_VISIBLE_DEVICES= (empty)"
    try:
        if shutil.which("g++") or _library().exists():
            return None
    except UserError as error:
        return str(error)
    return "a plan for a GPU needs a C++ compiler; install g++ (Debian's package g++)"


def _library() -> Path:
    """Where fake_cuda.cpp is compiled to, once for each version of it and of torch."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    return cache_directory(f"fake-cuda-{key}.so")


def load_library() -> None:
    """Compiles fake_cuda.cpp where it is not yet, and loads it. Raises UserError: it does not compile."""
    library = _library()
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        built = f"{library}.{os.getpid()}"
        torch_path = Path(torch.__file__).parent
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_path}/include", f"-L{torch_path}/lib"]
        command = ["g++", *options, SOURCE, "-o", built, "-lc10", "-ltorch_cpu"]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise UserError(f"does not compile with g++; it needs C++20: {compiled.stderr[-300:]}", path=SOURCE)
        os.replace(built, library)
    ctypes.CDLL(str(library))


def target(arch: int) -> None:
    """Makes Triton compile for this architecture."""
    fake_driver: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        # kernels are cached by device, so each architecture is a device of its own
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(fake_driver)


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


def _cuda(gpu: Machine, recorder: Recorder) -> dict[str, Any]:
    """What takes the place of functions of torch.cuda."""
    names = gpu.torch_names or (gpu.name,)
    properties = SimpleNamespace(name=names[0], total_memory=gpu.memory, multi_processor_count=gpu.processors)

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
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: divmod(gpu.arch, 10),
        "get_device_name": lambda device=None: names[0],
        "mem_get_info": lambda device=None: (gpu.memory, gpu.memory),
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


def _on_values(function: Callable) -> Callable:
    """A function of torch that computes on small tensors of its own, with their values."""

    def call(*arguments, **options):
        with _disable_current_modes():
            return function(*arguments, **options)

    return call


class _FakeWorld(World):
    """Rank 0 among others that are as it is."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return [self.size * value for value in values]


@contextlib.contextmanager
def fake_device(device: Machine, ranks: int = 1, attention: str = "own") -> Iterator[tuple[World, Recorder]]:
    """Within it, tensors are fake: this is rank 0 of a run on `ranks` such devices, and the recorder sees what it does.

    attention: the back end that is used on a GPU, "own" or "varlen".
    """
    kind = "cuda" if device.arch else "cpu"
    recorder = Recorder(kind)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    swap_tensors = torch.utils.swap_tensors

    def swap(one: torch.Tensor, other: torch.Tensor) -> None:
        # modules on the meta device move by it, and it refuses tensors that the mode remembers
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap_tensors(one, other)

    patches: list[contextlib.AbstractContextManager] = [
        mock.patch.object(torch.utils, "swap_tensors", swap),
        # both need the numbers of the ranks
        mock.patch.object(parallel, "init_device_mesh", _on_values(init_device_mesh)),
        mock.patch.object(placement, PLACE, _on_values(getattr(placement, PLACE))),
        mock.patch.object(parallel, "memory_per_rank", lambda _: device.memory),
        # it would compute with single numbers that it knows, on a GPU too
        mock.patch.object(mode, "may_turn_const", lambda t: False),
        # an optimizer that is compiled, which torch refuses within modes
        torch.compiler.set_stance("force_eager"),
    ]
    if device.arch:
        load_library()
        target(device.arch)
        patches += [
            mock.patch.multiple(torch.cuda, **_cuda(device, recorder)),
            mock.patch.object(torch._C, "_can_use_cudnn_attention", lambda *arguments: False),
            mock.patch.object(backends, "fastest", lambda case: attention),
            mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
        ]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(mode)
            # torch.tensor copies to the GPU where the modes see it
            only_lift_cpu_tensors = torch._C._only_lift_cpu_tensors()
            stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift_cpu_tensors)
            torch._C._set_only_lift_cpu_tensors(True)
            stack.enter_context(recorder.recording())
            yield _FakeWorld(0, ranks, torch.device(kind, 0) if device.arch else torch.device(kind)), recorder
    finally:
        dist.destroy_process_group()
