"""Checks of torch, of the devices and of what runs on them. What imports torch, imports it late."""

import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minorca.doctor.findings import EndOfChecks, Fact, Finding, reason_of
from minorca.errors import UserError
from minorca.host import host_processors
from minorca.waiting import waiting_policy

if TYPE_CHECKING:
    import torch

# what a run and generation import, from the lowest; and the server
NEEDED = ("torch", "triton", "minorca_kernels", "minorca.train.run", "minorca.generate.engine")
MODULES = (*NEEDED, "minorca.serve.app")
DRIVER = Path("/proc/driver/nvidia/version")
# NCCL's, for ranks on one machine
SHARED_MEMORY_BYTES = 1e9
# for which back ends of attention are measured: Mistral 7B's
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def imports() -> Iterator[Fact | Finding]:
    """Whether all modules can be imported; the first that cannot is named."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        # a package that is broken raises what it likes
        except Exception as error:
            package = name.partition(".")[0]
            remedy = "install the package that it names anew" if "minorca" in package else _reinstall(package)
            yield Finding(f"{name} cannot be imported: {reason_of(error)}", remedy, prevents=name in NEEDED)
            if name in NEEDED:
                raise EndOfChecks from None


def _reinstall(*packages: str) -> str:
    """In the versions that are there: of others, pip would choose the newest."""
    wanted = []
    for package in packages:
        try:
            version = importlib.metadata.version(package).partition("+")[0]
            wanted.append(f"{package}=={version}")
        except importlib.metadata.PackageNotFoundError:
            wanted.append(package)
    return f"pip install --force-reinstall {' '.join(wanted)}"


def devices() -> Iterator[Fact | Finding]:
    """The GPUs, or why there is none."""
    import torch

    from minorca.device import has_gpu

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield Fact("devices", "torch", f"{torch.__version__}, built with {built}")
    driver = _driver()
    if driver:
        yield Fact("devices", "driver", driver)
    if torch.version.cuda:
        yield Fact("devices", "driver's CUDA", _cuda_of_driver())
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        yield Fact("devices", "CUDA_VISIBLE_DEVICES", repr(os.environ["CUDA_VISIBLE_DEVICES"]))
    try:
        found = has_gpu()
    except UserError as error:
        yield Finding(str(error), "update NVIDIA's driver, or install a build of torch for its CUDA", prevents=True)
        return
    if not found:
        yield Fact("devices", "cpu", f"{torch.get_num_threads()} threads; how they wait: {waiting_policy()}")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if driver and not torch.version.cuda:
            message = "there is an NVIDIA driver, and this build of torch is for the CPU alone"
            yield Finding(message, "install a build with CUDA: https://pytorch.org/get-started")
        elif driver and not hidden:
            yield Finding("there is an NVIDIA driver, and torch sees no GPU", "see what nvidia-smi says")
        processors = host_processors()
        if torch.get_num_threads() > processors:
            message = f"torch has {torch.get_num_threads()} threads, and {processors} processors are usable"
            yield Finding(message, f"export OMP_NUM_THREADS={processors}")
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)


def _gpu(index: int) -> Iterator[Fact | Finding]:
    import torch

    from minorca.device import default_device

    properties = torch.cuda.get_device_properties(index)
    name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    free, total = torch.cuda.mem_get_info(index)
    yield Fact("devices", f"cuda:{index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    try:
        default_device(index)
    except UserError as error:
        # a command takes the first
        yield Finding(f"cuda:{index}: {error}", prevents=index == 0)
    if free < total / 2:
        message = f"of cuda:{index}'s memory, {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are in use"
        yield Finding(message, "nvidia-smi shows by whom; end them, or choose another GPU by CUDA_VISIBLE_DEVICES")


def _driver() -> str | None:
    """NVIDIA's driver, of which torch says nothing."""
    try:
        return DRIVER.read_text().splitlines()[0].partition("version:")[2].strip()
    except (OSError, IndexError):
        return "nvidia-smi is there, no version is" if shutil.which("nvidia-smi") else None


