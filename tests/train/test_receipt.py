"""A run's receipt through kills and resumes: nothing that was written is without its line, and no line is twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minorca import UserError, receipts
from minorca.data.store import TokenStore
from minorca.receipts import CHAIN, read_lines
from minorca.replay import __main__ as command
from minorca.replay.recorded_run import read_run
from minorca.replay.verify import verify_run
from minorca.train import __main__ as train_command
from minorca.train import checkpoint
from minorca.train.receipt import BLOCKS, Receipt, last_state, metrics_digests, row_digests, rows_in_block
from tests.helpers import lines_of, without_curves
from tests.train.test_metrics_lines import of_earlier_version
from tests.train.test_resume import rewrite_state, stop_in
from tests.train.test_train import config_of

SHORT = {"train.steps": 4, "train.checkpoint_every": 2, "train.batch_tokens": 256, "train.keep": 9}


@pytest.fixture(scope="module", autouse=True)
def curves():
    with without_curves():
        yield


def kinds_of(run: Path) -> list[tuple[str, int]]:
    lines, error = read_lines(run / CHAIN)
    assert error is None
    return [(line.values["kind"], line.values["step"]) for line in lines]


WHOLE = [("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("outcome", 4)]


def test_killed_at_any_line_it_comes_to_the_same(workplace, tmp_path, monkeypatch):
    """Before a line, and within it."""
    write = Receipt.write
    for n, cut in ((0, True), (1, False), (2, False), (2, True), (3, True)):
        left = n

        def kill(receipt, line, cut=cut):
            nonlocal left
            if left:
                left -= 1
                return write(receipt, line)
            if cut:
                write(receipt, line)
                path = receipt.output / CHAIN
                path.write_bytes(path.read_bytes()[:-20])
            raise SystemExit

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Receipt, "write", kill)
            train_command.main(workplace(f"run-{n}-{cut}", **SHORT))
        run = tmp_path / f"run-{n}-{cut}"
        if n == 2:
            # the checkpoint's line is missing, and the run is as it should be
            assert checkpoint.published(run / "checkpoints")[-1].name == "step-00000004"
            if not cut:
                verify_run(read_run(run, {}))
        train_command.main(workplace(f"run-{n}-{cut}", **SHORT))
        found = kinds_of(run)
        assert [line for line in found if line[0] != "resume"] == WHOLE
        assert len(found) - len(WHOLE) == (n > 0)
        assert f"{len(lines_of(run))} lines of metrics.jsonl" in verify_run(read_run(run, {}))


def test_what_is_different_after_a_resume_is_in_its_line(workplace, tmp_path, monkeypatch):
    stop_in(4, workplace(**SHORT), monkeypatch)
    train_command.main(workplace(**SHORT | {"optim.lr": 0.002, "train.keep": 3}))
    lines, _ = read_lines(tmp_path / "run" / CHAIN)
    (resume,) = [line.values for line in lines if line.values["kind"] == "resume"]
    assert resume["settings"] == {"optim.lr": 0.002, "train.keep": 3} and resume["identity"] == {"optim.lr": 0.002}
    assert resume["versions"] == {} and resume["machine"] == {}
    state = last_state(line.values for line in lines)
    config = config_of(workplace(**SHORT | {"optim.lr": 0.002, "train.keep": 3}))
    assert state["settings"] == json.loads(json.dumps(config.flat())) and state["machine"]["ranks"] == 1
    # goes on for longer: the outcome of the shorter run stays vouched for
    train_command.main(workplace(**SHORT | {"optim.lr": 0.002, "train.steps": 6}))
    ends = [line for line in kinds_of(tmp_path / "run") if line[0] == "outcome"]
    assert ends == [("outcome", 4), ("outcome", 6)]
    verify_run(read_run(tmp_path / "run", {}))
    command.main([str(tmp_path / "run" / "adapter-before-step-00000005")])


def test_going_back_removes_the_lines_of_later_steps(workplace, tmp_path):
    train_command.main(workplace(**SHORT))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train_command.main(workplace(**SHORT))
    assert kinds_of(tmp_path / "run") == [*WHOLE[:2], ("resume", 2), *WHOLE[2:]]
    verify_run(read_run(tmp_path / "run", {}))


def test_a_run_of_an_earlier_version_has_a_receipt_from_its_resume_on(workplace, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    stop_in(4, workplace(**SHORT), monkeypatch)
    (run / CHAIN).unlink()
    (run / "run.json").unlink()
    rewrite_state(run / "checkpoints" / "step-00000002", lambda state: state.pop("receipt"))
    of_earlier_version(run)
    train_command.main(workplace(**SHORT))
    assert kinds_of(run) == [("start", 2), *WHOLE[2:]]
    command.main([str(run), "--steps", "2:4"])
    assert "steps 3 to 4 are the run's, to the bit" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="receipt begins after step 2, and no checkpoint is of a step from there to 1; "
    ):
        command.main([str(run), "--steps", "1:4"])


def test_a_receipt_that_is_not_as_it_was_stops_a_resume(workplace, tmp_path, monkeypatch):
    """Before anything is loaded; moved away, with the lines of metrics.jsonl or without, the run goes on."""
    path = tmp_path / "run" / CHAIN
    stop_in(4, workplace(**SHORT | {"train.checkpoint_every": 1}), monkeypatch)
    before = path.read_text()
    for change, said in (
        (lambda lines: [lines[0].replace('"train.seed": 0', '"train.seed": 1'), *lines[1:]], "line 1: was changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: does not follow the line before"),
        (lambda lines: lines[1:], "line 1: is not the first line of a receipt"),
        (lambda lines: lines[:2], "receipt.jsonl: lines are missing: step-00000003 names one that is not there"),
        (lambda lines: ["mine\n", *lines], "line 1: is not a line of a receipt"),
        (lambda lines: [line.replace('"format": 1', '"format": 2') for line in lines], "has format 2; this version"),
    ):
        path.write_text("".join(change(before.splitlines(keepends=True))))
        for dry in ([], ["--dry-run"]):
            with pytest.raises(UserError, match=said) as caught:
                train_command.main([*workplace(**SHORT | {"train.checkpoint_every": 1}), *dry])
            assert "move it away to go on without the lines up to step 3" in str(caught.value)
    path.rename(tmp_path / "moved")
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "metrics")
    train_command.main(workplace(**SHORT | {"train.checkpoint_every": 1}))
    assert kinds_of(tmp_path / "run") == [("start", 3), ("checkpoint", 4), ("outcome", 4)]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [4]
    command.main([str(tmp_path / "run"), "--steps", "3:4"])


def test_metrics_that_were_moved_away_begin_anew_in_the_receipt(workplace, tmp_path, monkeypatch):
    stop_in(4, workplace(**SHORT), monkeypatch)
    (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "metrics")
    train_command.main(workplace(**SHORT))
    lines, _ = read_lines(tmp_path / "run" / CHAIN)
    assert len(metrics_digests(line.values for line in lines)) == len(lines_of(tmp_path / "run")) == 2
    verify_run(read_run(tmp_path / "run", {}))


def test_rows_have_at_most_so_many_digests(workplace):
    """Blocks of a store cover each row once, whatever is held out; a changed row changes one of them."""

    def digests(store):
        return row_digests(store, None)["rows"]

    rows = 3 * BLOCKS - 5
    lengths = np.random.default_rng(0).integers(1, 5, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    store = TokenStore(np.arange(offsets[-1]).astype(np.uint16), np.ones(offsets[-1], np.bool_), offsets)
    before = digests(store)
    assert rows_in_block(store) == 3 and len(before) == -(-rows // 3) <= BLOCKS
    for row in (0, 1500, rows - 1):
        tokens = store.tokens.copy()
        tokens[store.offsets[row]] += 1
        after = digests(replace(store, tokens=tokens))
        assert [n for n, pair in enumerate(zip(before, after)) if pair[0] != pair[1]] == [row // 3]
    assert digests(store.select(range(10))) == before


def test_the_code_has_one_digest(monkeypatch, tmp_path):
    """It is another where a source file is."""
    package = shutil.copytree(Path(receipts.__file__).parent, tmp_path / "minorca")
    before = receipts.code_sha256()
    monkeypatch.setattr(receipts, "__file__", str(package / "receipts.py"))
    receipts.code_sha256.cache_clear()
    assert receipts.code_sha256() == before
    (package / "train" / "loop.py").write_text("changed")
    receipts.code_sha256.cache_clear()
    assert receipts.code_sha256() != before
    receipts.code_sha256.cache_clear()
