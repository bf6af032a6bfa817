"""Injected faults: kills, signals, full disks and NaN never damage what a run has saved, and the cause is reported."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minorca import UserError, cli
from minorca.data.packing import plan_epoch
from minorca.signals import STOPPING, Terminated, raise_when_stopped
from minorca.train import __main__ as train_command
from minorca.train import build, checkpoint, inputs, loop, metrics, step
from minorca.train.trainable import TrainableSet
from tests import faulty
from tests.helpers import assert_same_bits, lines_of, torchrun, training, wait_until

KILLED = {
    "train.steps": 120,
    "train.checkpoint_every": 5,
    "lora.dropout": 0.1,
    "data.eval": 0.1,
    "train.eval_every": 40,
}


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process ids of a torchrun's ranks, in order of rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    pids = {}
    for pid in map(int, found):
        try:
            variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
            pids[int(variables["RANK"])] = pid
        except (OSError, KeyError):
            continue
    return [pids[rank] for rank in sorted(pids)]


def kill_at_random(options: list[str], run: Path, kills: int, seed: int) -> int:
    """Starts a run `kills` times and kills it at random moments of its loop; returns how often it was still running."""
    draw = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = training(options)
        before = lines(run)
        wait_until(lambda process=process, before=before: lines(run) != before or process.poll() is not None)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    return killed


def finish(options: list[str]) -> None:
    process = training(options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(workplace, tmp_path):
    """Killed once at a random moment, and once while it writes a checkpoint's file."""
    train_command.main(workplace("whole", **KILLED))
    options = workplace("killed", **KILLED)
    assert kill_at_random(options, tmp_path / "killed", kills=1, seed=0) == 1
    process = training(options, faulty=("in a write", 2))
    assert process.wait(60) == -signal.SIGKILL, process.communicate()[1]
    process.communicate()
    # the half-written checkpoint is left behind
    assert list((tmp_path / "killed" / "checkpoints").glob("*.tmp-*"))
    finish(options)
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp-*"))


