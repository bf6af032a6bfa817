"""Configurations drawn at random, each interrupted at random: the run comes to the bits of one that never was."""

import contextlib
import os
import random
import signal
import time

import pytest

from minorca.train import __main__ as train_command
from tests import faulty
from tests.helpers import assert_same_bits, torchrun, training, wait_until
from tests.train.test_faults import lines, ranks_of

CHOICES = {
    "lora.dropout": (0.0, 0.1),
    "lora.targets": ("[q, k, v, o, gate, up, down]", "[q, v]", "[down]"),
    "data.packing": ("true", "false"),
    "data.train_on": ("response", "all"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.weight_decay": (0.0, 0.1),
    "optim.max_grad_norm": (0.3, 1.0),
    "optim.warmup_ratio": ("null", 0.2),
    "train.seed": (0, 1, 2),
    "train.batch_tokens": (256, 384, 512),
    "train.checkpoint_every": (1, 3, 7, '"0.5 epochs"'),
    "train.keep": (1, 2),
    "train.eval_every": (4, 9),
    "train.keep_best": ("true", "false"),
    "parallel.activation_checkpointing": ("none", "selective", "full"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


def draw_settings(draw: random.Random, ranks: int) -> dict:
    settings = {key: draw.choice(values) for key, values in CHOICES.items()}
    settings |= {"train.steps": draw.randint(20, 40), "data.eval": 0.1}
    if draw.random() < 0.3:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora.")}
        settings |= {"train.full": "true", "lora.rank": 16}
    elif ranks:
        settings["parallel.shard"] = draw.choice(["none", "fsdp"])
    return settings


def interrupt(options: list[str], run, ranks: int, steps: int, draw: random.Random) -> tuple[str, bool]:
    """Starts a run and ends it, by a signal to one rank after a random line, or by a kill within a step or a save.

    Returns:
        What was done, and whether the run was still going on.
    """
    if draw.random() < 0.4:
        point = draw.choice(sorted(faulty.POINTS))
        process = training(options, ranks, faulty=(point, draw.randint(1, 2)))
        done = point
    else:
        signum = draw.choice(SIGNALS)
        process = training(options, ranks)
        before, target, rank = lines(run), draw.randint(1, steps // 2), draw.randrange(ranks or 1)
        # where it resumes, the file has lines already, of which some may be removed
        wait_until(lambda: lines(run) != before or process.poll() is not None, 120)
        wait_until(lambda: lines(run) >= target or process.poll() is not None, 120)
        time.sleep(draw.uniform(0, 0.05))
        running = ranks_of(process) if ranks else [process.pid]
        # none where the run has just ended
        for pid in running[rank : rank + 1] if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        done = signum.name
    _, err = process.communicate(timeout=120)
    # an error of the run's own would be 2, or a traceback
    expected = {0, 1} if ranks else {0, -signal.SIGKILL, *(128 + signum for signum in SIGNALS)}
    assert process.returncode in expected and "minorca: error" not in err, (done, process.returncode, err[-3000:])
    return done, process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_random_configuration_interrupted_at_random(seed, workplace, tmp_path):
    """Ten of them, every other one on two ranks."""
    draw, ranks = random.Random(seed), 2 * (seed % 2)
    settings = draw_settings(draw, ranks)
    whole, options = (workplace(name, **settings) for name in ("whole", "stopped"))
    if ranks:
        torchrun(ranks, whole)
    else:
        train_command.main(whole)
    history = [
        interrupt(options, tmp_path / "stopped", ranks, settings["train.steps"], draw)
        for _ in range(draw.randint(1, 2))
    ]
    process = training(options, ranks)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, (settings, history, err[-3000:])
    try:
        assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    except AssertionError as error:
        raise AssertionError((settings, history)) from error
    assert any(was_running for _, was_running in history), history
