"""Rows rendered once and found again: only if nothing changed, completely or not at all, by one process at a time."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import packing
from minorca import UserError
from minorca.config import Source
from minorca.data import prepare as module
from minorca.data import rendering, store
from minorca.data.__main__ import main
from minorca.data.portable_files import portable_files
from minorca.data.tokenizer import load_tokenizer
from tests.data.samples import RECORDS, path_of, prepare, records, same_rows, write
from tests.data.test_tekken import FILE
from tests.helpers import ROOT, wait_until


@pytest.fixture
def renderings(monkeypatch):
    """One entry for every call that renders rows."""
    calls = []
    render_rows = rendering.render_rows

    def count(rows, *rest):
        calls.append(len(rows))
        return render_rows(rows, *rest)

    monkeypatch.setattr(rendering, "render_rows", count)
    return calls


def test_it_is_found_again(model, data, renderings, tmp_path, monkeypatch):
    """A renamed file too, with its new name in messages; weights, packing and eval change no row."""
    store = prepare(data, model)
    assert len(renderings) == 2
    again = prepare(replace(data, packing=False, eval=0.5), model)
    assert same_rows(store, again) and again.path == store.path
    os.rename(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    moved = [replace(data.train[0], path=str(tmp_path / "moved.jsonl"), weight=2.0), data.train[1]]
    assert prepare(replace(data, train=moved), model).locate(1) == f"{tmp_path / 'moved.jsonl'}, line 2"
    assert len(renderings) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = prepare(replace(data, train=moved, store=None), model)
    assert path_of(cached).parent == tmp_path / "cache" / "minorca" / "rows"


# How the settings change, or a file.
CHANGES = {
    "limit": lambda data, path: replace(data, limit=5),
    "seq_len": lambda data, path: replace(data, seq_len=4095),
    "train_on": lambda data, path: replace(data, train_on="all"),
    "too_long": lambda data, path: replace(data, too_long="truncate"),
    "empty_response": lambda data, path: replace(data, empty_response="error"),
    "order": lambda data, path: replace(data, train=data.train[::-1]),
    "one source": lambda data, path: replace(data, train=data.train[:1]),
    "a byte": lambda data, path: edit(path / "rows.jsonl", "Say 3", "Say 4"),
    "format": lambda data, path: replace(data, train=[data.train[0], replace(data.train[1], format="messages")]),
    "tokenizer": lambda data, path: edit(path / "model" / "added_tokens.json", "32001", "32002"),
    "settings": lambda data, path: edit(path / "model" / "special_tokens_map.json", '"bos_token"', '"no_token"'),
    "template": lambda data, path: (path / "model" / "chat_template.jinja").write_text("x") and None,
    "stop tokens": lambda data, path: (path / "model" / "generation_config.json").write_text("{}") and None,
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_rendered_again_if_anything_changed(change, model, data, renderings, tmp_path):
    store = prepare(data, model)
    renderings.clear()
    changed = CHANGES[change](data, tmp_path) or data
    if change == "format":
        with pytest.raises(UserError, match="^[^,]*turns.parquet: column messages is missing"):
            prepare(changed, model)
    else:
        assert prepare(changed, model).path != store.path and renderings


def test_what_is_not_read_is_not_opened(model, data, tmp_path):
    """Not even to find the store: a link out of the model's directory is nobody's business but its owner's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.jinja").write_text("my secret template")
    store = prepare(data, model)
    links = ["tokenizer.old", "tokenizer.model.old", "tokenizer.model.v3.bak", "tokenizer.json.bak", "old.jinja"]
    for name in links:
        (model / name).symlink_to(elsewhere / "secret.jinja")
    (model / "additional_chat_templates").symlink_to(elsewhere)
    opened = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    assert prepare(data, model).path == store.path
    files = portable_files(load_tokenizer(model), "chatml", model)
    assert opened and not [path for path in opened if path.endswith(("secret.jinja", *links))]
    assert not any(b"my secret" in content for content in files.values())


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "tekken.json"])
def test_a_link_out_in_place_of_a_file_that_counts_is_refused(name, model, data, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: is a symbolic link to .*elsewhere, outside its directory"):
        prepare(data, model)


@pytest.mark.parametrize("name, value", [("RENDERER_VERSION", -1), ("FORMAT", -1), ("LIBRARIES", ("jinja2",))])
def test_versions_and_template_are_part_of_the_name(name, value, model, data, monkeypatch):
    store = prepare(data, model)
    monkeypatch.setattr(module, name, value)
    assert prepare(data, model).path != store.path
    assert prepare(data, model, "mistral-v1").path not in (store.path, prepare(data, model).path)


@pytest.mark.parametrize("tekken", [True, False])
def test_the_version_of_mistral_common_counts_where_it_reads_the_file(tekken, model, data, monkeypatch, tmp_path):
    if tekken:
        model = tmp_path / "tekken"
        model.mkdir()
        shutil.copy(FILE, model / "tekken.json")
    template = "mistral-v3" if tekken else "chatml"
    store = prepare(data, model, template)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if "mistral" in name else version(name))
    assert (prepare(data, model, template).path != store.path) == tekken


