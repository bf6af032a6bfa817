"""`--profile`: a trace of a few steps, for chrome://tracing or Perfetto, and what memory was taken by."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from minorca.parallel import World

log = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(directory: Path, world: World) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step. After the fifth, or at the end of a shorter run, each rank writes steps 3 to 5 to
    trace-rankN.json.gz, and its memory: on CUDA every allocation, with its stack, to memory-rankN.pickle (for
    pytorch.org/memory_viz), on the CPU what each operator allocated to memory-rankN.txt."""
    directory.mkdir(parents=True, exist_ok=True)
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(directory / f"trace-rank{world.rank}.json.gz"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(directory / f"memory-rank{world.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            table = profiler.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=-1)
            (directory / f"memory-rank{world.rank}.txt").write_text(table)
        log.info("profile: %s", directory)

    steps = schedule(wait=1, warmup=1, active=3, repeat=1)
    with profile(schedule=steps, on_trace_ready=write, profile_memory=True, record_shapes=True) as profiler:
        yield profiler.step
