"""`--profile`: a trace of a step, for chrome://tracing or Perfetto, and what holds memory."""

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from minorca.train.metrics import peak_memory_bytes
from minorca.train.ranks import World

log = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(directory: Path, world: World) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step. After the third, each rank has written into `directory`:

    trace-rankN.json.gz: a trace of that step.
    memory-rankN.pickle: on CUDA, what was allocated since the loop began (the newest 200,000 times), with stacks, for
        pytorch.org/memory_viz.
    memory-rankN.txt: on the CPU, the tensors that exist, by shape.
    """
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
            (directory / f"memory-rank{world.rank}.txt").write_text(_existing_tensors(peak_memory_bytes(world.device)))
        log.info("profile: %s", directory)

    steps = schedule(wait=1, warmup=1, active=1, repeat=1)
    with profile(schedule=steps, on_trace_ready=write, profile_memory=True, record_shapes=True) as profiler:
        yield profiler.step


def _existing_tensors(peak: int) -> str:
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
            # a tensor that torch.compile made up holds no memory; of several views the last counts
            with contextlib.suppress(RuntimeError):
                storages[tensor.untyped_storage().data_ptr()] = tensor
    kinds = Counter((str(t.dtype), tuple(t.shape), t.untyped_storage().nbytes()) for t in storages.values())
    rows = sorted(((size * count, count, dtype, shape) for (dtype, shape, size), count in kinds.items()), reverse=True)
    lines = [f"{total:>14,} bytes: {count} x {dtype} {list(shape)}" for total, count, dtype, shape in rows]
    return "\n".join([f"{peak:>14,} bytes: the most this process has held", *lines]) + "\n"
