"""Token stores: what they say of their rows, rows selected from them, and stores of another format."""

import json

import numpy as np

from minorca import load_tokenizer
from minorca.data import store as module
from minorca.data.store import open_store
from minorca.files.atomic import write_manifest
from tests.data.samples import path_of, prepare, same_rows
from tests.data.test_packing import random_store


def test_what_a_store_says(model, data, caplog):
    """Its rows, memory-mapped; where each is from; and in the log, a line for each source with the outcomes."""
    caplog.set_level("INFO", "minorca")
    store = prepare(data, model)
    tok = load_tokenizer(model)
    first = data.train[0].path
    assert len(store) == 62 and store.source_ranges == [(0, 60), (60, 62)]
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    assert store.locate(0) == f"{first}, line 1" and store.locate(61) == f"{data.train[1].path}, row 2"
    ids, trained = store.row(7)
    assert tok.decode(ids[trained].tolist()) == "7 " * 8
    assert store.trained_counts.tolist() == [store.row(n)[1].sum() for n in range(62)]
    part = store.select([3, 59, 60])
    assert part.source_ranges == [(0, 2), (2, 3)]
    assert part.locate(1) == f"{first}, line 60" and part.locate(2).endswith("turns.parquet, row 1")
    assert np.array_equal(part.row(1)[0], store.row(59)[0]) and np.shares_memory(part.tokens, store.tokens)
    assert store.select(range(60)).source_ranges == [(0, 60), (60, 60)]
    store.report()
    tokens = [(int(store.lengths[a:b].sum()), int(store.trained_counts[a:b].sum())) for a, b in store.source_ranges]
    longest = sorted(store.lengths)
    places = (longest[30], longest[55], longest[61], longest[61])
    assert [record.getMessage() for record in caplog.records] == [
        f"{first}: 60 read, 60 kept, {tokens[0][0]} tokens, {tokens[0][1]} trained tokens",
        f"{data.train[1].path}: 2 read, 2 kept, {tokens[1][0]} tokens, {tokens[1][1]} trained tokens",
        "tokens of a row: 50% have up to {}, 90% {}, 99% {}, the longest {}".format(*places),
    ]


def test_rows_picked_from_a_store():
    store = random_store(0)
    part = store.select([5, 2])
    assert len(part) == 2
    for ours, theirs in ((0, 5), (1, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(part.row(ours), store.row(theirs)))
    assert len(store.select([])) == 0
    counts = [int(store.row(i)[1].sum()) for i in range(20)]
    assert store.trained_counts.tolist() == counts and part.trained_counts.tolist() == [counts[5], counts[2]]
    assert part.lengths.tolist() == store.lengths[[5, 2]].tolist() and np.shares_memory(part.tokens, store.tokens)
    assert len({store.sha256(), part.sha256(), store.select([2, 5]).sha256()}) == 3
    assert part.sha256() == store.select([5, 2]).sha256()


def test_a_store_of_another_format_is_not_read(model, data, monkeypatch, caplog):
    """One written by a later version, or by one that knew no numbers: its rows are rendered again."""
    store = prepare(data, model)
    path = path_of(store) / "meta.json"
    written = json.loads(path.read_text())
    assert written["format"] == module.FORMAT
    for change in ({"format": 1}, {"format": "2"}, {"format": None}, None):
        meta = written | change if change else {key: value for key, value in written.items() if key != "format"}
        path.write_text(json.dumps(meta))
        (path.parent / "MANIFEST.json").unlink()
        write_manifest(path.parent)
        caplog.clear()
        assert open_store(path.parent) is None
        found = repr(change["format"]) if change else "None"
        expected = f"{path}: format is {found}; expected {module.FORMAT}; its rows are rendered again"
        assert [record.getMessage() for record in caplog.records] == [expected]
        assert same_rows(prepare(data, model), store) and json.loads(path.read_text()) == written
    # Versions that write other formats keep their stores apart.
    monkeypatch.setattr("minorca.data.prepare.FORMAT", module.FORMAT + 1)
    assert path_of(prepare(data, model)) != path.parent
