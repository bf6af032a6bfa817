"""The best adapter is kept, and training stops early, exactly so after any interruption."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minorca import UserError
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, loop, metrics
from tests.helpers import assert_same_bits, lines_of

BEST = {
    "train.steps": 8,
    "train.checkpoint_every": 3,
    "train.eval_every": 1,
    "train.keep_best": "true",
    "data.eval": 0.1,
    "train.keep": 9,
}
# the held-out loss before step 1 and after every step
LOSSES = [5.0, 4.0, 3.0, 3.5, 2.0, 2.0, 2.5, 3.0, 2.2]


def step_of(learner) -> int:
    return next((int(state["step"]) for state in learner.optimizer.state.values()), 0)


@pytest.fixture
def losses(monkeypatch):
    """losses(list): held-out losses are those of a list, by step."""

    def set_losses(values: list[float]) -> None:
        monkeypatch.setattr(loop, "evaluate", lambda learner, *_: {"eval_loss": values[step_of(learner)]})

    set_losses(LOSSES)
    return set_losses


def interrupt_at(step: int, options: list[str], owner=metrics.Record, name: str = "step") -> None:
    """Starts a run that ends as if killed when it records this step."""
    original = getattr(owner, name)

    def stop(self, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        original(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stop)
        train_command.main(options)


def best_of(directory: Path) -> dict:
    return json.loads((directory / "adapter" / "best.json").read_text())


def adapter_equals(directory: Path, other: Path) -> bool:
    one, two = (load_file(path / "adapter_model.safetensors") for path in (directory / "adapter", other))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_adapter_of_the_best_evaluation_is_written(losses, workplace, tmp_path, caplog):
    """It is bit for bit what the checkpoint of that step holds; of equal ones the first."""
    caplog.set_level("INFO")
    train_command.main(workplace(**BEST | {"train.checkpoint_every": 1}))
    assert best_of(tmp_path / "run") == {"step": 4, "eval_loss": 2.0}
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [adapter_equals(tmp_path / "run", checkpoints / f"step-0000000{n}") for n in (3, 4, 5, 8)] == [
        False,
        True,
        False,
        False,
    ]
    assert "the adapter is that of step 4, which has the lowest held-out loss, 2.0000" in caplog.text


@pytest.mark.parametrize("stop", [5, 8])
def test_the_best_survives_a_kill(stop, losses, workplace, tmp_path):
    """Killed after the best, and before and after the checkpoint that follows it."""
    train_command.main(workplace("whole", **BEST))
    interrupt_at(stop, workplace("killed", **BEST))
    train_command.main(workplace("killed", **BEST))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert best_of(tmp_path / "killed") == best_of(tmp_path / "whole") == {"step": 4, "eval_loss": 2.0}


def test_a_best_that_a_resumed_run_does_not_reach_again_is_gone(losses, workplace, tmp_path):
    """The run goes on from step 3 at another rate, so that the best of step 4 is of another run."""
    interrupt_at(5, workplace(**BEST))
    losses([*LOSSES[:4], 9.0, 9.0, 9.0, 2.9, 9.0])
    train_command.main(workplace(**BEST, **{"optim.lr": 0.005}))
    assert best_of(tmp_path / "run") == {"step": 7, "eval_loss": 2.9}


def test_the_best_is_that_of_an_earlier_checkpoint_where_a_later_one_is_damaged(losses, workplace, tmp_path):
    train_command.main(workplace("whole", **BEST))
    train_command.main(workplace(**BEST))
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"best.safetensors: does not match the manifest .* set train.resume to last-"):
        train_command.main(workplace(**BEST))
    train_command.main(workplace(**BEST, **{"train.resume": "last-good"}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert best_of(tmp_path / "run")["step"] == 4


def test_where_training_only_harms_the_first_adapter_stays(losses, workplace, tmp_path):
    losses([1.0, *LOSSES[1:]])
    train_command.main(workplace(**BEST))
    assert best_of(tmp_path / "run") == {"step": 0, "eval_loss": 1.0}
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_where_no_evaluation_is_a_number_the_last_adapter_is_written(losses, workplace, tmp_path, caplog):
    losses([math.nan] * 9)
    train_command.main(workplace(**BEST))
    assert not (tmp_path / "run" / "adapter" / "best.json").exists()
    assert adapter_equals(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000008")
    assert "no evaluation gave a number; the last adapter is written" in caplog.text


@pytest.mark.parametrize("stop, kept, told", [(5, 3, True), (8, 4, False)])
def test_keeping_the_best_from_a_later_start_on(stop, kept, told, losses, workplace, tmp_path, caplog):
    """What was not kept cannot be written: it is said where the best so far is not the checkpoint's own adapter."""
    settings = BEST | {"train.checkpoint_every": stop - 2 if told else 4}
    losses([5.0, 4.0, 1.0, 3.5, 0.5 if not told else 2.0, 2.0, 2.5, 3.0, 2.2])
    interrupt_at(stop, workplace(**settings | {"train.keep_best": "false"}))
    train_command.main(workplace(**settings))
    assert best_of(tmp_path / "run")["step"] == 4
    assert ("the best adapter so far, of step 2, was not kept" in caplog.text) == told


