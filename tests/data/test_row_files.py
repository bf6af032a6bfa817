"""Files of every kind and compression, alone, in directories and saved by `datasets`, to the records others read."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest

from minorca import UserError
from minorca.config import DataConfig, Source
from minorca.data import row_files
from minorca.data.row_files import RowError, open_file
from minorca.data.sources import open_source, read_rows
from tests.data.samples import MESSAGES, RECORDS, messages_in, messages_of, prepare, records, rows_in, valid, write

TEXT = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=2)


def compress(path: Path, content: bytes) -> None:
    """Writes a file, compressed as its name says, by others' code."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "array.json", "array.jsonl", "csv", "tsv"])
def test_text_files(kind, compression, tmp_path):
    frame = pandas.DataFrame(RECORDS)
    separator = "\t" if kind == "tsv" else ","
    text = frame.to_csv(index=False, sep=separator) if kind in ("csv", "tsv") else ARRAY if "array" in kind else TEXT
    path = tmp_path / f"rows.{kind}{compression}"
    compress(path, text.encode())
    assert messages_in(path) == MESSAGES
    assert messages_in(path, limit=2) == MESSAGES[:2]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_compressed_files_that_are_damaged(name, tmp_path):
    compress(tmp_path / name, TEXT.encode() * 100)
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"plain text"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"^{tmp_path / name}: cannot be read"):
            rows_in(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.parquet.gz", "rows.md.gz", "rows.gz"])
def test_other_files_are_not_compressed(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="expected a name ending in"):
        rows_in(tmp_path / name)


def test_two_compressed_streams_in_one_file(tmp_path):
    """As `cat a.gz b.gz` makes it."""
    for name in ("rows.jsonl.gz", "rows.jsonl.zst"):
        compress(tmp_path / name, TEXT.encode())
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() * 2)
        assert messages_in(tmp_path / name) == MESSAGES * 2


# ---------------------------------------------------------------------------------------------------------- JSON arrays


def array_of(path: Path) -> list:
    return [record for _, record in open_file(path).records()]


@pytest.mark.parametrize("block", [1, 7, 200, 2**20])
def test_arrays_are_what_the_json_module_reads(block, tmp_path, monkeypatch):
    """However small the parts that are in memory: each object with the line where it starts."""
    monkeypatch.setattr(row_files, "BLOCK", block)
    rng = random.Random(block)
    path = tmp_path / "rows.json"
    for _ in range(30):
        texts = ["a", '"', "\\", "]", "},{", "ü\n", "🦜" * 40, ""]
        rows = [
            {rng.choice("abc"): rng.choice([rng.choice(texts), rng.randrange(10**6), [None, {"x": 1.5}], True])}
            for _ in range(rng.randrange(5))
        ]
        text = json.dumps(rows, indent=rng.choice([None, 0, 2]), ensure_ascii=rng.random() < 0.5)
        path.write_text("\n" * rng.randrange(3) + text + " \n", encoding="utf-8")
        assert array_of(path) == json.loads(path.read_text(encoding="utf-8"))
        if "\n" in text.strip("\n"):
            lines = path.read_text(encoding="utf-8").split("\n")
            assert all(lines[number - 1].lstrip().startswith("{") for number, _ in open_file(path).records())


