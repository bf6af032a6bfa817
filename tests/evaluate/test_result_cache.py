"""Results on disk: found by what they follow from, by nothing else, and a damaged file is named."""

import os
import signal
import sqlite3

import pytest
import torch

from minorca import UserError, load_tokenizer
from minorca.evaluate import result_cache
from minorca.evaluate.result_cache import ResultCache, identity
from minorca.model.quantization import Quantization
from tests.helpers import random_adapter, save_tokenizer

REQUESTS = [n.to_bytes(32, "big") for n in range(1200)]


def test_results_are_found_by_model_and_request(tmp_path):
    """More than fit in one question; floats come back to the bit."""
    one, other = ResultCache(tmp_path, {"model": 1}), ResultCache(tmp_path, {"model": 2})
    results = {request: [-(n + 0.1) / 3, n % 2 == 0] for n, request in enumerate(REQUESTS)}
    for request, result in results.items():
        one.add(request, result)
    one.write()
    other.add(REQUESTS[0], "text é")
    other.write()
    again = ResultCache(tmp_path, {"model": 1})
    assert again.find([*REQUESTS, b"unknown"]) == results
    assert other.find(REQUESTS) == {REQUESTS[0]: "text é"}
    assert ResultCache(tmp_path, {"model": 3}).find(REQUESTS) == {}


def test_models_are_told_apart_by_their_files_contents(save_mistral, tmp_path):
    """Weights, adapters and quantization each make another identity; the directory's name does not."""
    directory, base = save_mistral(vocab_size=260, intermediate_size=128)
    save_tokenizer(directory)
    tok = load_tokenizer(directory)
    random_adapter(base, tmp_path / "a", ("q", "v"))
    other = random_adapter(save_mistral(vocab_size=260, intermediate_size=128)[1], tmp_path / "b", ("q", "v"))
    with torch.no_grad():
        next(parameter for name, parameter in other.named_parameters() if "lora_B" in name)[0, 0] += 1e-6
    other.save_pretrained(tmp_path / "b")
    moved = tmp_path / "moved"
    directory.rename(moved)
    found = [
        identity(moved, adapter, quantization, tok=load_tokenizer(moved))
        for adapter in (None, tmp_path / "a", tmp_path / "b")
        for quantization in (None, Quantization(True), Quantization(False))
    ]
    assert all(found.count(each) == 1 for each in found)
    moved.rename(directory)
    assert identity(directory, None, None, tok) == found[0]
    changed, _ = save_mistral(seed=1, vocab_size=260, intermediate_size=128)
    assert identity(changed, None, None, tok) not in found


def test_a_kill_loses_what_was_not_yet_written(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            cache = ResultCache(tmp_path, {})
            cache.add(b"kept", 1)
            cache.write()
            cache.add(b"lost", 2)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert ResultCache(tmp_path, {}).find([b"kept", b"lost"]) == {b"kept": 1}


def test_a_damaged_file_is_named(tmp_path):
    cache = ResultCache(tmp_path, {})
    for request in REQUESTS:
        cache.add(request, [-1.5, True])
    cache.write()
    with sqlite3.connect(cache.path) as database:
        database.execute("UPDATE results SET value = '[-2.5, true]' WHERE rowid = 7")
    with pytest.raises(UserError, match=r"results\.sqlite: is damaged: a result does not match .* delete it"):
        cache.find(REQUESTS)
    content = bytearray(cache.path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    cache.path.write_bytes(content)
    with pytest.raises(UserError, match=r"results\.sqlite: cannot be used .*malformed.* delete it"):
        ResultCache(tmp_path, {}).find(REQUESTS)
    cache.path.write_text("not a database, at all" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        ResultCache(tmp_path, {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .* --no-cache"):
        ResultCache(tmp_path / "file" / "deeper", {})


def test_a_file_that_another_process_holds_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(result_cache, "PATIENCE", 0.1)
    cache = ResultCache(tmp_path, {})
    cache.add(b"kept", 1)
    other = sqlite3.connect(cache.path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        UserError, match="is held by another process for over 0 s; wait for it, choose another"
    ) as caught:
        cache.write()
    assert "delete" not in str(caught.value)
    other.close()
    cache.write()
    assert cache.find([b"kept"]) == {b"kept": 1}


def test_several_processes_write(tmp_path, monkeypatch):
    """Each waits for the other; both find everything."""
    monkeypatch.setattr(result_cache, "PERIOD", 0)
    one, other = ResultCache(tmp_path, {}), ResultCache(tmp_path, {})
    for n, request in enumerate(REQUESTS[:40]):
        (one, other)[n % 2].add(request, n)
    assert one.find(REQUESTS[:40]) == other.find(REQUESTS[:40]) == {r: n for n, r in enumerate(REQUESTS[:40])}


def test_a_database_of_another_program_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "results.sqlite") as database:
        database.execute("CREATE TABLE notes (text TEXT)")
    before = (tmp_path / "results.sqlite").read_bytes()
    with pytest.raises(UserError, match="results.sqlite: is a database of another program, with a table 'notes'"):
        ResultCache(tmp_path, {"files": []})
    assert (tmp_path / "results.sqlite").read_bytes() == before
