"""One run on any number of processes: who this one is, and how all of them leave together."""

import contextlib
import datetime
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from minorca.device import default_device, has_gpu
from minorca.errors import RunEnded, UserError
from minorca.signals import Terminated, signals_noted
from minorca.train.rank_monitor import RankMonitor


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        monitor: watches the other ranks; None where there are none.
    """

    rank: int
    size: int
    device: torch.device
    monitor: RankMonitor | None = None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks, in fp64. Every rank must call it."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def keys_that_differ(self, values: dict[str, object]) -> list[str]:
        """The keys whose values are not the same on all ranks. Every rank must call it, with the same keys."""
        # 40 bits each, whose sums fp64 holds exactly
        digests = [int(hashlib.sha256(json.dumps(value).encode()).hexdigest()[:10], 16) for value in values.values()]
        totals = self.sum(digests)
        return [key for key, digest, total in zip(values, digests, totals) if total != digest * self.size]

    def barrier_without_timeout(self, name: str) -> None:
        """Waits for all ranks, however long: what they do before may take one much longer than another."""
        if self.monitor:
            self.monitor.rendezvous(name)

    def set_status(self, status: str) -> None:
        """Tells the other ranks what this one is doing, for the message if it is the last that they hear of it."""
        if self.monitor:
            self.monitor.status = status


@contextlib.contextmanager
def init_distributed(timeout: int) -> Iterator[World]:
    """Within it, this process is in the group torchrun describes, or in one of its own: nccl on CUDA, gloo on the CPU.

    A collective that a rank does not join fails after `timeout` seconds in which the job was not suspended. When a rank
    leaves, by whatever error or signal, all others leave too.

    Raises:
        RunEnded: another rank left, or has already reported the error that this one would end with.
    """
    device = _device()
    cuda = device.type == "cuda"
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    limit = datetime.timedelta(seconds=timeout)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit, store=HashStore(), rank=0, world_size=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    monitor = RankMonitor(rank, size, timeout, device) if size > 1 else None
    lift_timeouts(device)
    try:
        yield World(rank, size, device, monitor)
        # gloo aborts processes that leave while others still communicate
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        if not monitor:
            dist.destroy_process_group()
            raise
        # When a rank dies, torchrun signals the others to end: not before they have said which rank they miss. The
        # group is not destroyed, for nccl's would wait for the others first; the process ends anyway.
        with signals_noted():
            raise _leave(error, monitor)  # noqa: B904  (the error itself, or why it is another rank's)
    finally:
        if monitor:
            monitor.close()


def lift_timeouts(device: torch.device) -> None:
    """Has gloo wait without a limit, in the groups that exist: it counts the time that a job is suspended too, of which
    the monitor, which has the limit, counts nothing.
    """
    if device.type == "cpu":
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(datetime.timedelta(days=365), group)


def _device() -> torch.device:
    """This rank's device, made the current one. Raises UserError: there are more ranks than GPUs, or see `device`."""
    if not has_gpu():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        rank = os.environ.get("RANK")
        raise UserError(f"rank {rank} has no GPU: this machine has {count}; lower --nproc-per-node")
    device = default_device(index)
    torch.cuda.set_device(device)
    return device


def _leave(error: BaseException, monitor: RankMonitor) -> BaseException:
    """Tells the other ranks of the error that ends this one; returns what to end with: the error, or why it is
    another's.
    """
    # the store may be what is lost
    with contextlib.suppress(dist.DistError):
        if isinstance(error, UserError):
            first = monitor.is_first_to_report(str(error))
            monitor.leave(2, "")
            monitor.wait_for_others()
            return error if first else RunEnded(2)
        # a signal from the user; or from torchrun, because another rank died
        if isinstance(error, KeyboardInterrupt | Terminated):
            cause = monitor.cause_of_failure(signalled=True)
            monitor.leave(128 + (error.signum if isinstance(error, Terminated) else signal.SIGINT), "")
            return cause or error
        # a collective that broke because another rank left
        may_be_collective = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if may_be_collective and (cause := monitor.cause_of_failure()):
            message = f"{cause} (its own error: {error})".partition("\n")[0] if str(cause) else ""
            return RunEnded(cause.status, message)
        monitor.leave(1, f"{type(error).__name__}: {error}".partition("\n")[0])
        error.add_note(f"The other ranks: {monitor.statuses()}")
    return error
