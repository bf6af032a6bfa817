"""`--dry-run` shows what a run would do, and writes nothing."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from minorca import UserError
from minorca.cli import config_parser, parse_config
from minorca.data import __main__ as data_command
from minorca.train import __main__ as train_command
from minorca.train.inputs import read_inputs
from tests.helpers import lines_of

PLAN = {"train.epochs": 1.5, "optim.warmup_ratio": 0.3, "optim.min_lr": 0.001, "data.eval": 0.1, "train.eval_every": 5}


def files_below(*directories: str | Path) -> set[Path]:
    return {path for directory in directories for path in Path(directory).rglob("*")}


@pytest.fixture
def dry_run(tmp_path, capsys, monkeypatch):
    """dry_run(options): what it prints, once it is sure to have written nothing."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def run(options: list[str]) -> str:
        places = (tmp_path, os.environ["XDG_CACHE_HOME"])
        before = files_below(*places)
        capsys.readouterr()
        train_command.main([*options, "--dry-run"])
        assert files_below(*places) == before
        return capsys.readouterr().out

    return run


def test_the_plan_is_what_the_run_does(dry_run, workplace, tmp_path, caplog):
    caplog.set_level("INFO")
    options = workplace(**PLAN)
    printed = dry_run(options)
    train_command.main(options)
    lines = lines_of(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert f"steps: {len(steps)}, each of 4 micro-batches of at most 128 tokens" in printed
    evaluated = ", ".join(str(line["step"]) for line in lines[1:] if "eval_loss" in line)
    assert f"evaluations: before step 1, and after step {evaluated}" in printed
    # 3 of 9 steps are warm-up
    rates = [f"{line['lr']:.3g} at step {line['step']}" for line in (steps[0], steps[2], steps[-1])]
    assert f"learning rate: {', '.join(rates)}" in printed
    assert "memory before activations: 0.00 GB of float32 weights" in printed and "7,424 trained values" in printed
    assert re.search(r"rows: 54 of [\d,]+ tokens, \d+ of them trained; 6 rows are held out", printed)
    assert "template: chatml" in caplog.text and "hidden_size=64" in printed


def test_the_first_micro_batch_is_that_of_the_run(dry_run, workplace):
    options = workplace()
    printed = dry_run(options)
    config = parse_config(config_parser("test", ""), options)[1]
    inputs = read_inputs(config)
    first = inputs.schedule(config).step(1)
    rows = first[0]
    lengths = inputs.store.lengths[rows]
    assert f"step 1, micro-batch 1 of {len(first)}: {len(rows)} rows, {lengths.sum()} tokens" in printed
    found = re.findall(r"^tokens (\d+) to (\d+): .*, line (\d+), (\d+) tokens$", printed, re.M)
    start = 0
    for row, length, (begin, end, line, tokens) in zip(rows, lengths, found, strict=True):
        assert (int(begin), int(end), int(tokens)) == (start, start + length - 1, length)
        # every row is kept
        assert int(line) == row + 1
        start += length


def test_its_row_is_shown_as_data_show_shows_it(dry_run, workplace, tmp_path, capsys):
    printed = dry_run(workplace())
    (shown,) = re.findall(r"^--- .*, line (\d+): \d+ tokens, \d+ trained\n((?:.*\n)*?)--- step 1", printed, re.M)
    data_command.main(["show", *workplace(), "--rows", "60"])
    text = capsys.readouterr().out
    assert re.findall(rf"^--- .*, line {shown[0]}: .*\n((?:.*\n)*?)(?:---|\Z)", text, re.M) == [shown[1]]
    assert "«" in shown[1]


def test_it_refuses_what_the_run_would(dry_run, workplace):
    with pytest.raises(UserError, match="optim.warmup_steps is 99, longer than the run of"):
        dry_run(workplace(**{"optim.warmup_steps": 99}))
    with pytest.raises(UserError, match="the model has 512 positions"):
        dry_run(workplace(**{"data.seq_len": 1024, "train.micro_batch_tokens": 1024, "train.batch_tokens": 1024}))


def test_it_says_where_a_run_would_resume(dry_run, workplace, tmp_path):
    train_command.main(workplace(**{"train.steps": 2}))
    found = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert f"resumes from {found}\n" in dry_run(workplace(**{"train.steps": 3}))
    assert f"resumes from {found}: all 2 steps are done" in dry_run(workplace(**{"train.steps": 2}))
    with pytest.raises(UserError, match="train.seed was 0 in the checkpoint and is 1 now"):
        dry_run(workplace(**{"train.steps": 3, "train.seed": 1}))


def test_of_several_ranks_one_prints(dry_run, workplace, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not dry_run(workplace())