BAD_ARRAYS = {
    "not closed": ('[\n{"a": 1},\n{"a": 2}\n', "line 4: not valid JSON .the array is not closed"),
    "cut": ('[\n{"a": 1},\n{"a": "xyz', "line 3: not valid JSON .Unterminated string"),
    "comma at the end": ('[\n{"a": 1},\n]', "line 3: not valid JSON"),
    "no comma": ('[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON .expected , or ]"),
    "lines after it": ('[{"a": 1}]\n{"a": 2}', "line 2: not valid JSON .expected nothing after"),
    "syntax": ('[\n{"a": 1},\n{"a" 2},\n' + '{"a": 3},' * 1000 + "]", "line 3: not valid JSON .Expecting ':'"),
    "key twice": ('[\n{"a": 1, "a": 2}]', "line 2: cannot be read .duplicate key"),
    "deep": ("[\n" + "[" * 100_000, "line 2: "),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_broken(name, tmp_path):
    text, complaint = BAD_ARRAYS[name]
    (path := tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=f"^{path}, {complaint}") as caught:
        array_of(path)
    assert not isinstance(caught.value, RowError)


def test_elements_that_are_no_objects(tmp_path):
    """Are invalid rows: the others can be read."""
    (path := tmp_path / "rows.json").write_text('[{"a": 1},\n 12345, "x",\n\n{"a": 2}]')
    one, number, text, two = array_of(path)
    assert (one, two) == ({"a": 1}, {"a": 2})
    assert str(number) == f"{path}, line 2: expected an object with columns, got int"
    assert isinstance(text, RowError) and text.where == "line 2"


# ---------------------------------------------------------------------------------------------------- Arrow and parquet


def test_arrow_files(tmp_path):
    """Of both of Arrow's formats."""
    table = pyarrow.Table.from_pylist(RECORDS)
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert messages_in(tmp_path / name) == MESSAGES
        assert [row.where for row in rows_in(tmp_path / name)] == [f"row {n}" for n in range(1, 6)]
    (tmp_path / "text.arrow").write_text(TEXT)
    with pytest.raises(UserError, match="text.arrow: cannot be read as Arrow"):
        rows_in(tmp_path / "text.arrow")


def test_null_fields_of_structs_are_absent(tmp_path):
    """Arrow gives every row the fields that any row has; JSON does not."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    other = [{"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]}
        for calls in (call, other)
    ]
    assert messages_in(write(tmp_path / "a.parquet", rows), "messages") == messages_in(
        write(tmp_path / "a.jsonl", rows), "messages"
    )


def test_saved_data_sets(tmp_path):
    """By `datasets`, in several files; one with splits needs the name of one."""
    rows = datasets.Dataset.from_list(records(10))
    rows.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train_sft": rows, "test_sft": rows.select([4])}).save_to_disk(str(tmp_path / "dict"))
    expected = messages_in(
        write(tmp_path / "rows.jsonl", datasets.Dataset.load_from_disk(str(tmp_path / "one")).to_list())
    )
    assert messages_in(tmp_path / "one") == expected and len(expected) == 10
    with pytest.raises(UserError, match="dict: split is missing; expected one of train_sft, test_sft"):
        rows_in(tmp_path / "dict")
    with pytest.raises(UserError, match="dict: split is train; expected one of train_sft, test_sft"):
        open_source(Source(str(tmp_path / "dict"), "openorca", split="train"), None)
    with pytest.raises(UserError, match="one: split is train, but the directory holds one data set"):
        open_source(Source(str(tmp_path / "one"), "openorca", split="train"), None)
    reader = open_source(Source(str(tmp_path / "dict"), "openorca", split="test_sft"), None)
    (row,) = valid(read_rows(reader, None, Counter()))
    assert row.path.startswith(str(tmp_path / "dict" / "test_sft")) and row.where == "row 1"
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="one: missing files that state.json names: data-0000"):
        rows_in(tmp_path / "one")


# ------------------------------------------------------------------------------------------------ directories and globs


def test_directories_and_globs(model, tmp_path):
    """All files in the order of their names, one source: a row knows its own file."""
    rows = records(9)
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    write(folder / "b.jsonl", rows[3:5])
    write(folder / "a.parquet", rows[:3])
    write(folder / "more" / "c.csv", rows[5:])
    for name in ("README.md", "LICENSE.txt", ".hidden.jsonl"):
        (folder / name).write_text("x")
    places = [(row.path.removeprefix(f"{folder}/"), row.number) for row in rows_in(folder)]
    assert places == [("a.parquet", n) for n in (1, 2, 3)] + [("b.jsonl", n) for n in (1, 2)] + [
        ("more/c.csv", n) for n in (2, 3, 4, 5)
    ]
    expected = messages_in(write(tmp_path / "all.jsonl", rows))
    assert messages_in(folder) == expected and messages_in(folder, limit=4) == expected[:4]
    assert messages_in(f"{folder}/**/*.[jpc]*") == expected
    assert messages_in(f"{folder}/?.jsonl") == expected[3:5]
    other = str(tmp_path / "all.jsonl")
    store = prepare(DataConfig([str(folder), other], store=str(tmp_path / "store")), model)
    assert store.source_ranges == [(0, 9), (9, 18)]
    assert [store.locate(n) for n in (2, 3, 5, 9)] == [
        f"{folder}/a.parquet, row 3",
        f"{folder}/b.jsonl, line 1",
        f"{folder}/more/c.csv, line 2",
        f"{other}, line 1",
    ]
    assert prepare(DataConfig([str(folder), other], store=str(tmp_path / "store")), model).path == store.path


def test_directories_and_globs_without_rows(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path}: has no file whose name ends in .jsonl"):
        rows_in(tmp_path)
    with pytest.raises(UserError, match=r"\*.jsonl: matches no file"):
        rows_in(f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match="notes.md: expected a name ending in"):
        rows_in(f"{tmp_path}/*")
    path = write(tmp_path / "a.jsonl", RECORDS)
    for key, source in (("split", Source(path, "openorca", split="x")), ("name", Source(path, "openorca", name="x"))):
        with pytest.raises(UserError, match=f"a.jsonl: {key} is x, but a file has none"):
            open_source(source, None)


def test_a_directory_with_the_files_of_several_splits(tmp_path):
    """As copies of hub data sets have them: one is chosen, never all of them."""
    for name, rows in (("train-00000-of-00002", 0), ("train-00001-of-00002-a1", 1), ("test-00000-of-00001", 2)):
        write(tmp_path / f"{name}.parquet", RECORDS[rows : rows + 1])
    with pytest.raises(UserError, match=f"^{tmp_path}: split is missing; expected one of test, train"):
        rows_in(tmp_path)
    with pytest.raises(UserError, match="split is val; the names of its files have test, train"):
        open_source(Source(str(tmp_path), "openorca", split="val"), None)
    reader = open_source(Source(str(tmp_path), "openorca", split="train"), None)
    assert [messages_of(row) for row in valid(read_rows(reader, None, Counter()))] == MESSAGES[:2]


SPLITS = {
    "stems": (("train.jsonl", "train"), ("test.jsonl", "test")),
    "tables": (("train.csv", "train"), ("validation.csv", "validation"), ("dev.csv", "dev")),
    "words": (("eval-v1.jsonl", "eval"), ("train_1.jsonl", "train"), ("val.en.jsonl", "val"), ("valid.csv", "valid")),
    "compressed": (("train.jsonl.gz", "train"), ("test.jsonl.zst", "test")),
    "in a folder": (("en/train.parquet", "train"), ("en/test.parquet", "test")),
    "folders": (("train/a.jsonl", "train"), ("test/a.jsonl", "test"), ("test/dev.jsonl", "dev")),
    "shards": (("train_sft-00000-of-00001.parquet", "train_sft"), ("test.parquet", "test")),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_directory_whose_files_are_named_for_splits(name, tmp_path):
    for n, (file, _) in enumerate(SPLITS[name]):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if Path(file).suffix in row_files.COMPRESSED:
            compress(tmp_path / file, json.dumps(RECORDS[n]).encode())
        else:
            write(tmp_path / file, RECORDS[n : n + 1])
    splits = ", ".join(sorted(split for _, split in SPLITS[name]))
    with pytest.raises(UserError, match=f"^{tmp_path}: split is missing; expected one of {splits}$"):
        rows_in(tmp_path)
    for n, (_, split) in enumerate(SPLITS[name]):
        reader = open_source(Source(str(tmp_path), "openorca", split=split), None)
        assert [messages_of(row) for row in valid(read_rows(reader, None, Counter()))] == [MESSAGES[n]]


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "train_2.csv"), ("a.jsonl", "train.jsonl"), ("tests.jsonl", "training.jsonl", "my_test.jsonl")],
)
def test_a_directory_of_one_split_or_none_is_read_whole(names, tmp_path):
    for n, name in enumerate(sorted(names)):
        write(tmp_path / name, RECORDS[n : n + 1])
    assert messages_in(tmp_path) == MESSAGES[: len(names)]


def test_a_text_file_is_a_document(tmp_path):
    """With the line endings that it has."""
    for name, text in (("b.txt", "two\n\n lines \n"), ("a.txt", "Ünï\r\nö\r\r\n"), ("c.txt", "")):
        (tmp_path / name).write_bytes(text.encode())
    assert [row.content for row in rows_in(tmp_path, "text")] == ["Ünï\r\nö\r\r\n", "two\n\n lines \n", ""]
    assert rows_in(tmp_path / "b.txt", "text")[0].where == "document 1"
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="b.txt, document 1: text is not valid UTF-8"):
        rows_in(tmp_path, "text")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_utf_16_is_named(name, encoding, tmp_path):
    """What PowerShell's > writes."""
    path = tmp_path / name
    path.write_bytes(("\ufeff" if encoding == "utf-16-be" else "").encode(encoding) + "text".encode(encoding))
    with pytest.raises(UserError, match=f"^{path}: is encoded in UTF-16; save it as UTF-8"):
        list(open_file(path).records())