PREPARE = """
import sys
from pathlib import Path
from minorca import load_tokenizer
from minorca.config import DataConfig
from minorca.data.prepare import prepare_store

place = Path(sys.argv[1])
data = DataConfig(str(place / "rows.jsonl"), store=str(place / "store"))
print(prepare_store(data.sources(data.train), load_tokenizer(place / "model"), "chatml", data).path)
"""


def test_a_comment_in_our_source_renders_nothing_again(model, data, tmp_path):
    """The renderer's version counts, not the bytes of the files that render."""
    copy = shutil.copytree(ROOT / "minorca", tmp_path / "code" / "minorca")

    def run() -> Path:
        command = [sys.executable, "-c", PREPARE, str(tmp_path)]
        return Path(subprocess.check_output(command, cwd=tmp_path / "code", text=True).strip())

    path = run()
    built = (path / "tokens.bin").stat()
    for file in (copy / "data").glob("*.py"):
        file.write_text(file.read_text() + "# a comment\n")
    assert run() == path
    assert (path / "tokens.bin").stat().st_ino == built.st_ino
    # The same change with a raised version does render again.
    edit(
        copy / "data" / "rendering.py", f"RENDERER_VERSION = {rendering.RENDERER_VERSION}\n", "RENDERER_VERSION = -1\n"
    )
    assert run() != path


@pytest.mark.parametrize(
    "name",
    [
        "tokens.bin",
        "trained.bin",
        "offsets.bin",
        "row_trained.bin",
        "numbers.bin",
        "files.bin",
        "meta.json",
        "MANIFEST.json",
    ],
)
@pytest.mark.parametrize("how", ["a bit", "cut", "gone", "empty"])
def test_a_damaged_store_is_built_again(how, name, model, data, caplog):
    store = prepare(data, model)
    path = path_of(store) / name
    whole = path.read_bytes()
    del store
    damages = {"a bit": whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "cut": whole[:-2], "empty": b""}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(damages[how])
    again = prepare(data, model)
    assert path.read_bytes() == whole and len(again) == 62
    assert [
        record.message for record in caplog.records if name in record.message and "rendered again" in record.message
    ]


def test_what_killed_builds_left_is_removed(model, data):
    """Only for the same rows: other directories may belong to another process, or to a person."""
    store = prepare(data, model)
    name, digits = path_of(store).name, "0123456789abcdef" * 2
    mine, *others = (
        path_of(store).with_name(n) for n in (f"{name}.tmp-{digits}", f"other.tmp-{digits}", f"{name}.tmp-1")
    )
    for path in (mine, *others):
        path.mkdir()
        (path / "tokens.bin").write_text("x")
    shutil.rmtree(path_of(store))
    assert same_rows(prepare(data, model), store) and not mine.exists()
    assert [(path / "tokens.bin").read_text() for path in others] == ["x", "x"]


