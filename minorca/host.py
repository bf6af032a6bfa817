"""This process and its machine: which rank it is, and what a container or scheduler leaves to it of memory and
processors (cgroup v1 and v2).
"""

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def is_first_rank() -> bool:
    """Whether this process is the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def processor_name() -> str:
    return processor_field("model name") or platform.machine()


def processor_field(name: str) -> str | None:
    """What Linux says of the first processor; None: nothing of that name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == name), None)


def host_memory_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """The memory of this machine, or what is left of it to this process."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _files("memory", "memory.limit_in_bytes", "memory.max", cgroups, membership):
        # without the file there is no limit, and in v2 "max" says so
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits)


def host_processors(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """The processors on which this process may run, or as many as its share of time is worth, rounded up."""
    limits = [len(os.sched_getaffinity(0))]
    for path in _files("cpu", "cpu.cfs_quota_us", "cpu.max", cgroups, membership):
        with contextlib.suppress(OSError, ValueError):
            # microseconds that it may run, of a period; v1 has them in two files
            is_v1 = path.name == "cpu.cfs_quota_us"
            period = f" {path.with_name('cpu.cfs_period_us').read_text()}" if is_v1 else ""
            quota, period = map(int, (path.read_text() + period).split())
            # -1: no limit
            if quota > 0:
                limits.append(math.ceil(quota / period))
    return min(limits)


def _files(controller: str, v1_name: str, v2_name: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """Where the limits of this process's group, and of those that it is in, may be."""
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        # of v2, which has one tree for all controllers, or v1
        root, name = (cgroups / controller, v1_name) if controllers else (cgroups, v2_name)
        if controllers and controller not in controllers.split(","):
            continue
        # a group's limit is that of all below it; in a container the path may be the host's, and the root its own group
        parts = path.strip("/").split("/")
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth], name)
