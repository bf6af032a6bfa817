"""Rows from every kind of file and from hubs, where each is, and broken files."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from minorca import UserError
from minorca.config import Source
from minorca.data.sources import open_source, read_rows
from tests.data.samples import MESSAGES, RECORDS, messages_in, messages_of, rows_in, valid, write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_file_type_gives_the_same_rows(name, tmp_path):
    """A missing or empty system prompt gives no system message; additional columns are allowed."""
    source = write(tmp_path / name, [record | {"more": 1.5} for record in RECORDS])
    assert messages_in(source) == MESSAGES
    assert messages_in(source, limit=2) == MESSAGES[:2]


def test_parquet_in_several_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)
    assert [(row.path, row.where) for row in rows_in(path)] == [(str(path), f"row {number}") for number in range(1, 6)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_skipped(name, tmp_path):
    path = tmp_path / name
    write(path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert messages_in(path) == MESSAGES


def test_places_in_jsonl(tmp_path):
    """Blank lines are skipped but counted, whatever ends a line."""
    path = tmp_path / "rows.jsonl"
    lines = [
        "",
        json.dumps(RECORDS[0]),
        "   ",
        *(json.dumps(record, ensure_ascii=False) for record in (RECORDS[1], RECORDS[3])),
    ]
    path.write_bytes("\r\n".join(lines).encode())
    assert [row.where for row in rows_in(path)] == ["line 2", "line 4", "line 5"]


def test_places_in_csv_are_where_rows_start(tmp_path):
    """A cell may contain line breaks, and a file blank lines."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,system_prompt,question,response\n1,,"a\nb\r\nc",d\n2,,e,f\n\n3,,"g\n",h\n4,,i,j\n')
    rows = rows_in(path)
    assert [row.where for row in rows] == ["line 2", "line 5", "line 7", "line 9"]
    assert messages_in(path)[0][0]["content"] == "a\nb\r\nc"


