"""metrics.jsonl is part of what a checkpoint vouches for: it is on the disk first, and checked when a run resumes."""

import json
import os
from pathlib import Path

import pytest

from minorca import UserError
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, metrics
from tests.helpers import assert_same_bits, lines_of
from tests.train.test_resume import rewrite_state, stop_in

SETTINGS = {"train.steps": 6, "train.checkpoint_every": 4, "data.eval": 0.1, "train.eval_every": 2}


@pytest.fixture
def stopped(workplace, tmp_path, monkeypatch):
    """A run with a checkpoint of step 4, stopped in step 6: its options, and the lines of its metrics.jsonl.

    They are of steps 0 (an evaluation), 1, 2, 2 (evaluation), 3, 4, 4 (evaluation), 5.
    """
    options = workplace(**SETTINGS)
    stop_in(6, options, monkeypatch)
    return options, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)


def of_earlier_version(run: Path) -> None:
    """Has the newest checkpoint vouch for nothing, as an earlier version's."""
    found = checkpoint.published(run / "checkpoints")[-1]
    rewrite_state(found, lambda state: [state.pop(key) for key in ("metrics_bytes", "metrics_sha256")])


def changed(lines: list[str], n: int) -> list[str]:
    return [*lines[:n], json.dumps(json.loads(lines[n]) | {"loss": 0.5}) + "\n", *lines[n + 1 :]]


# a change of the lines, and what is said
REFUSED = {
    "cut before the checkpoint": (lambda lines: lines[:3], "3: is of step 2; the lines of steps 3 to 4 are missing"),
    "cut within a line": (lambda lines: [*lines[:3], lines[3][:9]], "3: is of step 2; the lines of steps 3 to 4"),
    "a gap": (lambda lines: lines[:2] + lines[4:], "3: is of step 3; expected step 2"),
    "twice": (lambda lines: [*lines[:3], *lines[2:]], "4: is of step 2; expected step 3"),
    "another order": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "2: is of step 2; expected step 1"),
    "a foreign line": (lambda lines: [*lines[:3], "mine\n", *lines[3:]], "4: is not a line of a run"),
    "a changed value": (lambda lines: changed(lines, 4), "1 to 7: are not as the run wrote them"),
    "an evaluation lost": (lambda lines: lines[1:], "1 to 6: are not as the run wrote them"),
    "appended again": (lambda lines: [*lines, *lines[:2]], "9: is of step 0"),
    "a step appended": (lambda lines: [*lines[:7], lines[5]], "8: is of step 4"),
    "an evaluation appended": (lambda lines: [*lines[:7], lines[6]], "8: is a second line of an evaluation"),
    "an evaluation twice": (lambda lines: [*lines[:4], *lines[3:]], "5: is a second line of an evaluation"),
    "tasks twice": (lambda lines: [*lines[:7], TASKS, TASKS], "9: is a second line of tasks"),
    "a note appended": (lambda lines: [*lines[:7], '{"step": 4, "note": "mine"}\n'], "8: is not a line of a run"),
    "text for a loss": (lambda lines: [*lines[:7], '{"step": 4, "eval_loss": "abc"}\n'], "8: is not a line of a run"),
    "a list for a loss": (lambda lines: [*lines[:7], '{"step": 4, "eval_loss": [1]}\n'], "8: is not a line of a run"),
    "a huge loss": (
        lambda lines: [*lines[:7], f'{{"step": 4, "eval_loss": {10**400}}}\n'],
        "8: is not a line of a run",
    ),
    "a byte order mark": (lambda lines: ["\ufeff", *lines], "1: is not a line of a run"),
    "carriage returns": (lambda lines: [line.replace("\n", "\r\n") for line in lines], "1: is not a line of a run"),
}
TASKS = '{"step": 4, "eval_task/acc": 0.5}\n'
# of an earlier version's checkpoint, which does not vouch for the file
ONLY_KNOWN_BY_BYTES = {"a changed value", "an evaluation lost"}