@pytest.mark.slow
def test_twenty_kills_at_random_moments(workplace, tmp_path):
    settings = KILLED | {"train.steps": 900}
    train_command.main(workplace("whole", **settings))
    options = workplace("killed", **settings)
    assert kill_at_random(options, tmp_path / "killed", kills=20, seed=1) == 20
    finish(options)
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_kill_at_every_point_of_a_step_and_a_save(ranks, workplace, tmp_path):
    """Each point is reached a few times before the kill, so that every start gets further than the one before."""
    settings = {
        "train.steps": 60,
        "train.checkpoint_every": 2,
        "lora.dropout": 0.1,
        "parallel.shard": "fsdp" if ranks else "none",
    }
    torchrun(ranks or 1, workplace("whole", **settings))
    options = workplace("killed", **settings)
    draw = random.Random(2)
    for point in faulty.POINTS:
        process = training(options, ranks, faulty=(point, draw.randint(3, 5)))
        out, err = process.communicate(timeout=120)
        assert process.returncode == (1 if ranks else -signal.SIGKILL), (point, out, err)
    process = training(options, ranks)
    assert process.wait(120) == 0, process.communicate()[1]
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_ten_kills_of_either_rank_under_torchruns_restarts(workplace, tmp_path):
    """torchrun restarts both ranks each time, and they resume from the newest checkpoint."""
    settings = KILLED | {"train.steps": 600, "parallel.shard": "fsdp"}
    torchrun(2, workplace("whole", **settings))
    draw = random.Random(3)
    run = tmp_path / "killed"
    process = training(
        workplace("killed", **settings), ranks=2, restarts=30, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    killed = 0
    while process.poll() is None and killed < 10:
        before = lines(run)
        wait_until(lambda before=before: lines(run) > before or process.poll() is not None, 120)
        time.sleep(draw.uniform(0, 0.4))
        pids = ranks_of(process)
        if len(pids) == 2:
            os.kill(draw.choice(pids), signal.SIGKILL)
            killed += 1
            wait_until(lambda pids=pids: not set(pids) & set(ranks_of(process)), 120)
    assert process.wait(240) == 0 and killed == 10
    assert_same_bits(tmp_path / "whole", run)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(autouse=True)
def signals_as_in_a_command():
    before = {s: signal.getsignal(s) for s in (*STOPPING, signal.SIGINT)}
    raise_when_stopped()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def on_call(monkeypatch, owner, name: str, count: int, act) -> None:
    """Calls `act` before the count-th call of owner.name."""
    original = getattr(owner, name)
    calls = 0

    def called(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


# a step has 4 micro-batches; there is an evaluation before step 1, and after steps 4, 8 and 12
SIGNALLED = {
    "train.steps": 12,
    "train.checkpoint_every": 100,
    "data.eval": 0.1,
    "train.eval_every": 4,
    "lora.dropout": 0.1,
}
# when the signal arrives -> (owner, name, which call), and the step that is saved
MOMENTS: dict[str, tuple[tuple[Any, str, int], int]] = {
    "in a forward": ((step, "batch_sums", 4 * 2 + 2), 3),
    "in an update": ((TrainableSet, "clip_gradients", 6), 6),
    "in an evaluation": ((loop, "evaluate", 2), 4),
    "in a save": ((checkpoint, "write_tensors", 1), 12),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_at_any_moment(moment, signum, workplace, tmp_path, monkeypatch):
    """The current step is finished and saved, the process ends, and the same command resumes to the same bits."""
    train_command.main(workplace("whole", **SIGNALLED))
    (owner, name, count), saved = MOMENTS[moment]
    with monkeypatch.context() as patch:
        on_call(patch, owner, name, count, lambda: signal.raise_signal(signum))
        # the only save is after the last step, when no step is left to skip
        if moment == "in a save":
            train_command.main(workplace("stopped", **SIGNALLED))
        else:
            with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else Terminated):
                train_command.main(workplace("stopped", **SIGNALLED))
            assert not (tmp_path / "stopped" / "adapter").exists()
    assert [path.name for path in checkpoint.published(tmp_path / "stopped" / "checkpoints")] == [f"step-{saved:08d}"]
    train_command.main(workplace("stopped", **SIGNALLED))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    "owner, name", [(build, "load_weights"), (checkpoint, "sha256_each"), (inputs, "prepare_store")]
)
def test_a_signal_while_loading_ends_at_once(owner, name, workplace, tmp_path, monkeypatch):
    """There is nothing to save."""
    on_call(monkeypatch, owner, name, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        train_command.main(workplace(**SIGNALLED))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, pytest.param(signal.SIGXCPU, marks=pytest.mark.slow)]
)
def test_schedulers_and_terminals_signals_save_too(signum, workplace, tmp_path):
    """The exit status is 128 and the signal's number, and other signals after it change nothing."""
    process = training(workplace(**SIGNALLED | {"train.steps": 2000}))
    wait_until(lambda: lines(tmp_path / "run") > 3)
    process.send_signal(signum)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    # both may have come within one step
    assert process.returncode in (128 + signum, 128 + signal.SIGUSR1), err
    assert f"{signal.Signals(process.returncode - 128).name}: stopped after step" in out and "Traceback" not in err
    (saved,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{lines_of(tmp_path / 'run')[-1]['step']:08d}"


def test_what_nohup_ignores_stays_ignored(workplace, tmp_path):
    settings = SIGNALLED | {"train.steps": 200}
    process = training(workplace(**settings), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until(lambda: lines(tmp_path / "run") > 3)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: stopped after step" in out, err


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on(workplace, tmp_path):
    """For longer than parallel.timeout, as by `docker pause`: torchrun and all ranks, wherever they are in a step."""
    settings = KILLED | {"train.steps": 100, "parallel.timeout": 10, "parallel.shard": "fsdp"}
    torchrun(2, workplace("whole", **settings))
    process = training(workplace(**settings), ranks=2)
    for lines_before in (5, 40):
        wait_until(lambda n=lines_before: lines(tmp_path / "run") > n)
        pids = [process.pid, *ranks_of(process)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(14)
        # those that wait are woken before those they wait for
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_does_not_join_a_collective_is_named(workplace, tmp_path):
    """Its process lives and reports, and its main thread hangs."""
    process = training(workplace(**{"train.steps": 50, "parallel.timeout": 10}), ranks=2, faulty=("hanging", 1))
    started = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert time.monotonic() - started < 80 and process.returncode == 1
    expected = r"minorca: rank 0 ends because it has waited for rank 1 \(process \d+ on .*last status: step [34]\)"
    assert re.search(expected, err), err


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_ranks_agree_on_the_step_to_stop_after(to_all, workplace, tmp_path):
    """SIGTERM is sent to torchrun, which forwards it, or to one rank alone."""
    settings = KILLED | {"train.steps": 400, "train.checkpoint_every": 1000}
    process = training(workplace(**settings), ranks=2)
    wait_until(lambda: lines(tmp_path / "run") > 20)
    started = time.monotonic()
    os.kill(process.pid if to_all else ranks_of(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    (saved,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert saved.name == f"step-{lines_of(tmp_path / 'run')[-1]['step']:08d}"
    assert "SIGTERM: stopped after step" in out
    assert "minorca: " not in err, err
    torchrun(2, workplace("whole", **settings))
    torchrun(2, workplace(**settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------- lost ranks


def test_a_rank_that_dies_is_named_by_the_others(workplace, tmp_path):
    process = training(workplace(**KILLED | {"train.steps": 5000}), ranks=2)
    wait_until(lambda: lines(tmp_path / "run") > 3)
    victim = ranks_of(process)[1]
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 30 and process.returncode == 1
    assert re.search(
        rf"minorca: rank 0 ends because rank 1 \(process {victim} on .*; last status: .*\) stopped responding",
        err,
    ), err


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_by_the_others(workplace, tmp_path):
    process = training(workplace(**KILLED | {"train.steps": 5000, "parallel.timeout": 10}), ranks=2)
    wait_until(lambda: lines(tmp_path / "run") > 3)
    victim = ranks_of(process)[1]
    os.kill(victim, signal.SIGSTOP)
    started = time.monotonic()
    # torchrun gives the stopped rank 30 seconds to end
    _, err = process.communicate(timeout=90)
    assert time.monotonic() - started < 60 and process.returncode == 1
    assert re.search(rf"minorca: rank 0 ends because rank 1 \(process {victim} on ", err), err


@pytest.mark.slow
def test_a_rank_that_reads_for_long_is_waited_for(workplace, tmp_path):
    """parallel.timeout limits collective operations, not how long a rank reads and loads."""
    process = training(workplace(**{"train.steps": 2, "parallel.timeout": 10}), ranks=2, faulty=("slow reading", 15))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_rank_that_dies_while_loading_is_named_by_the_others(workplace, tmp_path):
    process = training(workplace(), ranks=2, faulty=("while loading", 1))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"minorca: rank 0 ends because rank 1 \(process \d+ on .*; last status: .*\) stopped responding", err
    ), err


@pytest.mark.slow
def test_ranks_must_be_given_the_same(workplace, tmp_path):
    """Settings and files: a rank that trained on other rows would silently corrupt the run."""
    for point, key in (("other lr", "optim.lr"), ("other rows", "the rows")):
        process = training(workplace(), ranks=2, faulty=(point, 1))
        _, err = process.communicate(timeout=60)
        assert err.count("minorca: error: ") == 1, err
        assert f"minorca: error: the ranks differ in {key}; start all" in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_rank_cannot_do_is_said_once(workplace, tmp_path):
    """Whether one rank fails or all of them do: one line and no traceback."""
    no_model = {"model.path": tmp_path / "nowhere"}
    no_data = {"data.train": "nowhere.jsonl"}
    invalid = {"train.nonfinite": "never"}
    for settings in (no_model, no_data, *[invalid] * 4):
        process = training(workplace(**settings), ranks=2)
        _, err = process.communicate(timeout=60)
        assert err.count("minorca: ") == 1 and err.count("minorca: error: ") == 1, err
    # only one rank trains on the row
    process = training(workplace(), ranks=2, faulty=("nan loss", 3))
    _, err = process.communicate(timeout=60)
    assert err.count("minorca: error: ") == 1 and not re.search(r'File "[^"]*minorca/', err), err


# ----------------------------------------------------------------------------------------- disks, NaN, two runs at once


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_full_disk_costs_no_checkpoint(share, workplace, tmp_path, monkeypatch):
    """At any byte of a save: an error, nothing half-written, the previous checkpoint intact, and a run that resumes."""
    settings = {"train.steps": 4, "train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings))
    largest = (tmp_path / "whole" / "checkpoints" / "step-00000002" / "optimizer.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors = checkpoint.write_tensors
    saves = 0

    def save_to_full_disk(*arguments):
        nonlocal saves
        saves += 1
        if saves == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), limits[1]))
        write_tensors(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="step-00000004: cannot be written .*nothing half-written was left"),
    ):
        patch.setattr(checkpoint, "write_tensors", save_to_full_disk)
        try:
            train_command.main(workplace(**settings))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    train_command.main(workplace(**settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_is_full_between_saves(workplace, tmp_path):
    """Whichever file a step writes to first: one error, and the same command resumes."""
    settings = {"train.steps": 6, "train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    record_step = metrics.Record.step

    def record_to_full_disk(record, number, *rest):
        if number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        record_step(record, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="run: .*what was saved is intact"):
        patch.setattr(metrics.Record, "step", record_to_full_disk)
        try:
            train_command.main(workplace(**settings))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train_command.main(workplace(**settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


NONFINITE = {"train.steps": 6, "train.checkpoint_every": 1, "lora.dropout": 0.1}


@pytest.fixture
def make_nan(monkeypatch):
    """make_nan(kind, row): for the rest of the test, the row's loss or gradient is NaN."""

    def make(kind: str, row: int) -> None:
        # undone after the test
        monkeypatch.setattr(step, "make_batch", step.make_batch)
        monkeypatch.setattr(step, "batch_sums", step.batch_sums)
        faulty.make_nan(kind, row)

    return make


@pytest.mark.parametrize("kind", ["nan loss", "nan gradient"])
def test_what_is_no_number_stops_the_run_before_the_update(kind, make_nan, workplace, tmp_path):
    """The error names the step, the rank and the rows; the last checkpoint is intact."""
    train_command.main(workplace("whole", **NONFINITE))
    make_nan(kind, 7)
    expected = r"step (\d): the loss is .*from rank 0, .*rows .*rows.jsonl, line 8\b"
    with pytest.raises(UserError, match=expected) as error:
        train_command.main(workplace(**NONFINITE))
    found = re.search(expected, str(error.value))
    assert found
    step = int(found[1])
    kept = checkpoint.published(tmp_path / "run" / "checkpoints")
    assert step > 1 and kept[-1].name == f"step-{step - 1:08d}"
    assert checkpoint.verify(kept[-1]).updates == step - 1
    before, after = lines_of(tmp_path / "whole"), lines_of(tmp_path / "run")
    assert [line["loss"] for line in after] == [line["loss"] for line in before[: step - 1]]


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_what_is_no_number_can_be_skipped(make_nan, workplace, tmp_path, monkeypatch):
    """The step changes neither adapter nor optimizer, its line is marked, and such a run resumes exactly too."""
    make_nan("nan gradient", 7)
    settings = NONFINITE | {"train.nonfinite": "skip"}
    train_command.main(workplace("whole", **settings))
    run = lines_of(tmp_path / "whole")
    (skipped,) = [n for n, line in enumerate(run) if line.get("skipped")]
    assert run[skipped]["grad_norm"] is None and len(run) == 6 and skipped + 1 < 6
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, metrics.Record, "step", skipped + 2, raise_interrupt)
        train_command.main(workplace("stopped", **settings))
    assert checkpoint.verify(checkpoint.published(tmp_path / "stopped" / "checkpoints")[-1]).updates == skipped
    train_command.main(workplace("stopped", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_of_two_ranks_the_one_with_the_nan_is_named(workplace, tmp_path):
    process = training(workplace(**NONFINITE | {"parallel.shard": "fsdp"}), ranks=2, faulty=("nan loss", 7))
    _, err = process.communicate(timeout=60)
    assert err.count("minorca: error: ") == 1
    found = re.search(r"minorca: error: step \d: the loss is nan .*from rank (\d), .*line 8\b", err)
    assert found, err
    config = cli.parse_config(cli.config_parser("", ""), workplace(**NONFINITE))[1]
    store, _ = inputs.read_data(config, *inputs.read_tokenizer(config))
    steps = plan_epoch(store.lengths, 128, 4, True, 0, 0)
    (micro_batch,) = [index for step in steps for index, rows in enumerate(step) if 7 in rows]
    assert int(found[1]) == micro_batch % 2


HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_two_runs_cannot_write_one_output(workplace, tmp_path):
    """The lock ends with the process that holds it, even if it was killed."""
    train_command.main(workplace(**{"train.steps": 1}))
    command = [sys.executable, "-c", HOLD_LOCK, tmp_path / "run" / ".lock"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"train.output is .*run, where another run writes \(process \d+ on .*\)"):
        train_command.main(workplace(**{"train.steps": 1}))
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    holder.kill()
    holder.communicate()
    train_command.main(workplace(**{"train.steps": 1}))