GOOD = json.dumps(RECORDS[0])
HEADER = "id,system_prompt,question,response\n"
BAD_FILES = {
    "syntax": ("jsonl", f'{GOOD}\n\n{{"id": "2", "question": }}\n', "line 3: not valid JSON .*column 25"),
    "cut line": ("jsonl", f"{GOOD}\n{GOOD[:40]}", "line 2: not valid JSON"),
    "array": ("jsonl", f"{GOOD}\n[1]\n", "line 2: expected an object with columns, got list"),
    "one array in lines": ("jsonl", f"{GOOD}\n[{GOOD}]", "line 2: expected an object with columns, got list"),
    "missing column": (
        "jsonl",
        f'{GOOD}\n{{"question": "", "s": ""}}',
        "line 2: column system_prompt is missing.*got question, s",
    ),
    "number": (
        "jsonl",
        '{"system_prompt": null, "question": 7, "response": "r"}',
        "line 1: question is int; expected text",
    ),
    "list": (
        "jsonl",
        '{"system_prompt": "", "question": "q", "response": ["r"]}',
        "line 1: response is list; expected text",
    ),
    "unpaired surrogate": (
        "jsonl",
        '{"system_prompt": "", "question": "q", "response": "\\ud83e"}',
        "line 1: response is not valid UTF-8 or has an unpaired surrogate",
    ),
    "bytes": (
        "jsonl",
        GOOD.encode() + b"\n" + GOOD.encode().replace(b"What", b"\xe9"),
        "line 2: question is not valid UTF-8",
    ),
    "other encoding": ("jsonl", GOOD.encode("utf-16"), "is encoded in UTF-16; save it as UTF-8"),
    "deep": ("jsonl", f"{GOOD}\n{'[' * 100_000}", "line 2: "),
    "long number": ("jsonl", f'{GOOD}\n{{"question": {"9" * 5000}}}', "line 2: "),
    "an array over lines": (
        "json",
        '[\n  {"question": "a"}\n]',
        "line 2: column system_prompt is missing",
    ),
    "key twice": (
        "jsonl",
        f'{GOOD}\n{{"question": "a", "x": {{"b": 1, "b": 2}}}}',
        "line 2: cannot be read .*duplicate key 'b'",
    ),
    "not a number": ("jsonl", '{"question": NaN}', "line 1: cannot be read .NaN is not a valid JSON number"),
    "csv: column twice": ("csv", "id,question,question\n1,a,b\n", "line 1: column question appears twice"),
    "csv: cell too many": (
        "csv",
        HEADER + '1,,"a\nb",c\n2,,d,e,f\n',
        "line 4: expected 4 cells as in the header, got 5",
    ),
    "csv: cell too few": ("csv", HEADER + "1,,a,b\n2,,c\n", "line 3: expected 4 cells as in the header, got 3"),
    "csv: missing column": ("csv", "id,question,response\n1,a,b\n", "column system_prompt is missing"),
    "csv: open quote": ("csv", HEADER + '1,,a,b\n2,,"c,d\n3,,e,f\n', "line 3: not valid CSV"),
    "csv: text after a quote": ("csv", HEADER + '1,,"a"b,c\n', "line 2: not valid CSV"),
    "csv: bytes": (
        "csv",
        b"id,system_prompt,question,response\n1,,a,b\n2,,caf\xe9,d\n",
        "line 3: question is not valid UTF-8",
    ),
    "parquet: not parquet": ("parquet", GOOD, "cannot be read as parquet"),
    "parquet: empty": ("parquet", "", "cannot be read as parquet"),
    "another name": ("md", GOOD, "expected a name ending in .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow"),
    "a document": ("txt", GOOD, "is plain text, one document, which format openorca cannot read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_line(name, tmp_path):
    suffix, content, complaint = BAD_FILES[name]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^{path}(, |: ){complaint}"):
        rows_in(path)


@pytest.mark.parametrize(
    "column, values, complaint",
    [
        ("question", pyarrow.array([b"bytes"]), "row 1: question is bytes; expected text"),
        ("response", pyarrow.array([1.5]), "row 1: response is float; expected text"),
        ("other", pyarrow.array(["a"]), "column response is missing"),
        ("response", pyarrow.array([b"caf\xe9"]).view(pyarrow.string()), "cannot be read as parquet"),
    ],
    ids=["bytes", "number", "column", "invalid utf-8"],
)
def test_bad_parquet_columns(column, values, complaint, tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {"system_prompt": ["s"], "question": ["q"], "response": ["r"]} | {column: values}
    if column == "other":
        del columns["response"]
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match=f"^{path}(, |: ){complaint}"):
        rows_in(path)


def test_a_parquet_file_with_a_column_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(UserError, match=f"^{path}: column text appears twice"):
        rows_in(path, "text")


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"^{path}: cannot be read as parquet"):
        rows_in(path)


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "./nowhere", "/nowhere/rows", "~/nowhere.csv", "/nowhere.jsonl.gz"]
)
def test_a_missing_file(source):
    with pytest.raises(UserError, match=f"^{source}: no such file"):
        rows_in(source)


@pytest.mark.parametrize(
    "source, file, limit",
    [("Open-Orca/OpenOrca:1M-GPT4-Augmented.parquet", "1M-GPT4-Augmented.parquet", None), ("a/b", None, 2)],
)
def test_a_hub_id_is_read_by_datasets(source, file, limit, monkeypatch):
    """Its name and file are passed on; a limited read streams instead of downloading; errors name the source."""
    import datasets

    calls = []

    def load(path, **options):
        calls.append((path, options))
        return RECORDS

    def fail(path, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert messages_in(source, limit=limit) == MESSAGES[:limit]
    assert calls == [
        (
            source.split(":")[0],
            {"data_files": file, "split": "train", "name": None, "streaming": limit is not None, "revision": None},
        )
    ]
    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(UserError, match=f"^{source}: no such file, and as a hub id it cannot be read"):
        rows_in(source)


def test_the_split_and_the_configuration_of_a_hub_data_set(monkeypatch):
    """Are passed on; a data set without the split names those that it has."""
    import datasets

    def load(path, *, name, split, **options):
        if split not in ("train_sft", "test_sft"):
            raise ValueError(f"Bad split: {split}")
        return RECORDS if name == "en" else RECORDS[:1]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name, revision: ["train_sft", "test_sft"])
    for name, rows in (("en", MESSAGES), (None, MESSAGES[:1])):
        reader = open_source(Source("a/b", "openorca", split="train_sft", name=name), None)
        assert [messages_of(row) for row in valid(read_rows(reader, None, Counter()))] == rows
    with pytest.raises(UserError, match="^a/b: has no split train; set split of .* to one of train_sft, test_sft"):
        rows_in("a/b")
