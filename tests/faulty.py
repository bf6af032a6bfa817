"""`python faulty.py POINT COUNT OPTIONS...`: minorca.train with a fault put in at a place that no outside hand could hit.

The process kills itself (SIGKILL) at the COUNTth passing of POINT. `nan loss` and `nan gradient` instead make the loss of the row
COUNT (or only its gradient) a NaN, on every passing; the others are of rank COUNT, or of COUNT seconds in which rank 1 sleeps.
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
from minorca.train import build, checkpoint, inputs, step
from minorca.train.trainable import TrainableSet


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(tensors, path, *rest):
    """What a kill within a write leaves: the file's first half."""
    save_file(tensors, path, *rest)
    os.truncate(path, Path(path).stat().st_size // 2)
    die()


def half_removed(path):
    """What a kill within a removal leaves."""
    next(Path(path).iterdir()).unlink()
    die()


def after(function):
    def called(*arguments, **options):
        function(*arguments, **options)
        die()

    return called


def always(*_, **__):
    return True


def of_a_new_checkpoint(path, *_):
    return "step-" in path.name and ".tmp-" in path.name


def of_what_is_there(path, *_, **__):
    return Path(path).is_dir()


save_file = checkpoint.save_file
POINTS = {  # name -> (owner, attribute, what is called in its place, which calls count)
    "before forward": (step, "batch_outcome", die, always),
    "after backward": (TrainableSet, "clip_gradients", die, always),
    "in a write": (checkpoint, "save_file", half_written, always),
    "before the manifest": (checkpoint, "write_manifest", die, always),
    "after the manifest": (checkpoint, "write_manifest", after(files.write_manifest), always),
    "before the rename": (Path, "rename", die, of_a_new_checkpoint),
    "after the rename": (Path, "rename", after(Path.rename), of_a_new_checkpoint),
    "before the removal": (checkpoint, "prune", die, always),
    "in the removal": (shutil, "rmtree", half_removed, of_what_is_there),
}


def inject(point: str, count: int) -> None:
    if point.startswith("nan"):
        return spoil(point, count)
    if point in ODD:
        return ODD[point](count)
    owner, name, fault, counts = POINTS[point]
    original, passed = getattr(owner, name), 0

    def counted(*arguments, **options):
        nonlocal passed
        passed += counts(*arguments, **options)
        return (fault if passed == count else original)(*arguments, **options)

    setattr(owner, name, counted)


def slow_reading(seconds: int) -> None:
    read_data = inputs.read_data

    def slow(config):
        time.sleep(seconds if os.environ["RANK"] == "1" else 0)
        return read_data(config)

    inputs.read_data = slow


def killed_while_loading(rank: int) -> None:
    load_weights = build.load_weights
    build.load_weights = die if os.environ["RANK"] == str(rank) else load_weights


def other_settings(rank: int) -> None:
    parse_config = cli.parse_config

    def another(*arguments):
        args, config = parse_config(*arguments)
        config.optim.lr *= 1 + (os.environ["RANK"] == str(rank))
        return args, config

    cli.parse_config = another


def other_rows(rank: int) -> None:
    read_data = inputs.read_data

    def fewer(config):
        store, held_out = read_data(config)
        return (store.select(range(len(store) - 1)) if os.environ["RANK"] == str(rank) else store), held_out

    inputs.read_data = fewer


ODD = {
    "slow reading": slow_reading,
    "while loading": killed_while_loading,
    "other lr": other_settings,
    "other rows": other_rows,
}


def spoil(point: str, row: int) -> None:
    make_batch, batch_outcome, spoilt = step.make_batch, step.batch_outcome, set()

    def noting(store, rows):
        batch = make_batch(store, rows)
        if row in rows:
            spoilt.add(batch.tokens.numpy().tobytes())
        return batch

    def spoilt_outcome(model, objective, batch, normalizer):
        outcome = batch_outcome(model, objective, batch, normalizer)
        loss = outcome.loss
        if batch.tokens.cpu().numpy().tobytes() in spoilt and len(batch.targets):
            # the square root of 0 has a value and no finite slope
            outcome.loss = loss * torch.nan if point == "nan loss" else loss + (loss - loss.detach()).sqrt()
        return outcome

    step.make_batch, step.batch_outcome = noting, spoilt_outcome


if __name__ == "__main__":
    inject(sys.argv[1], int(sys.argv[2]))
    cli.run(train_command.main, sys.argv[3:])
