"""How the threads of a CPU's operations wait for each other, which torch's OpenMP reads from the environment when it is
loaded.

As it comes, a thread of GNU's OpenMP that has done its share spins for milliseconds until the others have done theirs.
Where another program computes too, one of them waits for a processor, and what spins keeps it from getting one. A
thread that spins three thousand times, some tens of microseconds, and then sleeps costs a quiet machine little; on a
busy machine it may sleep at once. `python -m benchmarks.train_step --neighbour` measures it. A thousand times would be
a seventh better beside a busy program, and takes a tenth longer for a token alone: it is over before the operations
between two products are.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from minorca.host import host_processors

LOAD = Path("/proc/loadavg")
SPINS = 3000
# what users say themselves, to GNU's, Intel's or any OpenMP
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def set_waiting_policy() -> None:
    """Sets the environment for torch, unless it is loaded already, or the user has done so.

    Threads sleep at once where other programs are running on processors that this one would take, or where a container
    may use less than the processors that it sees; there, it also gets no more threads than it may use.
    """
    if "torch" in sys.modules:
        return
    visible, usable = len(os.sched_getaffinity(0)), host_processors()
    if usable < visible:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable))
    if not any(name in os.environ for name in VARIABLES):
        if usable < visible or _running_programs() + _threads(usable) > (os.cpu_count() or visible):
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        else:
            os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def waiting_policy() -> str:
    """What the environment says."""
    settings = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join(settings) or "OpenMP's own"


def _threads(processors: int) -> int:
    """How many torch will have; OMP_NUM_THREADS may be a list, for nested operations."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdecimal() else processors


def _running_programs() -> int:
    """How many other threads of the machine run or wait for a processor: the median of three moments. 0 where the
    system does not say.
    """
    counts = []
    for pause in (0, 0.002, 0.002):
        time.sleep(pause)
        try:
            # "0.31 0.52 0.48 2/117 4321": 2 of 117 are running, this one among them
            counts.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, IndexError, ValueError):
            return 0
    return int(statistics.median(counts))
