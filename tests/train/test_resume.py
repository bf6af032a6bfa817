"""Resuming gives the same bits as never stopping; damaged checkpoints and those of another run are refused."""

import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from minorca import UserError
from minorca.files.atomic import write_manifest
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, loop, metrics
from tests.helpers import assert_same_bits, lines_of

STOPPED = {"train.steps": 16, "train.checkpoint_every": 4, "lora.dropout": 0.1, "data.eval": 0.1, "train.eval_every": 6}


def stop_in(step: int, options: list[str], monkeypatch) -> None:
    """Starts a run that is interrupted when it records this step."""
    record_step = metrics.Record.step

    def stop(record, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        record_step(record, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics.Record, "step", stop)
        train_command.main(options)


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.published(run / "checkpoints")]


def test_stopped_three_times_it_is_as_if_never(workplace, tmp_path, monkeypatch):
    """Resuming a resumed run is exact too (compare huggingface/datasets#8308)."""
    train_command.main(workplace("whole", **STOPPED))
    for step in (7, 10, 14):
        stop_in(step, workplace("stopped", **STOPPED), monkeypatch)
    train_command.main(workplace("stopped", **STOPPED))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    assert steps_of(tmp_path / "stopped") == [12, 16]


def test_mixed_sources_resume_in_the_middle_of_an_epoch(workplace, tmp_path, monkeypatch):
    """Sources with weights, whose rows are drawn anew in each epoch."""
    sources = f"[{{path: {tmp_path / 'rows.jsonl'}, weight: 1.5}}, {{path: {tmp_path / 'more.jsonl'}, weight: 0.4}}]"
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "more.jsonl")
    settings = {"data.train": sources, "train.epochs": 3, "train.checkpoint_every": 5}
    train_command.main(workplace("whole", **settings))
    stop_in(18, workplace("stopped", **settings), monkeypatch)
    train_command.main(workplace("stopped", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_nothing_is_unpickled(workplace, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    stop_in(7, workplace(**STOPPED), monkeypatch)
    train_command.main(workplace(**STOPPED))
    assert len([line for line in lines_of(tmp_path / "run") if "loss" in line]) == 16


# --------------------------------------------------------------------------------------------- another run's checkpoint


@pytest.fixture
def refused(workplace):
    """refused(**settings): the error message of a second run in the same output directory."""

    def second(**settings):
        with pytest.raises(UserError) as error:
            train_command.main(workplace(**{"train.steps": 2} | settings))
        return str(error.value)

    train_command.main(workplace(**{"train.steps": 2}))
    return second


def test_other_settings_do_not_resume(refused):
    message = refused(**{"lora.rslora": "true", "train.seed": 3})
    assert "lora.rslora was False in the checkpoint and is True" in message
    assert "train.seed was 0 in the checkpoint and is 3" in message
    assert "holds checkpoints and train.resume is never" in refused(**{"train.resume": "never"})


def rewrite_state(directory: Path, change) -> None:
    """Changes a checkpoint's state, and its manifest accordingly, to what another version would have written."""
    path = directory / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    (directory / "MANIFEST.json").unlink()
    write_manifest(directory)


@pytest.fixture
def stopped(workplace, tmp_path, monkeypatch):
    """stopped(change): the options of a run of 4 steps that was stopped, its checkpoint of step 2 then changed."""

    def stop(change, **settings) -> list[str]:
        settings = {"train.steps": 4, "train.checkpoint_every": 2, "lora.dropout": 0.1} | settings
        options = workplace(**settings)
        stop_in(3, options, monkeypatch)
        rewrite_state(tmp_path / "run" / "checkpoints" / "step-00000002", change)
        return options

    return stop


def test_an_earlier_versions_checkpoint_is_refused(stopped, tmp_path):
    """Earlier checkpoints have no format number."""
    options = stopped(lambda state: state.pop("format"))
    message = "state.json: the checkpoint has no format number: an earlier version of minorca wrote it; finish the run"
    with pytest.raises(UserError, match=message):
        train_command.main(options)


@pytest.mark.parametrize("key", ["lora.rslora", "data.template", "lora.alpha", "data.limit"])
def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(key, stopped, workplace, tmp_path):
    """As if a later version had added it: the run resumes to the same bits; another value is refused."""
    train_command.main(workplace("whole", **{"train.steps": 4, "lora.dropout": 0.1}))
    options = stopped(lambda state: state["run"].pop(key))
    other = {"lora.rslora": "true", "data.template": "chatml", "lora.alpha": "16", "data.limit": "40"}[key]
    with pytest.raises(UserError) as caught:
        train_command.main([*options, f"--{key}", other])
    assert any(problem.field == key and "in the checkpoint" in problem.message for problem in caught.value.problems)
    train_command.main(options)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.update(format=2), "has format 2; this version of minorca reads format 1"),
        (lambda state: state.update(scaler=1.0), "has ['scaler'], unknown to this version"),
        (
            lambda state: state["run"].update({"train.ahead": 7, "the base's experts": 8, "lora.rank": 8}),
            "has the base's experts, train.ahead, unknown to this version",
        ),
    ],
)
def test_a_newer_versions_checkpoint_is_refused_as_such(change, said, stopped):
    """In one line, which does not send the user to an older checkpoint, or to remove this one."""
    options = stopped(change)
    for resume in ("auto", "last-good"):
        with pytest.raises(UserError) as caught:
            train_command.main([*options, f"--train.resume={resume}"])
        (problem,) = caught.value.problems
        assert problem.message.startswith("a newer version of minorca wrote the checkpoint: it ")
        assert said in problem.message and "finish the run with the version that began it" in problem.message
        assert problem.advice is None


