"""What doctor says of machines on which something is missing, broken or old; each is made by a fake of that thing."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minorca.doctor import accelerator, machine, smoke
from minorca.doctor.__main__ import CHECKS, print_json
from minorca.doctor.findings import Fact, Finding, run_apart
from minorca.errors import UserError
from tests.helpers import ENVIRONMENT


def doctor(*options, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minorca", "doctor", *options]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120)


def facts_of(check) -> dict[str, str]:
    return {item.name: item.value for item in check() if isinstance(item, Fact)}


def findings_of(check) -> list[Finding]:
    return [item for item in check() if isinstance(item, Finding)]


def test_this_machine_is_told_truly():
    ran = doctor("--json")
    assert ran.returncode == 0 and ran.stderr == ""
    report = json.loads(ran.stdout)
    assert report["can_run"]
    # optional things may be missing here; what runs the tests is not
    assert not [finding for finding in report["findings"] if finding["prevents"]]
    sections = report["sections"]
    assert sections["packages"]["torch"].startswith(importlib.metadata.version("torch"))
    assert sections["devices"]["torch"].startswith(torch.__version__)
    assert sections["back ends"]["kernels"] == ("Triton" if torch.cuda.is_available() else "plain PyTorch")
    assert sections["back ends"]["weights in NF4"] in ("stay in 4 bits", "become dense for inference")
    tried = [value for name, value in sections["back ends"].items() if "small model" in name]
    assert tried == ["as defined"] * 4


# ------------------------------------------------------------------------------------------------ packages that break


def stub(directory: Path, name: str, code: str) -> str:
    """PYTHONPATH with a package of this name before the real one."""
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(code)
    return f"{directory}:{ENVIRONMENT['PYTHONPATH']}"


@pytest.mark.parametrize(
    "name, code, expected",
    [
        (
            "torch",
            "raise ImportError('libcudart.so.12: cannot open')",
            "torch cannot be imported: ImportError: libcuda",
        ),
        ("torch", "raise OSError('libtorch_cpu.so')", "torch cannot be imported: OSError: libtorch_cpu.so"),
        ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGILL)", "imports ended the process by SIGILL"),
        ("torch", "import os; os._exit(3)", "imports ended the process with status 3"),
        ("triton", "raise ModuleNotFoundError('No module named triton')", "triton cannot be imported: ModuleNot"),
        ("numpy", "raise ImportError('numpy is broken')", "numpy is broken"),
    ],
)
def test_a_package_that_cannot_be_imported(name, code, expected, tmp_path):
    """The rest is told, and one line says what is wrong."""
    ran = doctor(PYTHONPATH=stub(tmp_path, name, code))
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("minorca: error: ") and expected in line
    assert "Traceback" not in ran.stdout and "  processor " in ran.stdout
    if "cannot be imported" in expected:
        # not the newest, which may be out of our ranges
        same = f"pip install --force-reinstall {name}=={importlib.metadata.version(name).partition('+')[0]}"
        assert same in ran.stdout + ran.stderr


@pytest.fixture
def versions(monkeypatch):
    """versions[name] = what importlib.metadata says; None: not installed."""
    fakes: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in fakes and fakes[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return fakes.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return fakes


@pytest.mark.parametrize("version, is_wrong", [("2.10.1", True), ("2.15.0", True), ("2.12.0+cu130", False)])
def test_a_version_out_of_range(version, is_wrong, versions):
    versions["torch"] = version
    found = findings_of(machine.python)
    assert [(f.message, f.remedy, f.prevents) for f in found] == [
        (f"torch is {version}; minorca was run with >=2.11,<2.15", "pip install 'torch>=2.11,<2.15'", False)
    ] * is_wrong


def test_a_package_that_is_missing(versions):
    versions["safetensors"] = None
    (found,) = findings_of(machine.python)
    assert found.prevents and str(found) == "safetensors is not installed; pip install 'safetensors>=0.6.2,<0.9'"


def test_optional_packages_are_no_findings(versions, monkeypatch, tmp_path):
    """Whatever directories lie where a run was started."""
    versions.update(dict.fromkeys(machine.OPTIONAL))
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not findings_of(machine.optional_packages)
    assert facts_of(machine.optional_packages)["wandb"] == "not installed; pip install wandb: for train.wandb"


# --------------------------------------------------------------------------------------------------------- the machine


def test_no_compiler_in_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert facts_of(machine.compilers)["C"].startswith("no cc or gcc or clang: Triton")
    assert [f.remedy for f in findings_of(machine.compilers)] == ["apt install g++"]
    # Triton runs it as one word
    monkeypatch.setenv("CC", "ccache gcc")
    assert facts_of(machine.compilers)["C"].startswith("no ccache gcc: Triton")


def test_no_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "~")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    (found,) = findings_of(machine.disks)
    assert found.prevents and "XDG_CACHE_HOME is not set" in found.message


def test_a_disk_that_is_full_or_cannot_be_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert all("has 0.1 GB free" in f.message and not f.prevents for f in findings_of(machine.disks))
    assert len(findings_of(machine.disks)) == 3

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    found = findings_of(machine.disks)
    assert [f.prevents for f in found] == [True, False, True]
    assert all("cannot be written (Permission denied)" in f.message for f in found)


def test_places_that_are_gone(monkeypatch, tmp_path):
    """A cache that is a link to a file system of another node, and a current directory that was removed."""
    (tmp_path / "cache").symlink_to(tmp_path / "scratch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    cache, current = findings_of(machine.disks)
    assert cache.prevents and "the place of the cache cannot be read" in cache.message
    assert not current.prevents and "current directory cannot be read" in current.message
    monkeypatch.chdir(tmp_path)


def test_no_shared_memory(monkeypatch, tmp_path):
    def lock():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(machine.multiprocessing, "get_context", lambda kind: SimpleNamespace(Lock=lock))
    missing = tmp_path / "shm"
    (found,) = [item for item in machine.shared_memory(missing) if isinstance(item, Finding)]
    assert found.prevents and "semaphores" in found.message and "--shm-size" in found.remedy


def test_limits_of_files_and_threads(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    remedies = [finding.remedy for finding in findings_of(machine.host)]
    assert remedies == [f"export OMP_NUM_THREADS={machine.host_processors()}", "ulimit -n 1024"]
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (-1, -1))
    for threads in ("1", "²"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert not findings_of(machine.host)


def test_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 10**9)
    assert facts_of(machine.host)["memory"].startswith("1.0 GB of the machine's ")


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which torch says what a working driver has it say."""
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device: (8, 0),
        "get_device_name": lambda device: "A GPU",
        "get_device_properties": lambda device: SimpleNamespace(name="A GPU", major=8, minor=0),
        "mem_get_info": lambda device: (70 * 10**9, 80 * 10**9),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr("minorca.device._check_triton", lambda: None)
    return monkeypatch


