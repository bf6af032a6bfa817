"""Rows rendered once and found again: only where nothing changed, whole or not at all, by one process while others wait."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing
from minorca import UserError, load_tokenizer
from minorca.config import DataConfig, Source
from minorca.data import store as module
from minorca.data.__main__ import main
from minorca.data.store import TokenStore, prepared
from tests.data.test_sources_and_packing import FORMATS, RECORDS, write
from tests.data.test_tokenizer import orca
from tests.helpers import ROOT, wait_until


def records(count: int) -> list[dict]:
    return [
        {"id": f"t0.{n}", "system_prompt": "", "question": f"Say {n}", "response": f"{n} " * (1 + n % 40)}
        for n in range(count)
    ]


@pytest.fixture
def model(tmp_path):
    return orca(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    """Two sources, in a store of their own."""
    rows, turns = write(tmp_path / "rows.jsonl", records(60)), write(tmp_path / "turns.parquet", FORMATS["sharegpt"][0])
    return DataConfig([Source(rows), Source(turns, "sharegpt")], store=str(tmp_path / "store"))


def made(data: DataConfig, model: Path, template: str = "chatml") -> TokenStore:
    return prepared(data.sources(data.train), load_tokenizer(model), template, data)


@pytest.fixture
def renderings(monkeypatch):
    """One entry for every call that renders rows."""
    calls, render_rows = [], module.render_rows
    monkeypatch.setattr(module, "render_rows", lambda rows, *rest: calls.append(len(rows)) or render_rows(rows, *rest))
    return calls


def same(a: TokenStore, b: TokenStore) -> bool:
    names = ("tokens", "trained", "offsets", "numbers", "row_trained", "indices")
    return (
        a.sha256() == b.sha256()
        and a.parts == b.parts
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    )


def test_what_a_store_says(model, data, caplog):
    """Rows as `render_rows` makes them, memory-mapped; where each is from; a line a source of what became of them."""
    caplog.set_level("INFO", "minorca")
    store = made(data, model)
    tok, first = load_tokenizer(model), data.train[0].path
    assert (
        len(store) == 62
        and store.sections == [(0, 60), (60, 62)]
        and isinstance(store.tokens, np.memmap)
        and store.tokens.dtype == np.uint16
    )
    assert store.where(0) == f"{first}, line 1" and store.where(61) == f"{data.train[1].path}, row 2"
    ids, trained = store.row(7)
    assert tok.decode(ids[trained].tolist()) == "7 " * 8
    assert store.trained_counts.tolist() == [store.row(n)[1].sum() for n in range(62)]
    part = store.select([3, 59, 60])
    assert (
        part.sections == [(0, 2), (2, 3)]
        and part.where(1) == f"{first}, line 60"
        and part.where(2).endswith("turns.parquet, row 1")
    )
    assert np.array_equal(part.row(1)[0], store.row(59)[0]) and np.shares_memory(part.tokens, store.tokens)
    assert store.select(range(60)).sections == [(0, 60), (60, 60)]
    store.report()
    tokens = [(int(store.lengths[a:b].sum()), int(store.trained_counts[a:b].sum())) for a, b in store.sections]
    assert [record.getMessage() for record in caplog.records] == [
        f"{first}: 60 read, 60 kept, {tokens[0][0]} tokens, {tokens[0][1]} trained tokens",
        f"{data.train[1].path}: 2 read, 2 kept, {tokens[1][0]} tokens, {tokens[1][1]} trained tokens",
    ]


def test_it_is_found_again(model, data, renderings, tmp_path, monkeypatch):
    """Another name of the same file too, by which messages then call it; weights, packing and eval change no row."""
    store = made(data, model)
    assert len(renderings) == 2
    again = made(replace(data, packing=False, eval=0.5), model)
    assert same(store, again) and again.path == store.path
    os.rename(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    moved = [replace(data.train[0], path=str(tmp_path / "moved.jsonl"), weight=2.0), data.train[1]]
    assert made(replace(data, train=moved), model).where(1) == f"{tmp_path / 'moved.jsonl'}, line 2"
    assert len(renderings) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert made(replace(data, train=moved, store=None), model).path.parent == tmp_path / "cache" / "minorca" / "rows"


CHANGES = {  # how the settings change, or a file
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
def test_it_is_made_anew_where_anything_changed(change, model, data, renderings, tmp_path):
    store = made(data, model)
    renderings.clear()
    changed = CHANGES[change](data, tmp_path) or data
    if change == "format":
        with pytest.raises(UserError, match="no column messages"):
            made(changed, model)
    else:
        assert made(changed, model).path != store.path and renderings


@pytest.mark.parametrize("name", ["CODE", "LIBRARIES"])
def test_code_and_template_are_part_of_the_name(name, model, data, monkeypatch):
    store = made(data, model)
    monkeypatch.setattr(module, name, getattr(module, name)[:-1])
    assert made(data, model).path != store.path
    assert made(data, model, "mistral-v1").path not in (store.path, made(data, model).path)


@pytest.mark.parametrize(
    "name", ["tokens.bin", "trained.bin", "offsets.bin", "row_trained.bin", "numbers.bin", "meta.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("how", ["a bit", "cut", "gone", "empty"])
def test_a_damaged_store_is_made_anew(how, name, model, data, caplog):
    store = made(data, model)
    path, whole = store.path / name, (store.path / name).read_bytes()
    del store
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"a bit": whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "cut": whole[:-2], "empty": b""}[how]
        )
    again = made(data, model)
    assert path.read_bytes() == whole and len(again) == 62
    assert [record.message for record in caplog.records if name in record.message and "rendered anew" in record.message]


def test_remains_of_killed_builds_are_swept(model, data):
    """Those of the same rows: others may be another process's."""
    store = made(data, model)
    mine, other = (store.path.with_name(f"{name}.tmp-1") for name in (store.path.name, "other"))
    for path in (mine, other):
        path.mkdir()
        (path / "tokens.bin").write_text("x")
    shutil.rmtree(store.path)
    assert same(made(data, model), store) and other.exists() and not mine.exists()


