"""Machines whose GPU cannot be used end with one line that says why; what a container leaves of a machine."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from minorca.device import default_device
from minorca.errors import UserError
from minorca.host import host_memory_bytes, host_processors
from tests.helpers import ROOT


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an Ampere GPU and a working driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    return monkeypatch


def compile_with(monkeypatch, compile):
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_target=compile)))


def failing(error: Exception):
    def compile():
        raise error

    return compile


def test_a_gpu_that_works_is_the_default(gpu):
    compile_with(gpu, lambda: None)
    assert default_device(1) == torch.device("cuda", 1)


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_a_gpu_that_is_too_old(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"A GPU has compute capability 7.5; expected 8.0 .* CUDA_VISIBLE_DEVICES="):
        default_device()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        AssertionError('libcuda.so cannot found!\nPlease make sure GPU is set up and then run "/sbin/ldconfig"'),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        FileNotFoundError(2, "No such file or directory", "/opt/cc"),
    ],
    ids=["no compiler", "no libcuda", "no headers", "no program"],
)
def test_triton_cannot_compile(gpu, error):
    compile_with(gpu, failing(error))
    with pytest.raises(UserError) as raised:
        default_device()
    first_line = str(error).partition("\n")[0]
    assert str(raised.value).startswith(f"Triton cannot compile GPU kernels: {first_line}; ")
    assert "\n" not in str(raised.value)


def test_what_is_missing_is_named(gpu):
    compile_with(gpu, failing(RuntimeError("no compiler")))
    gpu.setattr("minorca.device.shutil.which", lambda name: None)
    gpu.setattr("minorca.device.sysconfig.get_path", lambda name: "/nonexistent")
    with pytest.raises(UserError, match=r"install a C compiler \(.*gcc\) and Python's headers \(.*python3-dev\)"):
        default_device()


def test_a_driver_that_is_too_old_does_not_fall_back_to_the_cpu(monkeypatch):
    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your"
            " GPU driver (Triggered internally at ../c10/cuda/CUDAFunctions.cpp:108.)",
            stacklevel=2,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(UserError, match=r"driver on your system is too old .*GPU driver; set CUDA_VISIBLE_DEVICES="):
        default_device()


@pytest.mark.parametrize(
    "command",
    ["minorca.train --model.path {} --data.train examples/data/train.jsonl", "minorca.generate --model {} --prompt hi"],
)
def test_commands_end_with_the_line(command, smollm2):
    """And with exit status 2, before they read weights."""
    module, *arguments = command.format(smollm2).split()
    script = f"""
import runpy, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (7, 0)
torch.cuda.get_device_name = lambda *_: "An old GPU"
sys.argv = {[module, *arguments]}
runpy.run_module({module!r}, run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.splitlines()[-1].startswith("minorca: error: An old GPU has compute")


MAX_V1 = 2**63 - 4096


def write_container(directory: Path, membership: str, files: dict[str, str]) -> None:
    """/proc/self/cgroup as `cgroup`, and the files below /sys/fs/cgroup as `tree`."""
    (directory / "cgroup").write_text(membership)
    for name, content in files.items():
        path = directory / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.mark.parametrize(
    "membership, files, limit",
    [
        ("0::/", {"memory.max": "3000"}, 3000),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/", {}, None),
        ("0::/job/step", {"job/memory.max": "2000", "job/step/memory.max": "max"}, 2000),
        ("0::/job/step", {"job/memory.max": "5000", "job/step/memory.max": "2000"}, 2000),
        # the path is the host's, the tree the container's
        ("0::/kubepods/pod/abc", {"memory.max": "3000"}, 3000),
        ("0::/../other", {"memory.max": "3000"}, 3000),
        ("4:memory:/docker/abc\n0::/", {"memory/memory.limit_in_bytes": "3000"}, 3000),
        ("4:cpu,memory:/a\n3:cpu:/b", {"memory/a/memory.limit_in_bytes": "4000", "memory.max": "1"}, 4000),
        ("4:memory:/\n0::/", {"memory/memory.limit_in_bytes": str(MAX_V1)}, None),
        ("3:cpu:/b", {"memory/memory.limit_in_bytes": "4000"}, None),
        ("", {"memory.max": "1"}, None),
    ],
)
def test_the_memory_of_a_container(membership, files, limit, tmp_path):
    write_container(tmp_path, membership, files)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory_bytes(tmp_path / "tree", tmp_path / "cgroup") == (limit or whole)
    # another system
    assert host_memory_bytes(tmp_path / "tree", tmp_path / "none") == whole


@pytest.mark.parametrize(
    "membership, files, processors",
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/job/step", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "40000000 100000"}, None),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "90000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
    ],
)
def test_the_processors_of_a_container(membership, files, processors, tmp_path):
    write_container(tmp_path, membership, files)
    mine = len(os.sched_getaffinity(0))
    assert host_processors(tmp_path / "tree", tmp_path / "cgroup") == (processors or mine)