def test_gpus_that_work(gpus):
    assert not findings_of(accelerator.devices)
    facts = facts_of(accelerator.devices)
    assert facts["cuda:1"] == "A GPU, compute capability 8.0, 70.0 of 80.0 GB free"
    assert facts["driver's CUDA"] == "13.0"


def test_a_gpu_in_use_and_one_that_is_too_old(gpus):
    gpus.setattr(torch.cuda, "mem_get_info", lambda device: ((70, 1)[device] * 10**9, 80 * 10**9))
    gpus.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 0 else (8, 0))
    old, used = findings_of(accelerator.devices)
    assert old.prevents and "compute capability 7.5" in old.message
    assert not used.prevents and used.message == "of cuda:1's memory, 79.0 of 80.0 GB are in use"


def test_a_compiler_that_a_gpu_needs(gpus):
    def fail() -> None:
        raise UserError("Triton cannot compile GPU kernels: no compiler; install a C compiler")

    gpus.setattr("minorca.device._check_triton", fail)
    found = findings_of(accelerator.devices)
    assert [f.prevents for f in found] == [True, False] and "install a C compiler" in str(found[0])


def test_a_driver_that_is_too_old(gpus):
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old (found version 11040).", stacklevel=2)
        return False

    gpus.setattr(torch.cuda, "is_available", is_available)
    gpus.setattr(torch._C, "_cuda_getDriverVersion", lambda: 11040, raising=False)
    (found,) = findings_of(accelerator.devices)
    assert found.prevents and "too old (found version 11040)" in found.message and "driver" in found.remedy
    assert facts_of(accelerator.devices)["driver's CUDA"] == "11.4"