def test_a_damaged_store_with_files_of_others_is_not_removed(model, data):
    store = prepare(data, model)
    path = path_of(store)
    del store
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{path}: is damaged, and holds notes.txt, which is none of its files"):
        prepare(data, model)
    assert (path / "notes.txt").read_text() == "mine" and (path / "tokens.bin").exists()


def test_nothing_is_left_where_a_row_is_wrong(model, data, tmp_path):
    with pytest.raises(UserError, match=f"^{data.train[0].path}, line 16: has .* tokens, more than data.seq_len, 64"):
        prepare(replace(data, seq_len=64, too_long="error"), model)
    with pytest.raises(
        UserError,
        match=f"^{data.train[0].path}: no row is left to use .60 read, 60 dropped: too long \\(4,165 tokens\\).$",
    ):
        prepare(replace(data, seq_len=4), model)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".lock"}


def test_a_store_that_cannot_be_written(model, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/rows: cannot be written .*; set data.store"):
        prepare(replace(data, store=str(tmp_path / "file" / "rows")), model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_manifest", full)
    with pytest.raises(UserError, match="cannot be written .*No space left on device"):
        prepare(data, model)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".lock"}


def test_a_file_that_changes_while_it_is_read(model, data, renderings, monkeypatch, tmp_path):
    render_rows = rendering.render_rows

    def change(*given):
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write("\n")
        return render_rows(*given)

    monkeypatch.setattr(rendering, "render_rows", change)
    with pytest.raises(UserError, match="rows.jsonl, .*turns.parquet: changed while being read; start again"):
        prepare(data, model)


def test_limits_of_hubs_and_files(model, data, monkeypatch, renderings):
    """A limit holds for each source; rows of a hub are identified by their content, all of them by `datasets`."""
    import datasets

    class Rows(list):
        _fingerprint = "1"

    rows = Rows(records(9))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: rows)
    data = replace(data, train=[Source("a/b"), data.train[0]])
    store = prepare(replace(data, limit=4), model)
    assert store.source_ranges == [(0, 4), (4, 8)] and store.locate(3) == "a/b, row 4"
    rows[7]["question"] = "beyond the limit"
    assert prepare(replace(data, limit=4), model).path == store.path
    rows[0]["question"] = "within"
    assert prepare(replace(data, limit=4), model).path != store.path
    everything = prepare(data, model)
    assert everything.source_ranges == [(0, 9), (9, 69)]
    rows._fingerprint = "2"
    assert prepare(data, model).path != everything.path


def test_benchmark(monkeypatch, tmp_path, capsys):
    """On few rows: the benchmark itself compares what one core renders with what all do, and checks the plan."""
    monkeypatch.setattr(sys, "argv", ["packing", "--rows", "30000", "--rendered", "600", "--output", str(tmp_path)])
    packing.main()
    result = json.loads((tmp_path / "packing.json").read_text())
    assert result["planning"]["fill"] >= 0.98 and result["rendering"]["all cores"]["rows_per_second"] > 0


# ------------------------------------------------------------------------------------------------------------ processes

WAITING = """
import logging, sys, time
from pathlib import Path
from minorca import load_tokenizer
from minorca.config import DataConfig
from minorca.data import rendering
from minorca.data.prepare import prepare_store

logging.basicConfig(level=logging.INFO, format="%(message)s")
place = Path(sys.argv[1])
render_rows = rendering.render_rows

def wait(*given):
    (place / f"rendering-{sys.argv[2]}").touch()
    while not (place / "go").exists():
        time.sleep(0.02)
    return render_rows(*given)

rendering.render_rows = wait
data = DataConfig(str(place / "rows.jsonl"), store=str(place / "store"))
print(prepare_store(data.sources(data.train), load_tokenizer(place / "model"), "chatml", data).sha256())
"""


