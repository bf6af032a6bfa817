"""Reads the rows of files and hub data sets. Every error names the file and the line or row."""

import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from minorca.config import Source
from minorca.data.conversation import Conversation
from minorca.data.formats import convert_record, type_name
from minorca.errors import UserError
from minorca.files import atomic
from minorca.files.safe_io import parse_json

EXPECTED_OBJECT = "expected an object with columns"
JSON_ARRAY = (
    f"{EXPECTED_OBJECT}, got list; write each object of a JSON array on a line of its own: "
    "jq -c '.[]' FILE > FILE.jsonl"
)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# A record is a row's values by column, with the number of its line or row.
NumberedRecord = tuple[int, dict]


@dataclass
class SourceReader:
    """An opened source.

    Attributes:
        path: the file's path or the hub id.
        unit: what the numbers of records count: "line" (of a file) or "row".
        format: the format of its rows, one of formats.FORMATS.
        sha256: computes a checksum of the content.
        records: iterates over all records with their numbers.
    """

    path: str
    unit: str
    format: str
    sha256: Callable[[], str]
    records: Callable[[], Iterator[NumberedRecord]]


class Row(NamedTuple):
    """A row and its place. `content` is a conversation or plain text."""

    path: str
    unit: str
    number: int
    content: Conversation | str

    @property
    def where(self) -> str:
        """The place in the file, as "line 3"."""
        return f"{self.unit} {self.number}"


def read_rows(reader: SourceReader, limit: int | None, counts: Counter) -> Iterator[Row]:
    """The rows of at most `limit` records; `counts` gets how many were read, and what was ignored or changed in them.

    Raises:
        UserError: a broken file, a missing column, a value that is invalid in its format.
    """
    seen: dict[int, int] = {}
    for number, record in islice(reader.records(), limit):
        counts["read"] += 1
        try:
            content = convert_record(record, reader.format, counts)
        except UserError as error:
            error.path = reader.path
            error.where = f"{reader.unit} {number}"
            raise
        has_id = reader.format == "openorca" and record.get("id") not in (None, "")
        if has_id and _is_repeated(record, seen, counts):
            continue
        yield Row(reader.path, reader.unit, number, content)


def _is_repeated(record: dict, seen: dict[int, int], counts: Counter) -> bool:
    """Whether a row with this id and these texts was seen before: copies of OpenOrca contain some twice.

    `seen` maps each id to the row that had it first, and contains every other row with one of these ids as a key. All
    are 8-byte hashes, as there are millions.
    """
    id_hash = _hash(record["id"])
    row_hash = _hash((record["id"], record["system_prompt"], record["question"], record["response"]))
    if id_hash not in seen:
        seen[id_hash] = row_hash
        return False
    if seen[id_hash] == row_hash or row_hash in seen:
        counts["dropped: repeated"] += 1
        return True
    counts["with the id of another row"] += 1
    seen[row_hash] = row_hash
    return False


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).digest())


def open_source(source: Source, limit: int | None) -> SourceReader:
    """Opens a .parquet, .jsonl, .json or .csv file, a hub id, or hub-id:FILE.

    With a limit, at most that many rows of a hub data set are downloaded.

    Raises:
        UserError: no such file, an unknown file type, a hub data set that cannot be read.
    """
    name = source.path
    path = Path(name).expanduser()
    # `DataConfig.sources` has resolved it.
    format = cast(str, source.format)
    if path.is_file():
        readers = dict(zip(SUFFIXES, (_read_jsonl, _read_jsonl, _read_csv, _read_parquet)))
        if path.suffix not in readers:
            raise UserError(f"expected a name ending in {', '.join(readers)}", path=path)
        read = readers[path.suffix]
        unit = "row" if path.suffix == ".parquet" else "line"
        return SourceReader(str(path), unit, format, lambda: _file_sha256(path), lambda: read(path))
    if path.exists() or (path.suffix in SUFFIXES and ":" not in name) or name.startswith((".", "/", "~")):
        raise UserError("no such file; data.train and data.eval take a file or a hub id", path=name)
    return _open_hub(name, format, limit)


def _file_sha256(path: Path) -> str:
    try:
        return atomic.sha256(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _read_jsonl(path: Path) -> Iterator[NumberedRecord]:
    try:
        # Invalid UTF-8 is passed on, so that the error can name the column.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(line, path, number)
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _parse_line(line: str, path: Path, number: int) -> dict:
    where = f"line {number}"
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith("["):
            raise UserError(JSON_ARRAY, path=path, where=where) from None
        raise UserError(f"not valid JSON ({error.msg}, column {error.colno})", path=path, where=where) from None
    except (ValueError, RecursionError) as error:
        # what `parse_json` rejects, integers of too many digits, brackets nested too deeply
        raise UserError(f"cannot be read ({error})", path=path, where=where) from None
    if isinstance(record, list):
        raise UserError(JSON_ARRAY, path=path, where=where)
    if not isinstance(record, dict):
        raise UserError(f"{EXPECTED_OBJECT}, got {type_name(record)}", path=path, where=where)
    return record


def _check_columns(names: list[str], path: Path, where: str | None = None) -> None:
    """Rejects duplicate columns: a record would silently have only one of them."""
    if len(set(names)) < len(names):
        duplicate, _ = Counter(names).most_common(1)[0]
        raise UserError("appears twice; rename or remove one", path=path, where=where, field=f"column {duplicate}")


def _read_csv(path: Path) -> Iterator[NumberedRecord]:
    # Answers can be longer than the 128 KiB that the module allows by default.
    csv.field_size_limit(sys.maxsize)
    # The line where the current row starts: its cells may contain line breaks.
    line = 1
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_columns(header, path, "line 1")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"expected {len(header)} cells as in the header, got {len(cells)}",
                        path=path,
                        where=f"line {line}",
                    )
                if cells:
                    yield line, dict(zip(header, cells))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"not valid CSV ({error}) in the row that starts here", path=path, where=f"line {line}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _read_parquet(path: Path) -> Iterator[NumberedRecord]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        _check_columns(file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # ValueError: invalid UTF-8
        raise UserError(f"cannot be read as parquet ({error})", path=path) from None


def _open_hub(source: str, format: str, limit: int | None) -> SourceReader:
    import datasets

    name, _, file = source.partition(":")
    try:
        if limit is None:
            # Downloaded once, and kept by `datasets`.
            rows: Any = datasets.load_dataset(name, data_files=file or None, split="train", streaming=False)
        else:
            stream = datasets.load_dataset(name, data_files=file or None, split="train", streaming=True)
            rows = list(islice(stream, limit))
    except Exception as error:
        # whatever the network, the hub or a broken file makes it raise
        raise UserError(f"no such file, and as a hub id it cannot be read ({error})", path=source) from None

    def sha256() -> str:
        if limit is None:
            return rows._fingerprint
        return hashlib.sha256(repr(rows).encode(errors="surrogatepass")).hexdigest()

    return SourceReader(source, "row", format, sha256, lambda: enumerate(rows, 1))