# ------------------------------------------------------------------------------------------------------ early stopping

EARLY = {**BEST, "train.keep_best": "false", "train.early_stopping": 2}


def trained_steps(output: Path) -> int:
    return len([line for line in lines_of(output) if "loss" in line])


@pytest.mark.parametrize("patience, last", [(1, 3), (3, 7), (4, 8), (5, 8)])
def test_training_stops_after_evaluations_without_a_lower_loss(patience, last, losses, workplace, tmp_path):
    train_command.main(workplace(**EARLY | {"train.early_stopping": patience}))
    assert trained_steps(tmp_path / "run") == last
    assert adapter_equals(tmp_path / "run", tmp_path / "run" / "checkpoints" / f"step-0000000{last}")


def test_a_run_that_stopped_early_is_finished_until_it_may_go_on(losses, workplace, tmp_path, caplog):
    caplog.set_level("INFO")
    train_command.main(workplace(**EARLY))
    reason = "stopped early after step 6: 2 evaluations in a row without a lower held-out loss (the lowest is 2.0000, "
    assert f"{reason}after step 4); train.early_stopping is 2" in caplog.text and "done: " in caplog.text
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    caplog.clear()
    train_command.main(workplace(**EARLY))
    assert reason in caplog.text and "nothing to do" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    train_command.main(workplace(**EARLY | {"train.early_stopping": "null"}))
    train_command.main(workplace("whole", **EARLY | {"train.early_stopping": "null"}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("stop", [2, 6])
def test_a_killed_run_stops_early_where_it_would_have(stop, losses, workplace, tmp_path):
    train_command.main(workplace("whole", **EARLY | {"train.keep_best": "true"}))
    interrupt_at(stop, workplace("killed", **EARLY | {"train.keep_best": "true"}))
    train_command.main(workplace("killed", **EARLY | {"train.keep_best": "true"}))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert trained_steps(tmp_path / "killed") == 6 and best_of(tmp_path / "killed")["step"] == 4


def test_killed_before_the_adapter_is_written_it_is_written_later(losses, workplace, tmp_path):
    train_command.main(workplace("whole", **EARLY))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "publish", lambda *_: 1 / 0)
        train_command.main(workplace("killed", **EARLY))
    train_command.main(workplace("killed", **EARLY))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_an_evaluation_that_a_signal_interrupts_counts_once(losses, workplace, tmp_path, monkeypatch):
    """It is made again on resuming, and ends the run there as it would have."""
    train_command.main(workplace("whole", **EARLY))

    def evaluate(learner, *_):
        if step_of(learner) == 6:
            signal.raise_signal(signal.SIGINT)
            return None
        return {"eval_loss": LOSSES[step_of(learner)]}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", evaluate)
        train_command.main(workplace("stopped", **EARLY))
    # killed once more, after the line of the evaluation
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "publish", lambda *_: 1 / 0)
        train_command.main(workplace("stopped", **EARLY))
    train_command.main(workplace("stopped", **EARLY))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_a_branch_from_another_runs_checkpoint_knows_its_best(losses, workplace, tmp_path):
    """It has the lines of no evaluation before."""
    train_command.main(workplace("whole", **EARLY | {"train.keep_best": "true"}))
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    train_command.main(
        workplace("branch", **EARLY | {"train.keep_best": "true", "train.resume": tmp_path / "step-00000006"})
    )
    assert trained_steps(tmp_path / "branch") == 0 and best_of(tmp_path / "branch")["step"] == 4
    assert adapter_equals(tmp_path / "branch", tmp_path / "whole" / "adapter")


def test_checkpoints_of_before_are_read(losses, workplace, tmp_path):
    """Those that say nothing of evaluations, of the same format."""
    interrupt_at(5, workplace(**BEST | {"train.keep_best": "false"}))
    directory = tmp_path / "run" / "checkpoints" / "step-00000003"
    state = json.loads((directory / "state.json").read_text())
    for key in ("best_step", "best_loss", "since_best", "evaluated_step"):
        del state[key]
    for key in ("train.keep_best", "train.early_stopping", "optim.warmup_ratio", "optim.min_lr"):
        del state["run"][key]
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "MANIFEST.json").unlink()
    checkpoint.write_manifest(directory)
    train_command.main(workplace(**EARLY))
    assert trained_steps(tmp_path / "run") == 6