def test_one_process_renders_while_another_waits(model, data, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    both = [subprocess.Popen([*command, str(n)], **pipes) for n in range(2)]
    try:
        wait_until(lambda: list(tmp_path.glob("rendering-*")))
        (builder,) = (int(path.name[-1]) for path in tmp_path.glob("rendering-*"))
        stderr = both[1 - builder].stderr
        assert stderr is not None
        assert stderr.readline().startswith(f"waiting for process {both[builder].pid} on ")
        assert len(list(tmp_path.glob("rendering-*"))) == 1
        (tmp_path / "go").touch()
        ends = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0] and ends[0][0] == ends[1][0] != ""
    assert ends[1 - builder][1] == "" and len(list(tmp_path.glob("rendering-*"))) == 1


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_killed_while_rendering(model, tmp_path):
    """By SIGKILL alone, or by Ctrl-C with its rendering processes: none of them survives, nothing is published."""
    path = write(tmp_path / "rows.jsonl", records(150_000))
    command = [sys.executable, "-m", "minorca.data", "prepare", f"--model.path={model}", f"--data.train={path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A suite that was started in the background ignores Ctrl-C.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    stores = {how: tmp_path / how.name for how in (signal.SIGKILL, signal.SIGINT)}
    commands = {how: [*command, f"--data.store={store}"] for how, store in stores.items()}
    processes = {how: subprocess.Popen(commands[how], cwd=ROOT, start_new_session=True, **pipes) for how in stores}
    try:
        for how, process in processes.items():
            store = stores[how]
            wait_until(lambda store=store: any(file.stat().st_size for file in store.glob("*.tmp-*/tokens.bin")))
            assert len(session(process.pid)) > 1
            (os.kill if how == signal.SIGKILL else os.killpg)(process.pid, how)
        said = {how: process.communicate(timeout=30)[1] for how, process in processes.items()}
        wait_until(lambda: not any(session(process.pid) for process in processes.values()), 5)
    finally:
        for pid in [pid for process in processes.values() for pid in session(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    left = {how: {path.suffix.partition("-")[0] for path in store.iterdir()} for how, store in stores.items()}
    assert left == {signal.SIGKILL: {".lock", ".tmp"}, signal.SIGINT: {".lock"}}
    assert [process.returncode for process in processes.values()] == [-signal.SIGKILL, 130]
    assert said[signal.SIGINT] == ""


def test_ctrl_c_while_a_process_is_started(model, data, monkeypatch):
    """It is held back until the process has been started, not lost."""
    submit = rendering.ProcessPoolExecutor.submit

    def interrupted(pool, *given):
        signal.raise_signal(signal.SIGINT)
        return submit(pool, *given)

    monkeypatch.setattr(rendering.ProcessPoolExecutor, "submit", interrupted)
    chunks = iter([(0, [])])
    with pytest.raises(KeyboardInterrupt):
        list(rendering._render_in_processes(chunks, load_tokenizer(model), data, "chatml", 1))


# -------------------------------------------------------------------------------------------------------------- prepare


def test_prepare(model, tmp_path, capsys, caplog):
    """Renders what training will look for, and prints where it is."""
    caplog.set_level("INFO", "minorca")
    for name in ("train", "eval"):
        write(tmp_path / f"{name}.jsonl", RECORDS[:2] if name == "train" else RECORDS[2:3])
    text = "model: {{path: {0}/model}}\ndata: {{train: {0}/train.jsonl, eval: {0}/eval.jsonl, store: {0}/store}}\n"
    (tmp_path / "run.yaml").write_text(text.format(tmp_path))
    main(["prepare", "--config", str(tmp_path / "run.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" rows in ")[0] for line in lines] == ["2", "1"]
    assert all(Path(line.split(" in ")[1]).is_dir() for line in lines)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"{tmp_path}/train.jsonl",
        "tokens of a row",
        f"{tmp_path}/eval.jsonl",
        "tokens of a row",
    ]
    main(["prepare", "--config", str(tmp_path / "run.yaml"), "--data.eval", "0.5"])
    assert capsys.readouterr().out.splitlines() == lines[:1]
