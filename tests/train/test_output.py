"""A run touches only what it made: foreign directories are refused, foreign files among a run's are left alone."""

import json
import shutil
from pathlib import Path

import pytest

from minorca import UserError, cli
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, loop, output
from tests.helpers import assert_same_bits, lines_of
from tests.train.test_resume import stop_in

SHORT = {"train.steps": 4, "train.checkpoint_every": 2}
COMMENTED = "# mine\nmodel:\n  path: elsewhere  # by hand\n"


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every entry below a directory, and the bytes of files."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


FOREIGN = {
    "config.yaml": COMMENTED,
    "metrics.jsonl": '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n',
    ".lock": "held by another tool\n",
    "run.json": '{"id": "of another tool"}\n',
    "notes.tmp-old/notes.txt": "mine",
    "adapter/adapter_config.json": "{}",
    "checkpoints/best/model.pt": "mine",
    "checkpoints/step-00000001/model.pt": "mine",
    "checkpoints/mine.tmp-1/notes.txt": "mine",
    "curves.png": "mine",
}


@pytest.mark.parametrize("dry", [False, True])
def test_a_foreign_directory_is_refused_before_anything_is_read(dry, workplace, tmp_path):
    # there are no data
    options = [*workplace(**SHORT, **{"data.train": "nowhere.jsonl"}), *["--dry-run"][:dry]]
    for name, text in FOREIGN.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        before = contents(tmp_path / "run")
        with pytest.raises(UserError) as caught:
            train_command.main(options)
        (problem,) = caught.value.problems
        assert problem.path == tmp_path / "run" and name.partition("/")[0] in str(problem)
        assert "choose another train.output" in str(problem)
        assert contents(tmp_path / "run") == before
        shutil.rmtree(tmp_path / "run")


def test_a_directory_with_what_the_system_put_there_is_taken(workplace, tmp_path):
    """By a file system, a scheduler or `| tee`; it stays as it is."""
    run = tmp_path / "run"
    names = ["lost+found/x", ".nfs0000123", ".DS_Store", ".gitignore", "slurm-1.out", "slurm-1.err", "train.log"]
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("theirs")
    (run / "model").write_text("mine")
    with pytest.raises(UserError, match="run: is not empty, and what it holds is no run of minorca: model; choose"):
        train_command.main(workplace(**SHORT))
    (run / "model").unlink()
    train_command.main(workplace(**SHORT))
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4]
    assert all((run / name).read_text() == "theirs" for name in names)


def test_a_start_that_was_killed_as_it_wrote_its_first_file(workplace, tmp_path, monkeypatch):
    """It leaves a lock, and a part of run.json; while it lives, another start says so."""
    run = tmp_path / "run"

    def kill(*_):
        # as SIGKILL, which no `finally` outlives
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "replace", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        train_command.main(workplace(**SHORT))
    left = {path.name for path in run.iterdir()}
    assert len(left) == 2 and ".lock" in left and any(name.startswith("run.json.tmp-") for name in left)
    with output.output_lock(run), pytest.raises(UserError, match="where another run writes"):
        train_command.main(workplace(**SHORT))
    train_command.main(workplace(**SHORT))
    assert not list(run.glob("*.tmp-*"))


DAMAGED = {
    "": "is damaged",
    "{": "is damaged",
    '{"format": 1, "id": "ID", "made": null, "config_sha256": []}': "is damaged",
    '{"format": 2, "id": "ID", "made": [], "config_sha256": []}': "was written by a newer version of minorca",
    '{"format": 1, "id": "ID", "made": [], "config_sha256": [], "new": 1}': "was written by a newer version of minorca",
}


def test_a_run_whose_file_is_damaged_or_newer(workplace, tmp_path, monkeypatch):
    """Checkpoints lie beside it. Without it the run goes on, as one of an earlier version."""
    file = tmp_path / "run" / "run.json"
    stop_in(3, workplace(**SHORT), monkeypatch)
    for text, message in DAMAGED.items():
        file.write_text(text.replace("ID", "0123456789abcdef" * 2))
        with pytest.raises(UserError, match=f"run.json: {message}"):
            train_command.main(workplace(**SHORT))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="run.json: is a link"):
        train_command.main(workplace(**SHORT))
    file.unlink()
    stop_in(4, workplace(**SHORT), monkeypatch)
    assert file.exists() and [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]


