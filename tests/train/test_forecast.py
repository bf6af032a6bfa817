"""A run says what it will need, is refused where that cannot be had, and never fails for want of a plan."""

import dataclasses
import logging

import pytest

from minorca import cli
from minorca.plan import apart
from minorca.plan.devices import machine
from minorca.plan.fake_device import unavailable
from minorca.train import __main__ as train_command
from minorca.train import forecast
from tests.helpers import lines_of

STEP = {"train.steps": 1, "train.batch_tokens": 128}


@pytest.fixture(autouse=True)
def planned(monkeypatch, caplog) -> None:
    """The tests' models are too small to be planned otherwise."""
    monkeypatch.setattr(forecast, "SMALL", 0)
    caplog.set_level(logging.INFO)


def test_the_estimate_and_the_peak_are_logged(workplace, caplog):
    train_command.main(workplace(**STEP))
    assert "GB on each cpu" in caplog.text and "; estimated 0.00 GB of tensors" in caplog.text
    assert len(lines_of(workplace.path / "run")) >= 1


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_that_cannot_be_planned_goes_on(gpu, workplace, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("fake tensors cannot do this")

    if gpu:
        monkeypatch.setattr(forecast, "here", lambda ranks: machine("H100", ranks))
        monkeypatch.setattr(forecast, "PlanProcess", fail)
    else:
        monkeypatch.setattr(forecast, "make_plan", fail)
    train_command.main(workplace(**STEP))
    assert caplog.text.count("no estimate of memory: fake tensors cannot do this") == 1
    assert (workplace.path / "run" / "adapter").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_what_cannot_fit_is_refused(workplace, monkeypatch, capsys):
    """The plan is computed in a process of its own, as on a machine with a GPU; nothing is written."""
    gpu = dataclasses.replace(machine("RTX-3060", 1), memory=10**6)
    monkeypatch.setattr(forecast, "here", lambda ranks: gpu)
    with pytest.raises(SystemExit) as exit:
        cli.run(train_command.main, workplace(**{"train.micro_batch_tokens": 512, "model.dtype": "bfloat16"}))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "a step needs" in error and "RTX-3060 has" in error
    assert not (workplace.path / "run").exists()


def test_a_plan_process_says_why_it_failed(workplace):
    _, config = cli.parse_config(cli.config_parser("test", ""), workplace(**STEP))
    process = apart.PlanProcess(config, None, machine("H100", 1), 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(apart.UserError, match="NoneType"):
        process.result(120)