def test_nothing_is_left_where_a_row_is_wrong(model, data, tmp_path):
    with pytest.raises(UserError, match=f"^{data.train[0].path}, line 16: .* tokens, over data.seq_len, 64"):
        made(replace(data, seq_len=64, too_long="error"), model)
    with pytest.raises(
        UserError, match=f"^{data.train[0].path}: no row is left to use .60 read, 60 dropped: too long.$"
    ):
        made(replace(data, seq_len=4), model)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".lock"}


def test_a_store_that_cannot_be_written(model, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/rows: cannot be written .*; set data.store"):
        made(replace(data, store=str(tmp_path / "file" / "rows")), model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(UserError, match="cannot be written .*No space left on device"):
        made(data, model)
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".lock"}


def test_a_file_that_changes_while_it_is_read(model, data, renderings, monkeypatch, tmp_path):
    render_rows = module.render_rows
    monkeypatch.setattr(
        module, "render_rows", lambda *given: (tmp_path / "rows.jsonl").open("a").write("\n") and render_rows(*given)
    )
    with pytest.raises(UserError, match="rows.jsonl, .*turns.parquet: changed while being read; start again"):
        made(data, model)


def test_limits_of_hubs_and_files(model, data, monkeypatch, renderings):
    """A limit holds for each source; a hub's rows are known by what was read, or where all are read by `datasets`' fingerprint."""
    import datasets

    class Rows(list):
        _fingerprint = "1"

    rows = Rows(records(9))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: rows)
    data = replace(data, train=[Source("a/b"), data.train[0]])
    store = made(replace(data, limit=4), model)
    assert store.sections == [(0, 4), (4, 8)] and store.where(3) == "a/b, row 4"
    rows[7]["question"] = "beyond the limit"
    assert made(replace(data, limit=4), model).path == store.path
    rows[0]["question"] = "within"
    assert made(replace(data, limit=4), model).path != store.path
    everything = made(data, model)
    assert everything.sections == [(0, 9), (9, 69)]
    rows._fingerprint = "2"
    assert made(data, model).path != everything.path


# ------------------------------------------------------------------------------------------------------------- parallel


@pytest.fixture
def threads(monkeypatch):
    """`threads(model, data)`: rows are rendered in parallel, three a turn, in threads, which start at once."""

    def use(model: Path, data: DataConfig, template: str = "chatml") -> None:
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
        monkeypatch.setattr(module, "_worker", (load_tokenizer(model), data, template))
        monkeypatch.setattr(module, "SERIAL", 0)
        monkeypatch.setattr(module, "CHUNK", 3)

    return use


def test_parallel_is_serial(model, data, tmp_path, threads):
    """Byte for byte, drops and counts included."""
    settings = replace(data, seq_len=64)
    serial = made(settings, model)
    threads(model, settings)
    parallel = made(replace(settings, store=str(tmp_path / "parallel")), model)
    files = {path.name: path.read_bytes() for path in parallel.path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in serial.path.iterdir()} and len(files) == 7
    assert parallel.parts[0].counts["dropped: too long"] > 5


@pytest.mark.parametrize(
    "line, complaint", [(50, "line 16: .* tokens, over"), (10, "line 10: not valid JSON"), (16, "line 16: not valid")]
)
def test_the_first_row_that_is_wrong_is_reported(line, complaint, model, data, threads):
    """Though reading runs ahead of rendering: here the 16th row is too long."""
    path = Path(data.train[0].path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[: line - 1], "{", *lines[line:]]))
    settings = replace(data, seq_len=64, too_long="error")
    threads(model, settings)
    with pytest.raises(UserError, match=f"^{path}, {complaint}"):
        made(settings, model)