def test_names_of_a_run_that_are_of_another_kind(workplace, tmp_path, monkeypatch):
    """Files for directories and the other way around, and links that lead nowhere: refused by name before all else."""
    run = tmp_path / "run"
    stop_in(3, workplace(**SHORT), monkeypatch)
    for name in ("metrics.jsonl", "checkpoints", "tensorboard", "adapter", "config.yaml"):
        kind = "file" if "." in name else "directory"
        if (run / name).exists():
            (run / name).rename(tmp_path / name)
        (run / name).symlink_to("nowhere")
        for dry in ([], ["--dry-run"]):
            with pytest.raises(UserError, match=f"{name}: is not a {kind}, which a run makes there; move it away"):
                train_command.main([*workplace(**SHORT), *dry])
        (run / name).unlink()
        if (tmp_path / name).exists():
            (tmp_path / name).rename(run / name)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: is not a file"):
        train_command.main([*workplace(**SHORT), "--dry-run"])
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="train.output is .*dangling, but .*dangling is not a writable directory"):
        train_command.main(workplace("dangling", **SHORT))


def test_what_others_put_beside_a_runs_files_stays(workplace, tmp_path, monkeypatch):
    """Through a resume, an end and a continuation, while what the run itself left half-written goes."""
    run = tmp_path / "run"
    train_command.main(workplace("whole", **SHORT | {"train.steps": 6}))
    stop_in(3, workplace(**SHORT), monkeypatch)
    own = f"tmp-{json.loads((run / 'run.json').read_text())['id']}"
    for name in (f"adapter.{own}abc", f"checkpoints/step-00000004.{own}abc"):
        (run / name).mkdir()
        (run / name / "half").write_text("x")
    (run / f"config.yaml.{own}abc").write_text("half")
    uuid = "0123456789abcdef" * 2
    foreign = {
        "notes.tmp-old/notes.txt",
        f"checkpoints/step-00000003.tmp-{uuid}/notes.txt",
        "checkpoints/mine.tmp-1/notes.txt",
        "checkpoints/step-00000000/notes.txt",
        "config.tmp",
        "metrics.tmp",
        "adapter-before-step-00000005/notes.txt",
    }
    for name in foreign:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    train_command.main(workplace(**SHORT))
    train_command.main(workplace(**SHORT | {"train.steps": 6}))
    assert {name for name in foreign if (run / name).read_text() == "mine"} == foreign
    assert not list(run.rglob(f"*.{own}*"))
    assert len(list(run.glob("adapter-before-step-00000005*"))) == 2
    assert [line["tokens"] for line in lines_of(run)] == [line["tokens"] for line in lines_of(tmp_path / "whole")]


