"""Runs minorca.train with an injected fault: python faulty.py POINT COUNT OPTIONS...

A point of `POINTS` kills the process (SIGKILL) when it is reached for the COUNTth time. `nan loss` and `nan gradient`
make the loss of row COUNT, or its gradient alone, NaN whenever the row is trained on. Of the points of `RANK_FAULTS`,
`slow reading` makes rank 1 sleep for COUNT seconds; the others happen on rank COUNT.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from minorca import cli
from minorca.files import atomic as files
from minorca.train import __main__ as train_command
from minorca.train import build, checkpoint, inputs, loop, step
from minorca.train.trainable import TrainableSet


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(path, tensors):
    """Leaves the first half of the file, as a kill during the write does."""
    write_tensors(path, tensors)
    os.truncate(path, Path(path).stat().st_size // 2)
    die()


def half_removed(path):
    """Leaves the directory with one file less, as a kill during the removal does."""
    next(Path(path).iterdir()).unlink()
    die()


def after(function):
    def called(*arguments, **options):
        function(*arguments, **options)
        die()

    return called


def always(*_, **__):
    return True


def is_new_checkpoint(path, *_):
    return "step-" in path.name and ".tmp-" in path.name


def is_existing_directory(path, *_, **__):
    return Path(path).is_dir()


write_tensors = checkpoint.write_tensors
# name -> (owner and attribute that are replaced, the function to call at the COUNTth call, which calls count)
POINTS = {
    "before forward": (step, "batch_sums", die, always),
    "after backward": (TrainableSet, "clip_gradients", die, always),
    "in a write": (checkpoint, "write_tensors", half_written, always),
    "before the manifest": (checkpoint, "write_manifest", die, always),
    "after the manifest": (checkpoint, "write_manifest", after(files.write_manifest), always),
    "before the rename": (Path, "rename", die, is_new_checkpoint),
    "after the rename": (Path, "rename", after(Path.rename), is_new_checkpoint),
    "before the removal": (checkpoint, "prune", die, always),
    "in the removal": (shutil, "rmtree", half_removed, is_existing_directory),
}


def inject(point: str, count: int) -> None:
    if point.startswith("nan"):
        make_nan(point, count)
    elif point in RANK_FAULTS:
        RANK_FAULTS[point](count)
    else:
        kill_at(point, count)


def kill_at(point: str, count: int) -> None:
    owner, name, fault, counts = POINTS[point]
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += counts(*arguments, **options)
        return (fault if calls == count else original)(*arguments, **options)

    setattr(owner, name, counted)


def slow_reading(seconds: int) -> None:
    read_data = inputs.read_data

    def slow(*given):
        time.sleep(seconds if os.environ["RANK"] == "1" else 0)
        return read_data(*given)

    inputs.read_data = slow


def kill_while_loading(rank: int) -> None:
    load_weights = build.load_weights
    build.load_weights = die if os.environ["RANK"] == str(rank) else load_weights


def other_settings(rank: int) -> None:
    parse_config = cli.parse_config

    def parse_other(*arguments):
        args, config = parse_config(*arguments)
        if os.environ["RANK"] == str(rank):
            config.optim.lr *= 2
        return args, config

    cli.parse_config = parse_other


def other_rows(rank: int) -> None:
    read_data = inputs.read_data

    def fewer(*given):
        store, held_out = read_data(*given)
        if os.environ["RANK"] == str(rank):
            store = store.select(range(len(store) - 1))
        return store, held_out

    inputs.read_data = fewer


def hang(rank: int) -> None:
    """In the main thread alone, in its fourth step."""
    batch_of = step.local_batch
    calls = 0

    def hanging(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2 * 3 + 1 and os.environ["RANK"] == str(rank):
            time.sleep(1000)
        return batch_of(*arguments)

    loop.local_batch = hanging


def out_of_memory(rank: int) -> None:
    batch_sums = step.batch_sums

    def outcome(*arguments):
        if os.environ["RANK"] == str(rank):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return batch_sums(*arguments)

    step.batch_sums = outcome


RANK_FAULTS = {
    "slow reading": slow_reading,
    "while loading": kill_while_loading,
    "other lr": other_settings,
    "other rows": other_rows,
    "out of memory": out_of_memory,
    "hanging": hang,
}


def make_nan(point: str, row: int) -> None:
    make_batch = step.make_batch
    batch_sums = step.batch_sums
    # the tokens of batches that contain the row
    affected = set()

    def recorded_batch(store, rows):
        batch = make_batch(store, rows)
        if row in rows:
            affected.add(batch.tokens.numpy().tobytes())
        return batch

    def sums_with_nan(model, objective, batch):
        sums = batch_sums(model, objective, batch)
        loss = sums["loss"]
        if batch.tokens.cpu().numpy().tobytes() in affected and len(batch.targets):
            # the square root is finite at 0, its derivative is not
            sums["loss"] = loss * torch.nan if point == "nan loss" else loss + (loss - loss.detach()).sqrt()
        return sums

    step.make_batch = recorded_batch
    step.batch_sums = sums_with_nan


if __name__ == "__main__":
    inject(sys.argv[1], int(sys.argv[2]))
    cli.run(train_command.main, sys.argv[3:])