def test_a_base_in_other_files_is_no_newer_version(stopped):
    options = stopped(lambda state: state["run"].update({"the base's model-00002-of-00002.safetensors's sha256": "12"}))
    with pytest.raises(UserError, match="sha256 was '12' in the checkpoint and is None now; set it back"):
        train_command.main(options)


def other_rows(directory: Path) -> None:
    rows = (directory / "rows.jsonl").read_text().splitlines(keepends=True)
    (directory / "rows.jsonl").write_text("".join(rows[:-1]))


def other_weights(directory: Path) -> None:
    path = next(directory.glob("model-*/model.safetensors"))
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)


def other_network(directory: Path) -> None:
    path = next(directory.glob("model-*/config.json"))
    path.write_text(path.read_text().replace('"sliding_window": 24', '"sliding_window": 25'))


def other_tokenizer(directory: Path) -> None:
    path = next(directory.glob("model-*/tokenizer_config.json"))
    path.write_text(
        '{"eos_token": "<|im_end|>", "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"}'
    )


@pytest.mark.parametrize(
    "change, complaint",
    [
        (other_rows, "the rows' sha256 was"),
        (other_weights, "the base's model.safetensors's sha256 was"),
        (other_network, "the base's window was 24 in the checkpoint and is 25"),
        (other_tokenizer, "the rows' sha256 was"),
    ],
)
def test_another_base_or_other_rows_do_not_resume(change, complaint, refused, tmp_path):
    change(tmp_path)
    assert complaint in refused()


def test_a_run_resumes_wherever_its_files_have_moved(workplace, tmp_path):
    """The base model and the rows are identified by their content."""
    train_command.main(workplace(**{"train.steps": 2}))
    model = next(tmp_path.glob("model-*"))
    shutil.copytree(model, tmp_path / "moved")
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train_command.main(
        workplace(**{"train.steps": 2, "model.path": tmp_path / "moved", "data.train": tmp_path / "moved.jsonl"})
    )
    assert (tmp_path / "run" / "adapter").is_dir()


def test_the_adapter_a_run_began_with_is_known_by_its_content(workplace, tmp_path, monkeypatch):
    """It may move, and another one is refused."""
    train_command.main(workplace("first", **{"train.steps": 1}))
    train_command.main(workplace("other", **{"train.steps": 2}))
    settings = {"train.steps": 6, "train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings, **{"lora.init": tmp_path / "first" / "adapter"}))
    stop_in(4, workplace("stopped", **settings, **{"lora.init": tmp_path / "first" / "adapter"}), monkeypatch)
    (tmp_path / "first" / "adapter").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="the initial adapter's sha256 was"):
        train_command.main(workplace("stopped", **settings, **{"lora.init": tmp_path / "other" / "adapter"}))
    train_command.main(workplace("stopped", **settings, **{"lora.init": tmp_path / "moved"}))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_that_began_from_a_path_goes_on_from_its_own(workplace, tmp_path, monkeypatch):
    """The same command resumes from the run's own checkpoint, as a restart by torchrun needs."""
    settings = {"train.steps": 8, "train.checkpoint_every": 2, "train.keep": 9}
    train_command.main(workplace("whole", **settings))
    settings["train.resume"] = tmp_path / "whole" / "checkpoints" / "step-00000002"
    stop_in(7, workplace("branch", **settings), monkeypatch)
    train_command.main(workplace("branch", **settings))
    whole = [line["loss"] for line in lines_of(tmp_path / "whole")]
    assert [line["loss"] for line in lines_of(tmp_path / "branch")] == whole[2:]


