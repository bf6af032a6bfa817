"""What befalls an honest run raises no alarm: kills at any write, a run that goes on meanwhile, metrics moved away, a
download from the hub.
"""

import shutil
from pathlib import Path

import pytest

from minorca import UserError
from minorca.files.atomic import sha256
from minorca.receipts import CHAIN
from minorca.replay import verify
from minorca.train import __main__ as train_command
from minorca.train import checkpoint
from minorca.train import run as train_run
from minorca.train.receipt import Receipt
from tests.train.test_resume import stop_in

SHORT = {"train.steps": 4, "train.checkpoint_every": 2, "train.batch_tokens": 256, "train.keep": 9}


class Killed(BaseException):
    """As if by SIGKILL."""


def killed_in(owner, name: str, options: list[str], monkeypatch, calls: int = 1) -> None:
    """Runs until the last of so many calls of a function, which is not made."""
    function, left = getattr(owner, name), calls

    def kill(*arguments, **keywords):
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill)
        train_command.main(options)


def test_a_line_that_is_being_written_or_was_cut(place, replay, monkeypatch):
    run = place.path / "cut"
    stop_in(4, place("cut", **SHORT), monkeypatch)
    whole = (run / CHAIN).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, 20, len(last) - 1):
        (run / CHAIN).write_bytes(whole[:-cut])
        # the checkpoint is as state.json and its manifest say
        assert "0 checkpoints are as the receipt says, in 1 lines" in replay(run)
    (run / CHAIN).write_bytes(whole + last[:30])
    assert "1 checkpoints are as the receipt says, in 2 lines" in replay(run, "--steps", "0:2")
    for start in (b"", whole[:40]):
        (run / CHAIN).write_bytes(start)
        with pytest.raises(UserError, match="receipt.jsonl: has no whole line: the run is about to write its first"):
            replay(run)


def test_cut_lines_of_a_finished_run_are_an_alarm(run, replay):
    content = (run / CHAIN).read_bytes()
    (run / CHAIN).write_bytes(content[:-1])
    with pytest.raises(UserError, match="adapter/receipt.json: run names no line of receipt.jsonl"):
        replay(run)
    (run / CHAIN).write_bytes(content.replace(b"\n", b"\r\n"))
    with pytest.raises(UserError, match="line 1: was changed"):
        replay(run)


def test_killed_before_what_was_trained_is_in_place(place, replay, monkeypatch):
    """Also where a finished run goes on: its adapter was set aside, and its receipt has no line of that yet."""
    run = place.path / "unpublished"
    killed_in(Receipt, "write", place("unpublished", **SHORT), monkeypatch, calls=4)
    replay(run)
    train_command.main(place("unpublished", **SHORT))
    # as a kill leaves it, which an exception does not
    temporary = (run / "adapter").rename(run / f"adapter.tmp-{'0' * 64}")
    replay(run)
    temporary.rename(run / "adapter")
    killed_in(train_run, "open_receipt", place("unpublished", **SHORT | {"train.steps": 6}), monkeypatch)
    assert (run / "adapter-before-step-00000005").exists()
    replay(run)
    shutil.rmtree(run / "adapter-before-step-00000005")
    with pytest.raises(UserError, match="adapter: is missing; if it was not moved, the same command"):
        replay(run)


def test_killed_before_its_settings_are_written(place, replay, monkeypatch):
    run, options = place.path / "settings", place("settings", **SHORT)
    killed_in(train_run, "write_settings", options, monkeypatch)
    assert not (run / "config.yaml").exists()
    replay(run)
    train_command.main(options)
    killed_in(train_run, "write_settings", place("settings", **SHORT | {"train.steps": 6}), monkeypatch)
    assert "steps: 4" in (run / "config.yaml").read_text()
    replay(run)
    # those of neither
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 4", "steps: 5"))
    with pytest.raises(UserError, match="train.steps is 5; the run had 6"):
        replay(run)


def test_metrics_that_were_moved_away(place, replay, monkeypatch):
    """Before the first checkpoint after it, and after the end."""
    run, options = place.path / "moved", place("moved", **SHORT)
    stop_in(4, options, monkeypatch)
    (run / "metrics.jsonl").unlink()
    stop_in(4, options, monkeypatch)
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == 1
    replay(run)
    train_command.main(options)
    assert "steps 3 to 4 are the run's, to the bit: 2 lines" in replay(run, "--steps", "2:4")
    # begins with steps of which there is no line
    for checkpoints in checkpoint.published(run / "checkpoints"):
        shutil.rmtree(checkpoints)
    assert "steps 1 to 4 are the run's, to the bit: 2 lines" in replay(run, "--steps", "2:4")
    with pytest.raises(UserError, match="--steps begins with step 1, and metrics.jsonl with step 3"):
        replay(run, "--steps", "0:4")


def test_a_run_that_goes_on_meanwhile(place, replay, monkeypatch):
    """It has written lines and checkpoints, removed others, and is finished before all was verified."""
    settings = SHORT | {"train.steps": 6, "train.checkpoint_every": 1, "train.keep": 2}
    stop_in(4, place("live", **settings), monkeypatch)
    verified = []

    def go_on(directory: Path, verify=checkpoint.verify):
        if not verified:
            verified.append(directory)
            train_command.main(place("live", **settings))
        return verify(directory)

    monkeypatch.setattr(verify.checkpoint, "verify", go_on)
    assert "2 checkpoints, adapter are as the receipt says" in replay(place.path / "live")
    assert not verified[0].exists()


def test_an_adapter_in_the_cache_of_the_hub(finished, replay, tmp_path):
    """Its files are links to blobs; one that leads elsewhere is not followed."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (finished / "adapter").iterdir():
        shutil.copy(path, blobs / sha256(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256(path)}")
    assert "files are as receipt.json says" in replay(snapshot)
    (snapshot / "minorca.json").unlink()
    (snapshot / "minorca.json").symlink_to(finished / "adapter" / "minorca.json")
    with pytest.raises(UserError, match="minorca.json: is a symbolic link to"):
        replay(snapshot)
