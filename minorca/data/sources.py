"""Rows of conversations from files and hubs. Every complaint names the file and the line or row."""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minorca.errors import UserError

OPENORCA_COLUMNS = ("system_prompt", "question", "response")  # and id, which training does not need


class Row(NamedTuple):
    where: str  # file and line, for complaints
    messages: list[dict[str, str]]


def read_rows(source: str, limit: int | None = None) -> Iterator[Row]:
    """Rows in OpenOrca's columns (id, system_prompt, question, response) from a .parquet, .jsonl or .csv file, a hub id,
    or hub-id:FILE.

    Raises:
        UserError: a file that is missing or broken, a missing column, a value that is not text.
    """
    for where, record in islice(_records(source, limit), limit):
        if missing := [column for column in OPENORCA_COLUMNS if column not in record]:
            raise UserError(f"{where}: no column {missing[0]}; expected OpenOrca's id, system_prompt, question and response, found {', '.join(map(str, record))}")
        texts = {column: "" if record[column] is None else record[column] for column in OPENORCA_COLUMNS}
        for column, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{where}: {column} is {type(text).__name__}; expected text")
            if any("\ud800" <= c <= "\udfff" for c in text):
                wrong = "bytes that are no UTF-8, or half of a surrogate pair"
                raise UserError(f"{where}: {column} holds {wrong}; mend or remove the row")
        system = [{"role": "system", "content": texts["system_prompt"]}] if texts["system_prompt"] else []
        yield Row(where, [*system, {"role": "user", "content": texts["question"]}, {"role": "assistant", "content": texts["response"]}])


def _records(source: str, limit: int | None) -> Iterator[tuple[str, dict]]:
    path = Path(source).expanduser()
    if path.is_file():
        readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet}
        if path.suffix not in readers:
            raise UserError(f"{path}: expected a name ending in {', '.join(readers)}")
        return readers[path.suffix](path)
    if path.exists() or path.suffix in (".jsonl", ".json", ".csv", ".parquet") and ":" not in source or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such file; data.train and data.eval take a file or a hub id")
    return _hub(source, limit)


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        # bytes that are no UTF-8 come through, for `read_rows` to say in which line they are
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
                except (ValueError, RecursionError) as error:  # numbers and brackets without end
                    raise UserError(f"{path}, line {number}: cannot be read ({error})") from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: expected an object with columns, found {type(record).__name__}")
                yield f"{path}, line {number}", record
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)  # answers can be longer than the 128 KiB the module allows
    line = 1  # where a row starts: its cells may hold lines
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(f"{path}, line {line}: found {len(cells)} cells; the header has {len(header)}")
                if cells:
                    yield f"{path}, line {line}", dict(zip(header, cells))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not valid CSV ({error}) in the row that starts here") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from None


def _hub(source: str, limit: int | None) -> Iterator[tuple[str, dict]]:
    import datasets

    name, _, file = source.partition(":")
    try:
        # a few rows are streamed; all of them are downloaded once, and kept by `datasets`
        rows = datasets.load_dataset(name, data_files=file or None, split="train", streaming=limit is not None)
        for number, record in enumerate(rows, 1):
            yield f"{source}, row {number}", record
    except Exception as error:  # whatever the network, the hub or a broken file makes it raise
        raise UserError(f"{source}: no such file, and as a hub id it cannot be read ({error})") from None