def _cuda_of_driver() -> str:
    import torch

    # what torch itself compares with; 12040 is 12.4, 0 is no driver
    version = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


def back_ends() -> Iterator[Fact | Finding]:
    """What will compute here, as the code that chooses says, tried on a small model."""
    import torch

    from minorca.device import default_device
    from minorca.doctor.smoke import smoke_tests
    from minorca.model.build import fast_dtype
    from minorca_kernels import NF4Weight, PrepackedNF4Weight, PrepackedWeight
    from minorca_kernels.operator import uses_triton

    try:
        device, dtype = default_device(), fast_dtype()
    # as said of the device
    except UserError:
        return
    kernels = "Triton" if uses_triton(torch.empty(0, device=device)) else "plain PyTorch"
    yield Fact("back ends", "kernels", kernels)
    yield Fact("back ends", "attention", _attention(device) if device.type == "cuda" else f"our own, in {kernels}")
    yield Fact("back ends", "fastest dtype", str(dtype).removeprefix("torch."))
    prepacked = PrepackedWeight.is_faster(torch.empty(0, dtype=dtype, device=device), PrepackedWeight.ROWS)
    yield Fact("back ends", "prepacked weights", "for inference" if prepacked else "no")
    stays = device.type == "cuda" or PrepackedNF4Weight.supports(NF4Weight((32,), 64, dtype), dtype)
    yield Fact("back ends", "weights in NF4", "stay in 4 bits" if stays else "become dense for inference")
    remedy = f"{_reinstall('torch', 'triton')}, and report it if that does not help"
    try:
        for name, problem in smoke_tests(device, dtype):
            yield Fact("back ends", f"{name} of a small model", problem or "as defined")
            if problem:
                message = f"{name} of a small model on {device} is wrong: {problem}"
                yield Finding(message, remedy, prevents=True)
    # of CUDA, a compiler or torch: what they like
    except Exception as error:
        message = f"a small model cannot be run on {device}: {reason_of(error)}"
        yield Finding(message, remedy, prevents=True)


def _attention(device: "torch.device") -> str:
    """The back ends that are fastest here, and those that they were measured against."""
    import torch

    from minorca.model import attention

    varlen = attention.varlen_attn() is not None
    flash = attention.flash_implementation(device) if varlen else None
    capability = torch.cuda.get_device_capability(device)
    chosen = []
    for plain, kind in ((False, "packed"), (True, "of one document")):
        case = attention.Case(device, torch.bfloat16, HEADS, KV_HEADS, HEAD_DIM, plain, True, False, flash)
        names = attention.candidates(case, capability, varlen)
        chosen.append(f"{kind} {attention.fastest(case)}, of {', '.join(names)}")
    return "; ".join(chosen)


def ranks() -> Iterator[Fact | Finding]:
    """What several processes of a run communicate by."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_nccl = dist.is_available() and dist.is_nccl_available()
    has_gloo = dist.is_available() and dist.is_gloo_available()
    by_nccl = f"nccl {'.'.join(map(str, nccl.version()))}" if has_nccl else "no nccl"
    yield Fact("back ends", "several ranks", f"{by_nccl}, {'gloo' if has_gloo else 'no gloo'}")
    if not has_gloo:
        yield Finding("this build of torch has no gloo, without which nothing is trained", _reinstall("torch"), True)
    if count > 1 and not has_nccl:
        yield Finding(f"there are {count} GPUs, and this build of torch has no nccl", _reinstall("torch"))
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    if count > 1 and size < SHARED_MEMORY_BYTES:
        message = f"{shared} has {size / 1e9:.2f} GB, and NCCL needs about 1 GB of it for {count} GPUs"
        yield Finding(message, "docker run --shm-size 1g, or --ipc host")