def test_a_finished_run_without_its_checkpoints_is_not_written_over(workplace, tmp_path):
    train_command.main(workplace(**{"train.steps": 2}))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="holds a finished run's adapter and no checkpoint"):
        train_command.main(workplace(**{"train.steps": 2, "optim.lr": 0.5}))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_other_threads_are_told(workplace, tmp_path, monkeypatch, caplog):
    """Another number of threads, which changes the order of sums, is logged."""
    stop_in(3, workplace(**{"train.steps": 4, "train.checkpoint_every": 1}), monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train_command.main(workplace(**{"train.steps": 4, "train.checkpoint_every": 1}))
    assert "it was written with 1 threads, this process has 7" in caplog.text


def test_lines_that_no_run_wrote_are_dropped(workplace, tmp_path, monkeypatch):
    stop_in(3, workplace(**{"train.steps": 4, "train.checkpoint_every": 1}), monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n[1]\n{"step": "x"}\n\xff\n{"step": 9, "lo')
    train_command.main(workplace(**{"train.steps": 4, "train.checkpoint_every": 1}))
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_going_back_needs_the_later_checkpoints_gone(refused, workplace, tmp_path):
    """A refused run changes nothing."""
    train_command.main(workplace("long", **{"train.steps": 4, "train.checkpoint_every": 1}))
    before = (tmp_path / "long" / "metrics.jsonl").read_text()
    earlier = tmp_path / "long" / "checkpoints" / "step-00000003"
    with pytest.raises(UserError, match="step-00000004: is later than step-00000003"):
        train_command.main(workplace("long", **{"train.steps": 4, "train.resume": earlier}))
    assert (tmp_path / "long" / "metrics.jsonl").read_text() == before
    shutil.rmtree(earlier.with_name("step-00000004"))
    shutil.rmtree(tmp_path / "long" / "adapter")
    train_command.main(workplace("long", **{"train.steps": 4, "train.resume": earlier}))
    expected = [json.loads(line)["loss"] for line in before.splitlines()]
    assert [line["loss"] for line in lines_of(tmp_path / "long")] == expected


# ------------------------------------------------------------------------------------------------ going on differently

CONSTANT = {"optim.schedule": "constant", "train.checkpoint_every": 3, "lora.dropout": 0.1}


def test_a_finished_run_goes_on_for_more_epochs(workplace, tmp_path, caplog):
    """At a constant rate to the bits of a run of all epochs; the new total is logged, the first adapter is kept."""
    caplog.set_level("INFO")
    train_command.main(workplace("whole", **CONSTANT | {"train.epochs": 2.5}))
    train_command.main(workplace(**CONSTANT | {"train.epochs": 1}))
    steps = len(lines_of(tmp_path / "run"))
    first = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    caplog.clear()
    train_command.main(workplace(**CONSTANT | {"train.epochs": 2.5}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert f"train.epochs: was 1.0 up to step {steps}, is 2.5 from here on" in caplog.text
    aside = tmp_path / "run" / f"adapter-before-step-{steps + 1:08d}"
    assert (aside / "adapter_model.safetensors").read_bytes() == first
    assert "epochs: 2.5" in (tmp_path / "run" / "config.yaml").read_text()
    caplog.clear()
    train_command.main(workplace(**CONSTANT | {"train.epochs": 2.5}))
    assert "steps are done; nothing to do" in caplog.text and "from here on" not in caplog.text


def test_a_run_that_goes_on_is_not_finished_before_its_end(workplace, tmp_path, monkeypatch):
    """Killed between its last checkpoint and its adapter: the adapter of the shorter run is not taken for its own."""
    train_command.main(workplace("whole", **CONSTANT | {"train.steps": 6}))
    train_command.main(workplace(**CONSTANT | {"train.steps": 3}))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Run, "finish", lambda *_: 1 / 0)
        train_command.main(workplace(**CONSTANT | {"train.steps": 6}))
    train_command.main(workplace(**CONSTANT | {"train.steps": 6}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_the_learning_rate_follows_the_new_total(workplace, tmp_path):
    settings = {"train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings, **{"train.steps": 6}))
    train_command.main(workplace(**settings, **{"train.steps": 4}))
    train_command.main(workplace(**settings, **{"train.steps": 6}))
    rates, expected = ([line["lr"] for line in lines_of(tmp_path / name)] for name in ("run", "whole"))
    assert rates[4:] == expected[4:] and rates[1:4] != expected[1:4]


CHANGES = {
    "optim.lr": "0.003",
    "optim.betas": "[0.8, 0.9]",
    "optim.eps": "1e-7",
    "optim.weight_decay": "0.1",
    "optim.warmup_steps": "3",
    "optim.warmup_ratio": "0.2",
    "optim.schedule": "linear",
    "optim.min_lr": "0.001",
    "optim.max_grad_norm": "0.5",
    "lora.dropout": "0.2",
}


def test_what_a_resumed_run_may_change_is_named_and_used(workplace, tmp_path, monkeypatch, caplog):
    """The steps before it stay as they are, those after it are others; they are of the same rows."""
    caplog.set_level("INFO")
    settings = {"train.steps": 5, "train.checkpoint_every": 3}
    train_command.main(workplace("whole", **settings))
    stop_in(4, workplace("stopped", **settings), monkeypatch)
    whole = lines_of(tmp_path / "whole")
    for key, value in CHANGES.items():
        caplog.clear()
        shutil.copytree(tmp_path / "stopped", tmp_path / key)
        train_command.main(workplace(key, **settings, **{key: value}))
        assert re.search(rf"{key}: was .* up to step 3, is .* from here on", caplog.text), key
        assert caplog.text.count("from here on") == 1, key
        lines = lines_of(tmp_path / key)
        assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in whole[:3]]
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in whole]
        # eps alone changes less than a loss shows
        assert lines[3:] != whole[3:] and (lines[4]["loss"] != whole[4]["loss"] or key == "optim.eps"), key


@pytest.mark.parametrize(
    "change",
    [
        {"train.micro_batch_tokens": 64, "data.seq_len": 64},
        {"train.batch_tokens": 256},
        {"data.packing": "false"},
        {"train.seed": 1},
        {"data.limit": 30},
    ],
)
def test_where_the_order_of_the_rows_changes_the_way_is_named(change, refused, workplace, tmp_path):
    """It works: a checkpoint's directory is an adapter to start from."""
    directory = tmp_path / "run" / "checkpoints" / "step-00000002"
    message = refused(**change)
    for key in change:
        assert f"{key} was " in message
    assert f"start another run from what was trained: another train.output, and lora.init {directory}" in message
    evaluated = {"data.eval": tmp_path / "rows.jsonl", "data.limit": 30}
    train_command.main(workplace("next", **{"train.steps": 1, "lora.init": directory} | change | evaluated))
    train_command.main(
        workplace("same", **{"train.steps": 1, "lora.init": tmp_path / "run" / "adapter"} | change | evaluated)
    )
    assert lines_of(tmp_path / "next")[0]["eval_loss"] == lines_of(tmp_path / "same")[0]["eval_loss"]


def test_where_the_adapter_would_not_fit_no_way_is_named(refused):
    assert "lora.init" not in refused(**{"lora.rank": 5}) and "lora.init" not in refused(**{"lora.alpha": 5})


def test_a_run_shorter_than_what_was_trained_is_refused(refused):
    message = "train.steps is 1, a run of 1 steps, and its checkpoint is of step 2; set it higher, or choose another"
    assert message in refused(**{"train.steps": 1})
    message = "train.epochs is 0.01, a run of 1 steps, and its checkpoint is of step 2"
    assert message in refused(**{"train.steps": "null", "train.epochs": 0.01})


# -------------------------------------------------------------------------------------------------- damaged checkpoints


def truncate(newest: Path, older: Path | None = None) -> Path:
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def flip(newest: Path, older: Path) -> Path:
    path = newest / "optimizer.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    return path


def stale(newest: Path, older: Path) -> Path:
    shutil.copy(older / "adapter_model.safetensors", newest)
    return newest / "adapter_model.safetensors"


def swap(newest: Path, older: Path) -> Path:
    (newest / "optimizer.safetensors").rename(newest / "x")
    (newest / "adapter_model.safetensors").rename(newest / "optimizer.safetensors")
    (newest / "x").rename(newest / "adapter_model.safetensors")
    return newest / "adapter_model.safetensors"


def lose(newest: Path, older: Path) -> str:
    (newest / "state.json").unlink()
    return "MANIFEST.json: missing files: ['state.json']"


def add(newest: Path, older: Path) -> str:
    (newest / "pytorch_model.bin").write_bytes(b"")
    return "MANIFEST.json: unexpected files: ['pytorch_model.bin']"


def link_to_nothing(newest: Path, older: Path) -> str:
    (newest / "state.json").unlink()
    (newest / "state.json").symlink_to("gone")
    return "state.json: broken symbolic link"


def lose_the_manifest(newest: Path, older: Path) -> str:
    (newest / "MANIFEST.json").unlink()
    return "missing MANIFEST.json"


def empty_the_manifest(newest: Path, older: Path) -> str:
    (newest / "MANIFEST.json").write_text("")
    return "MANIFEST.json, line 1: not valid JSON"


DAMAGED = {"train.steps": 4, "train.checkpoint_every": 2}


@pytest.fixture
def damaged(workplace, tmp_path):
    """damaged(how): the error of resuming from a checkpoint damaged by `how`, and what `how` expects it to contain.

    The same run, undamaged, is in whole/.
    """

    def damage(how) -> tuple[str, str]:
        train_command.main(workplace(**DAMAGED))
        newest, older = (tmp_path / "run" / "checkpoints" / f"step-0000000{n}" for n in (4, 2))
        expected = how(newest, older)
        with pytest.raises(UserError) as error:
            train_command.main(workplace(**DAMAGED))
        return str(error.value), str(expected)

    train_command.main(workplace("whole", **DAMAGED))
    return damage


@pytest.mark.parametrize(
    "how", [truncate, flip, stale, swap, lose, add, link_to_nothing, lose_the_manifest, empty_the_manifest]
)
def test_a_damaged_checkpoint_is_named_and_fallen_back_from_only_when_asked(how, damaged, workplace, tmp_path):
    message, expected = damaged(how)
    assert expected in message and "set train.resume to last-good" in message
    if expected.startswith("/"):
        assert "does not match the manifest (expected {'bytes': " in message and "got {'bytes': " in message
    train_command.main(workplace(**DAMAGED, **{"train.resume": "last-good"}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    (set_aside,) = (tmp_path / "run" / "checkpoints").glob("damaged-*")
    assert set_aside.name[:21] == "damaged-step-00000004"


def test_where_none_is_undamaged_nothing_starts_over(damaged, workplace, tmp_path):
    damaged(flip)
    truncate(tmp_path / "run" / "checkpoints" / "step-00000002")
    with pytest.raises(UserError, match="none of its 2 checkpoints is undamaged"):
        train_command.main(workplace(**DAMAGED, **{"train.resume": "last-good"}))


def test_of_two_hundred_flipped_bits_none_goes_unseen(workplace, tmp_path):
    train_command.main(workplace(**{"train.steps": 1}))
    (directory,) = checkpoint.published(tmp_path / "run" / "checkpoints")
    checkpoint.verify(directory)
    files = sorted(directory.iterdir())
    draw = random.Random(0)
    for n in range(200):
        path = files[n % len(files)]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{directory}/"):
            checkpoint.verify(directory)
        path.write_bytes(whole)
    checkpoint.verify(directory)


def test_a_damaged_checkpoint_counts_for_none(workplace, tmp_path, caplog):
    """`keep` counts undamaged checkpoints: a good one is not removed because a damaged one is newer."""
    settings = {"train.steps": 4, "train.checkpoint_every": 1, "train.keep": 9}
    train_command.main(workplace(**settings))
    directory = tmp_path / "run" / "checkpoints"
    truncate(directory / "step-00000003")
    checkpoint.prune(directory, keep=2)
    assert steps_of(tmp_path / "run") == [2, 3, 4]
    assert f"{directory / 'step-00000003' / 'optimizer.safetensors'}: does not match the manifest" in caplog.text


def test_an_older_one_goes_only_after_the_newer_is_verified(workplace, tmp_path, monkeypatch):
    """If a new checkpoint is damaged on the disk, no older one is removed."""
    publish = checkpoint.publish
    settings = {"train.steps": 3, "train.checkpoint_every": 1, "train.keep": 1}

    def publish_damaged(directory, *rest):
        publish(directory, *rest)
        truncate(directory)

    train_command.main(workplace(**settings))
    assert steps_of(tmp_path / "run") == [3]
    monkeypatch.setattr(checkpoint, "publish", publish_damaged)
    train_command.main(workplace("bad", **settings))
    assert steps_of(tmp_path / "bad") == [1, 2, 3]


@pytest.mark.cuda
def test_on_a_gpu_the_deterministic_mode_resumes_to_the_same_bits(workplace, tmp_path, monkeypatch):
    settings = STOPPED | {"train.deterministic": "true", "model.dtype": "bfloat16"}
    try:
        train_command.main(workplace("whole", **settings))
        for step in (7, 10):
            stop_in(step, workplace("stopped", **settings), monkeypatch)
        train_command.main(workplace("stopped", **settings))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
