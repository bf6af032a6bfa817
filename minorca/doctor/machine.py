"""Checks of the machine and of what is installed; none imports torch."""

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minorca.doctor.findings import Fact, Finding
from minorca.errors import UserError
from minorca.files.safe_io import cache_directory
from minorca.host import host_memory_bytes, host_processors, processor_name

# what packages that minorca does without are for
OPTIONAL = {
    "lm_eval": ("minorca.evaluate and eval.tasks", "pip install 'minorca[eval]'"),
    "torchao": ("optim.name adamw_8bit", "pip install torchao"),
    "wandb": ("train.wandb", "pip install wandb"),
    "mistral_common": ("models whose only tokenizer is tekken.json", "pip install mistral-common"),
}
# a run keeps two checkpoints and an adapter, of a 7B model's adapters some 0.5 GB each
DISK_BYTES = 2e9
FILES = 1024


def python() -> Iterator[Fact | Finding]:
    """Versions of Python and of the required packages, against the ranges of setup.py."""
    # every environment with `datasets` has it
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    section = "packages"
    try:
        own = importlib.metadata.distribution("minorca")
    except importlib.metadata.PackageNotFoundError:
        yield Fact(section, "python", platform.python_version())
        yield Finding("minorca is not installed, so no version is checked", "pip install -e . in its checkout")
        return
    wanted = own.metadata["Requires-Python"]
    yield Fact(section, "python", f"{platform.python_version()} ({wanted}), {sys.executable}")
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield Finding(f"Python is {platform.python_version()}; expected {wanted}", "make an environment with another")
    for requirement in map(Requirement, own.requires or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        # the lower bound first
        name, bounds = requirement.name, ",".join(sorted(map(str, requirement.specifier), reverse=True))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Fact(section, name, f"not installed ({bounds})")
            yield Finding(f"{name} is not installed", f"pip install '{name}{bounds}'", prevents=True)
            continue
        yield Fact(section, name, f"{version} ({bounds})")
        if not requirement.specifier.contains(version, prereleases=True):
            message = f"{name} is {version}; minorca was run with {bounds}"
            yield Finding(message, f"pip install '{name}{bounds}'")


def optional_packages() -> Iterator[Fact | Finding]:
    for name, (purpose, command) in OPTIONAL.items():
        # not by what can be imported: `wandb` makes a directory of that name where a run is started
        try:
            state = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            state = f"not installed; {command}"
        yield Fact("optional packages", name, f"{state}: for {purpose}")


def host() -> Iterator[Fact | Finding]:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory, processors = host_memory_bytes(), host_processors()
    free = _meminfo("MemAvailable")
    # of the whole machine
    available = f", {_gigabytes(min(free, memory))} available" if free else ""
    of_container = f" of the machine's {_gigabytes(whole)} (cgroup)" if memory < whole else ""
    yield Fact("host", "processor", f"{processor_name()}, {processors} of {os.cpu_count()} usable")
    yield Fact("host", "memory", f"{_gigabytes(memory)}{of_container}{available}")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdecimal() and int(threads) > processors:
        message = f"OMP_NUM_THREADS is {threads}, more than the {processors} processors that this process may use"
        yield Finding(message, f"export OMP_NUM_THREADS={processors}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Fact("host", "open files", f"at most {soft}")
    if 0 <= soft < FILES:
        yield Finding(f"at most {soft} files may be open; a server of many clients needs more", f"ulimit -n {FILES}")


def disks() -> Iterator[Fact | Finding]:
    """Where files are written: is it there, may it be written, how much is free?"""
    try:
        cache = cache_directory("rows")
        yield from _place("cache", cache, "export XDG_CACHE_HOME=DIRECTORY, or set data.store")
    except UserError as error:
        yield Fact("disks", "cache", "none")
        yield Finding(str(error), "export XDG_CACHE_HOME=DIRECTORY", prevents=True)
    yield from _place("current directory", Path(os.curdir), "cd elsewhere, or set train.output", prevents=False)
    try:
        yield from _place("temporary files", Path(tempfile.gettempdir()), "export TMPDIR=DIRECTORY")
    except FileNotFoundError as error:
        yield Fact("disks", "temporary files", "none")
        yield Finding(f"there is no place for temporary files: {error.strerror}", "export TMPDIR=DIRECTORY", True)


def shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Fact | Finding]:
    """What processes share: semaphores, by which rows are rendered on several cores, and NCCL's buffers."""
    state = f"{_gigabytes(shutil.disk_usage(path).total)}" if path.is_dir() else "none"
    yield Fact("host", "shared memory", f"{path}: {state}")
    try:
        multiprocessing.get_context("spawn").Lock()
    # by platform: no such file, not implemented, not permitted
    except (OSError, ImportError) as error:
        message = f"processes cannot share semaphores, which rendering rows needs: {error}"
        yield Finding(message, f"mount a tmpfs at {path} (docker run --shm-size 1g)", prevents=True)


def compilers() -> Iterator[Fact | Finding]:
    names = _c_compilers()
    c, cxx = next(filter(None, map(shutil.which, names)), None), shutil.which("g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    yield Fact("compilers", "C", c or f"no {' or '.join(names)}: Triton needs one to launch kernels on a GPU")
    yield Fact("compilers", "Python.h", str(headers) if headers.exists() else "none: Triton needs it on a GPU")
    yield Fact("compilers", "C++", cxx or "none")
    if not cxx:
        yield Finding("g++ is missing, without which minorca.plan knows no GPU", "apt install g++")


def _c_compilers() -> tuple[str, ...]:
    # as Triton chooses
    return (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")


def _place(name: str, path: Path, remedy: str, prevents: bool = True) -> Iterator[Fact | Finding]:
    try:
        path = path.absolute()
        # a link to nothing is not what may be made below its parent
        existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        free = shutil.disk_usage(existing).free
    except OSError as error:
        yield Fact("disks", name, "none")
        yield Finding(f"the place of the {name} cannot be read: {error}", remedy, prevents)
        return
    yield Fact("disks", name, f"{path}, {_gigabytes(free)} free")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(f"{existing} cannot be written ({error.strerror})", remedy, prevents)
        return
    if free < DISK_BYTES:
        yield Finding(f"{existing} has {_gigabytes(free)} free", remedy)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