def test_a_build_for_the_cpu_beside_a_driver(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    monkeypatch.setattr(accelerator, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = findings_of(accelerator.devices)
    assert not found.prevents and "torch is for the CPU alone" in found.message
    assert "550.54.15" in facts_of(accelerator.devices)["driver"]


def test_more_threads_than_processors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(accelerator, "host_processors", lambda: 4)
    assert "export OMP_NUM_THREADS=4" in [f.remedy for f in findings_of(accelerator.devices)]


@pytest.mark.parametrize("size, is_small", [(64 * 2**20, True), (8 * 2**30, False)])
def test_several_gpus_and_little_shared_memory(size, is_small, gpus):
    gpus.setattr(accelerator.shutil, "disk_usage", lambda path: SimpleNamespace(total=size))
    gpus.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpus.setattr("torch.cuda.nccl.version", lambda: (2, 27, 3))
    assert [f.remedy for f in findings_of(accelerator.ranks)] == ["docker run --shm-size 1g, or --ipc host"] * is_small
    assert facts_of(accelerator.ranks)["several ranks"] == "nccl 2.27.3, gloo"


def test_a_build_without_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    (found,) = findings_of(accelerator.ranks)
    assert found.prevents and "no gloo" in found.message


# -------------------------------------------------------------------------------------------------------- smoke tests


def test_a_device_on_which_nothing_runs(monkeypatch):
    def fail(device, dtype):
        yield "forward", None
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(smoke, "smoke_tests", fail)
    (found,) = findings_of(accelerator.back_ends)
    assert found.prevents and "cannot be run on cpu: RuntimeError: CUDA error: no kernel image" in found.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong(dtype, monkeypatch):
    tests = dict(smoke.smoke_tests(torch.device("cpu"), dtype))
    assert tests == dict.fromkeys(["forward", "backward", "generation", "nf4"])
    definition = smoke.attention_definition

    # what says what is right hides some of the keys
    def other(q, k, v, first):
        return definition(q, k, v, first + torch.arange(len(first)).sub(first).clamp(min=0, max=8).to(first.dtype))

    monkeypatch.setattr(smoke, "attention_definition", other)
    wrong = [name for name, problem in smoke.smoke_tests(torch.device("cpu"), dtype) if problem]
    assert wrong == ["forward", "backward", "generation"]


# ------------------------------------------------------------------------------------------------------- what runs them


def hang():
    yield Fact("a", "b", "c")
    time.sleep(60)


def fail():
    yield Fact("a", "b", "c")
    raise ValueError("broken\nhere")


def fine():
    yield Fact("a", "d", "e")


def die():
    yield Fact("a", "b", "c")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_check_that_fails_leaves_the_others():
    found = list(run_apart([fail, fine], 30))
    assert found[0] == Fact("a", "b", "c") and found[2] == Fact("a", "d", "e")
    assert isinstance(found[1], Finding) and "the check of fail failed: ValueError: broken here" in found[1].message


@pytest.mark.parametrize(
    "check, expected", [(hang, "hang took more than 0.5 seconds"), (die, "die ended the process by SIGKILL")]
)
def test_a_check_that_does_not_return(check, expected):
    first, last = run_apart([check, fine], 0.5 if check is hang else 30)
    assert first == Fact("a", "b", "c")
    assert isinstance(last, Finding) and last.prevents and expected in last.message


def test_json_has_all(capsys):
    findings = print_json([Fact("a", "b", "c"), Finding("wrong", "fix it", True)])
    assert json.loads(capsys.readouterr().out) == {
        "can_run": False,
        "sections": {"a": {"b": "c"}},
        "findings": [{"message": "wrong", "remedy": "fix it", "prevents": True}],
    }
    assert findings == [Finding("wrong", "fix it", True)]


def test_every_check_is_in_the_list():
    names = {check.__name__ for check in CHECKS}
    for module in (machine, accelerator):
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
        }
        assert public <= names