@pytest.mark.parametrize("how", ["directory", "link"])
def test_an_outcome_of_somebody_else_is_set_aside(how, workplace, tmp_path, monkeypatch):
    """One that appears while the run trains, or a link that leads to none yet."""
    finish = loop.Run.finish
    mine = tmp_path / ("run/adapter" if how == "directory" else "elsewhere")

    def finish_later(self):
        if how == "link":
            (tmp_path / "run" / "adapter").symlink_to(mine)
        else:
            mine.mkdir()
            (mine / "notes.txt").write_text("mine")
        finish(self)

    monkeypatch.setattr(loop.Run, "finish", finish_later)
    train_command.main(workplace(**SHORT))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    (aside,) = (tmp_path / "run").glob("adapter-before-*")
    if how == "link":
        assert aside.readlink() == mine and not mine.exists()
    else:
        assert (aside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("earlier", [False, True])
def test_a_configuration_that_was_edited_is_not_rewritten(earlier, workplace, tmp_path, monkeypatch):
    """The resolved settings are written beside it; one that was not edited is replaced."""
    run = tmp_path / "run"
    stop_in(3, workplace(**SHORT), monkeypatch)
    if earlier:
        (run / "run.json").unlink()
    edited = "# a comment\n" + (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(edited)
    train_command.main([*workplace(**SHORT), "--config", str(run / "config.yaml"), "--optim.lr", "0.02"])
    assert (run / "config.yaml").read_text() == edited
    assert "lr: 0.02" in (run / "config.resolved.yaml").read_text()


def test_settings_that_were_edited_on_both_sides_are_not_rewritten(workplace, tmp_path, monkeypatch):
    """config.resolved.yaml beside an edited config.yaml: one that a person wrote, and the run's, edited."""
    run = tmp_path / "run"
    resolved = run / "config.resolved.yaml"
    stop_in(3, workplace(**SHORT), monkeypatch)
    (run / "config.yaml").write_text(COMMENTED)
    for _ in range(2):
        edited = "# my notes\n" + (resolved.read_text() if resolved.exists() else "")
        resolved.write_text(edited)
        for dry in ([], ["--dry-run"]):
            with pytest.raises(UserError, match="config.resolved.yaml: is not as the run wrote it.*; move it away"):
                train_command.main([*workplace(**SHORT), *dry])
        assert resolved.read_text() == edited and (run / "config.yaml").read_text() == COMMENTED
        resolved.unlink()
        stop_in(4, workplace(**SHORT), monkeypatch)
        # one that was not edited is replaced
        stop_in(4, workplace(**SHORT | {"optim.lr": 0.02}), monkeypatch)
        assert "lr: 0.02" in resolved.read_text()


def test_a_configuration_that_is_a_link_is_not_written_through(workplace, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_in(3, workplace(**SHORT), monkeypatch)
    (run / "config.yaml").rename(tmp_path / "mine.yaml")
    (run / "config.yaml").symlink_to("../mine.yaml")
    mine = (tmp_path / "mine.yaml").read_bytes()
    stop_in(4, workplace(**SHORT | {"optim.lr": 0.02}), monkeypatch)
    assert (tmp_path / "mine.yaml").read_bytes() == mine and (run / "config.yaml").is_symlink()
    assert "lr: 0.02" in (run / "config.resolved.yaml").read_text()


def test_a_run_of_an_earlier_version_goes_on(workplace, tmp_path, monkeypatch):
    """It has no run.json: killed before its first checkpoint, after it, and finished."""
    train_command.main(workplace("whole", **SHORT))
    for step in (2, 4):
        stop_in(step, workplace(**SHORT), monkeypatch)
        (tmp_path / "run" / "run.json").unlink()
    # it may have written that too
    (tmp_path / "run" / "profile").mkdir()
    output.check_output(cli.parse_config(cli.config_parser("", ""), workplace(**SHORT))[1], profile=True)
    train_command.main(workplace(**SHORT | {"optim.lr": 0.01}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="holds a finished run's adapter and no checkpoint"):
        train_command.main(workplace(**SHORT))


def test_a_name_that_the_run_has_not_made_is_not_written(workplace, tmp_path, monkeypatch):
    """--profile on a resumed run, whose directory has another's folder of this name."""
    stop_in(3, workplace(**SHORT), monkeypatch)
    (tmp_path / "run" / "profile").mkdir()
    (tmp_path / "run" / "profile" / "memory-rank0.txt").write_text("mine")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="run: holds profile, which this run has not made"):
        train_command.main([*workplace(**SHORT), "--profile"])
    assert contents(tmp_path / "run") == before
    train_command.main(workplace(**SHORT))


def test_a_checkpoint_with_other_files_is_not_removed(workplace, tmp_path, monkeypatch, caplog):
    """Nor one that is a link; both lie under names that `train.keep` would remove."""
    settings = {"train.steps": 6, "train.checkpoint_every": 1, "train.keep": 1}
    stop_in(3, workplace(**settings | {"train.keep": 9}), monkeypatch)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000001" / "notes.txt").write_text("mine")
    shutil.copytree(checkpoints / "step-00000002", tmp_path / "elsewhere")
    (checkpoints / "step-00000000").symlink_to(tmp_path / "elsewhere")
    train_command.main(workplace(**settings))
    assert (checkpoints / "step-00000001" / "notes.txt").read_text() == "mine"
    assert checkpoint.verify(tmp_path / "elsewhere").step == 2
    assert [path.name for path in checkpoint.published(checkpoints)] == [f"step-0000000{n}" for n in (0, 1, 6)]
    assert "step-00000001: holds notes.txt" in caplog.text