def test_a_rendering_process_that_is_killed(model, data, threads, monkeypatch):
    threads(model, data)
    monkeypatch.setattr(module, "_work", lambda chunk: (_ for _ in ()).throw(BrokenProcessPool()))
    with pytest.raises(UserError, match="a process that renders rows was killed, perhaps for want of memory"):
        made(data, model)


def test_benchmark(monkeypatch, tmp_path, capsys):
    """Tiny: the benchmark itself compares what one core renders with what all do, and looks at the plan."""
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
from minorca.data import store

logging.basicConfig(level=logging.INFO, format="%(message)s")
place = Path(sys.argv[1])
render_rows = store.render_rows

def wait(*given):
    (place / f"rendering-{sys.argv[2]}").touch()
    while not (place / "go").exists():
        time.sleep(0.02)
    return render_rows(*given)

store.render_rows = wait
data = DataConfig(str(place / "rows.jsonl"), store=str(place / "store"))
print(store.prepared(data.sources(data.train), load_tokenizer(place / "model"), "chatml", data).sha256())
"""


def test_one_process_renders_while_another_waits(model, data, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    both = [subprocess.Popen([*command, str(n)], **pipes) for n in range(2)]
    try:
        wait_until(lambda: list(tmp_path.glob("rendering-*")))
        (builder,) = (int(path.name[-1]) for path in tmp_path.glob("rendering-*"))
        line = both[1 - builder].stderr.readline()
        assert (
            line.startswith(f"waiting for process {both[builder].pid} on ")
            and len(list(tmp_path.glob("rendering-*"))) == 1
        )
        (tmp_path / "go").touch()
        ends = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0] and ends[0][0] == ends[1][0] != ""
    assert ends[1 - builder][1] == "" and len(list(tmp_path.glob("rendering-*"))) == 1


def session(leader: int) -> list[int]:
    """The processes of a session that are alive."""
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
    """By SIGKILL, alone, or by Ctrl-C, together with those that render for it: none of them survives, nothing is published."""
    path = write(tmp_path / "rows.jsonl", records(150_000))
    command = [sys.executable, "-m", "minorca.data", "prepare", f"--model.path={model}", f"--data.train={path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a suite started in the background ignores it
    stores = {how: tmp_path / how.name for how in (signal.SIGKILL, signal.SIGINT)}
    commands = {how: [*command, f"--data.store={store}"] for how, store in stores.items()}
    processes = {how: subprocess.Popen(commands[how], cwd=ROOT, start_new_session=True, **pipes) for how in stores}
    try:
        for how, process in processes.items():
            wait_until(lambda: any(file.stat().st_size for file in stores[how].glob("*.tmp-*/tokens.bin")))
            assert len(session(process.pid)) > 1
            (os.kill if how == signal.SIGKILL else os.killpg)(process.pid, how)
        said = {how: process.communicate(timeout=30)[1] for how, process in processes.items()}
        wait_until(lambda: not any(session(process.pid) for process in processes.values()), 5)
    finally:
        for pid in [pid for process in processes.values() for pid in session(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    left = {how: {path.suffix.partition("-")[0] for path in store.iterdir()} for how, store in stores.items()}
    assert left == {signal.SIGKILL: {".lock", ".tmp"}, signal.SIGINT: {".lock"}}
    assert [process.returncode for process in processes.values()] == [-signal.SIGKILL, 130] and said[
        signal.SIGINT
    ] == ""


# -------------------------------------------------------------------------------------------------------------- prepare


def test_prepare(model, tmp_path, capsys, caplog):
    """Renders what training will look for, and says where it lies."""
    caplog.set_level("INFO", "minorca")
    for name in ("train", "eval"):
        write(tmp_path / f"{name}.jsonl", RECORDS[:2] if name == "train" else RECORDS[2:3])
    text = "model: {{path: {0}/model}}\ndata: {{train: {0}/train.jsonl, eval: {0}/eval.jsonl, store: {0}/store}}\n"
    (tmp_path / "run.yaml").write_text(text.format(tmp_path))
    main(["prepare", "--config", str(tmp_path / "run.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" rows in ")[0] for line in lines] == ["2", "1"] and all(
        Path(line.split(" in ")[1]).is_dir() for line in lines
    )
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"{tmp_path}/train.jsonl",
        f"{tmp_path}/eval.jsonl",
    ]
    main(["prepare", "--config", str(tmp_path / "run.yaml"), "--data.eval", "0.5"])
    assert capsys.readouterr().out.splitlines() == lines[:1]
