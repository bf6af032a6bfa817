"""Machines whose GPU cannot be used end with one line that says why."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton

from minorca.device import default_device
from minorca.errors import UserError
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