@pytest.mark.parametrize("earlier", [False, True])
def test_lines_that_are_not_the_runs_are_refused(earlier, stopped, tmp_path):
    options, lines = stopped
    path = tmp_path / "run" / "metrics.jsonl"
    if earlier:
        of_earlier_version(tmp_path / "run")
    for name, (change, message) in REFUSED.items():
        if earlier and name in ONLY_KNOWN_BY_BYTES:
            continue
        text = "".join(change(lines))
        path.write_bytes(text.encode())
        with pytest.raises(UserError, match=f"metrics.jsonl, lines? {message}") as caught:
            train_command.main([*options, "--dry-run"])
        assert "put the file back as it was, or move it away" in str(caught.value), name
        with pytest.raises(UserError, match=f"lines? {message}"):
            train_command.main(options)
        assert path.read_bytes() == text.encode()


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 6, "lo', b"\0" * 100, b"5\n[1]\n\xff\n" + b"[" * 200_000 + b"\n", b'{"step": 7, "loss": 1.0}\n'],
    ids=["nothing", "cut", "zeros", "garbage", "a step"],
)
def test_what_follows_the_checkpoint_is_computed_again(tail, stopped, workplace, tmp_path):
    options, _ = stopped
    train_command.main(workplace("whole", **SETTINGS))
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    train_command.main(options)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_file_that_was_moved_away_begins_after_the_checkpoint(stopped, tmp_path, monkeypatch, caplog):
    """Also when the run is stopped again before it writes another checkpoint."""
    options, _ = stopped
    (tmp_path / "run" / "metrics.jsonl").unlink()
    stop_in(6, options, monkeypatch)
    train_command.main(options)
    assert caplog.text.count("metrics.jsonl: has no lines up to step 4") >= 2
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [5, 6]
    train_command.main([*options, "--train.steps", "7"])
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line] == [5, 6, 7]


def test_a_finished_run_has_nothing_to_do_with_other_lines(workplace, tmp_path, caplog):
    """Which are refused once it is to go on."""
    options = workplace(**SETTINGS)
    train_command.main(options)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("mine\n")
    train_command.main([*options, "--dry-run"])
    train_command.main(options)
    assert "nothing to do" in caplog.text
    with pytest.raises(UserError, match="metrics.jsonl, line 1: is not a line of a run"):
        train_command.main([*options, "--train.steps", "8"])
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_is_taken_from_under_a_run(how, workplace, tmp_path, monkeypatch):
    """The run saves its steps and says so, for its lines would be nowhere."""
    path = tmp_path / "run" / "metrics.jsonl"
    record_step = metrics.Record.step

    def take(record, step, *rest):
        record_step(record, step, *rest)
        if step == 3:
            content = path.read_bytes()
            path.unlink()
            if how == "replaced":
                path.write_bytes(content)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="metrics.jsonl: was removed .* or replaced"):
        patch.setattr(metrics.Record, "step", take)
        train_command.main(workplace(**SETTINGS))
    (saved,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert checkpoint.verify(saved).step == 4


def test_lines_are_on_the_disk_before_their_checkpoint(workplace, tmp_path, monkeypatch):
    """What a checkpoint vouches for has been synchronised when it is published."""
    path = tmp_path / "run" / "metrics.jsonl"
    synchronised = []
    fsync, publish = os.fsync, checkpoint.publish

    def record_fsync(descriptor):
        fsync(descriptor)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            synchronised.append(path.read_bytes())

    def check(directory, write, *rest):
        assert synchronised[-1] == path.read_bytes() and len(lines_of(tmp_path / "run")) > 0
        publish(directory, write, *rest)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(checkpoint, "publish", check)
    train_command.main(workplace(**SETTINGS))
    assert len(checkpoint.published(tmp_path / "run" / "checkpoints")) == 2


@pytest.mark.parametrize("how", ["line", "picture"])
def test_a_picture_that_fails_costs_nothing(how, workplace, tmp_path, monkeypatch, caplog):
    """One line says so; a run that was killed before its picture draws it when it is started again."""
    close = metrics.Record.close

    def spoil(record, phases):
        assert (tmp_path / "run" / "adapter").is_dir()
        close(record, phases)
        if how == "line":
            record.path.write_bytes(b"no line\n")
        else:
            (tmp_path / "run" / "curves.png").mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Record, "close", spoil)
        train_command.main(workplace(**SETTINGS))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "curves.png: cannot be drawn" in warning and "\n" not in warning
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_picture_is_drawn_later(workplace, tmp_path):
    train_command.main(workplace(**SETTINGS))
    (tmp_path / "run" / "curves.png").unlink()
    train_command.main(workplace(**SETTINGS))
    assert (tmp_path / "run" / "curves.png").exists()
