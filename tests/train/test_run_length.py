"""How long a run is, what is due after which step, and its learning rates."""

import math

import numpy as np
import pytest
import torch
import transformers

from minorca import UserError
from minorca.cli import config_parser, parse_config
from minorca.config import OptimConfig
from minorca.data.packing import BatchSchedule
from minorca.train import __main__ as train_command
from minorca.train import run
from minorca.train.optim import learning_rate
from minorca.train.run_length import run_length
from tests.helpers import lines_of


def config_of(workplace, **settings):
    return parse_config(config_parser("test", ""), workplace(**settings))[1]


def schedule_of(rows: int, weights: tuple[float, ...] = (1.0,)) -> BatchSchedule:
    """Steps of one row each: without weights, as many in an epoch as there are rows."""
    sources = [(n * rows, (n + 1) * rows, weight) for n, weight in enumerate(weights)]
    return BatchSchedule(np.full(rows * len(weights), 5), 10, 1, False, 0, sources)


@pytest.mark.parametrize(
    "epochs, steps", [(1, 10), (3, 30), (0.5, 5), (2.5, 25), (0.04, 1), (0.16, 2), (1.99, 20), (2.0, 20)]
)
def test_a_share_of_an_epoch_is_that_share_of_its_steps(epochs, steps):
    assert schedule_of(10).steps(epochs) == steps


def test_epochs_of_different_lengths_end_where_they_end():
    """Half of 7 and of 3 rows are drawn in turn: 2 + 4 rows an epoch or so, whichever epoch is cut."""
    schedule = schedule_of(7, (0.5, 1.3))
    ends = [schedule.steps(n) for n in range(1, 7)]
    assert len({end - start for start, end in zip([0, *ends], ends)}) > 1
    for epoch in range(1, 6):
        start, end = ends[epoch - 1], ends[epoch]
        assert schedule.steps(epoch + 0.5) == start + round((end - start) / 2)
    assert schedule.steps_every(1, ends[-1]) == set(ends)
    assert schedule.steps_every(2, ends[-1]) == {ends[1], ends[3], ends[5]}
    # 0.1 has no exact binary form, and the ends of epochs are exact all the same
    assert set(ends) <= schedule.steps_every(0.1, ends[-1])


@pytest.mark.parametrize(
    "every, due",
    [
        (0, [25]),
        (10, [10, 20, 25]),
        ("1 epoch", [10, 20, 25]),
        ("0.5 epochs", [5, 10, 15, 20, 25]),
        (".3 epochs", [3, 6, 9, 12, 15, 18, 21, 24, 25]),
        ("2 epochs", [20, 25]),
        ("3 epochs", [25]),
    ],
)
def test_what_is_due_every_so_often_and_after_the_last_step(every, due, workplace):
    settings = {"train.epochs": 2.5, "data.eval": 0.1, "train.checkpoint_every": every, "train.eval_every": every}
    length = run_length(config_of(workplace, **settings), schedule_of(10))
    assert length.steps == 25
    for is_due in (length.saves_after, length.evaluates_after):
        assert [step for step in range(1, 26) if is_due(step)] == due


def test_a_run_of_half_an_epoch_evaluates_and_saves_by_epochs(workplace, tmp_path):
    settings = {"data.packing": "false", "train.batch_tokens": 1280, "data.eval": 6 / 60, "train.keep": 9}
    every = {"train.eval_every": "0.2 epochs", "train.checkpoint_every": "0.4 epochs"}
    train_command.main(workplace(**settings, **every, **{"train.epochs": 1.5}))
    # 54 rows in steps of 10: 6 steps an epoch
    steps = [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line]
    evaluated = [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert steps == list(range(1, 10)) and evaluated == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"step-0000000{step}" for step in (2, 5, 7, 9)]
    # what was written, not what it became
    assert "eval_every: 0.2 epochs" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_warm_up_longer_than_the_run_is_refused_before_the_model_is_loaded(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "build", None)
    # 60 rows without packing in steps of 4: 15 steps
    for steps in (16, 100):
        message = f"optim.warmup_steps is {steps}, longer than the run of 15 steps; lower it, or train longer"
        with pytest.raises(UserError, match=message):
            train_command.main(workplace(**{"data.packing": "false", "optim.warmup_steps": steps}))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_by_ratio_is_that_of_transformers(tmp_path):
    for ratio in (0.0, 0.03, 0.1, 0.25, 0.5):
        optim = OptimConfig(warmup_ratio=ratio)
        theirs = transformers.TrainingArguments(str(tmp_path), warmup_steps=ratio, use_cpu=True)
        for steps in (3, 10, 97):
            warmup = theirs.get_warmup_steps(steps)
            rates = [learning_rate(step, steps, optim) for step in range(1, steps + 1)]
            rise = [pytest.approx(optim.lr * n / warmup) for n in range(1, warmup + 1)]
            assert rates[: warmup + 1] == [*rise, optim.lr], (ratio, steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_least_learning_rate_is_that_of_transformers(schedule):
    optim = OptimConfig(lr=0.01, schedule=schedule, warmup_steps=3, min_lr=0.002)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=optim.lr)
    name, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr": 0.002}),
        "linear": ("polynomial", {"lr_end": 0.002, "power": 1.0}),
    }[schedule]
    theirs = transformers.get_scheduler(name, optimizer, 0, 17, scheduler_specific_kwargs=options)
    for step in range(4, 21):
        assert learning_rate(step, 20, optim) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert theirs.get_last_lr()[0] == pytest.approx(0.002)


def test_the_default_schedule_is_what_it_was_to_the_bit():
    optim = OptimConfig(lr=2.3e-4, warmup_steps=7)
    for step in range(8, 1001):
        assert learning_rate(step, 1000, optim) == 2.3e-4 * (0.5 * (1 + math.cos(math.pi * ((step - 8) / 993))))
