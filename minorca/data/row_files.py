"""Reads the records of one file: JSON lines or an array, CSV, TSV, plain text, parquet and Arrow, compressed or not.

An error that leaves the other rows readable takes the place of its record, others are raised. All name the file and the
line or row.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minorca.data import unpacking
from minorca.data.messages import type_name
from minorca.errors import UserError
from minorca.files import atomic
from minorca.files.safe_io import JSON_DECODER

EXPECTED_OBJECT = "expected an object with columns"
COMPRESSED = (".gz", ".zst")
# Characters of a JSON array that are read at once.
BLOCK = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")


class RowError(UserError):
    """An error of an invalid row, which data.bad_rows can leave out."""


# A record is a row's values by column, with the number of its line or row.
NumberedRecord = tuple[int, dict | RowError]


class RowFile(NamedTuple):
    """A file of rows, or the rows of a hub data set.

    Attributes:
        path: the file's path or the hub id.
        unit: what the numbers of records count: "line" (of a file), "row" or "document".
        is_table: whether all records have the same columns.
        sha256: computes a checksum of the content.
        records: iterates over all records with their numbers.
    """

    path: str
    unit: str
    is_table: bool
    sha256: Callable[[], str]
    records: Callable[[], Iterator[NumberedRecord]]


def suffix_of(path: Path) -> str:
    """A file's suffix, without that of a compressed text file: ".jsonl" of rows.jsonl.gz."""
    compressed = path.suffix in COMPRESSED
    suffix = Path(path.stem).suffix if compressed else path.suffix
    return "" if compressed and suffix in (".parquet", ".arrow") else suffix


def open_file(path: Path) -> RowFile:
    """Raises UserError where the name has another suffix than those of SUFFIXES, before an optional .gz or .zst."""
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        expected = (
            f"expected a name ending in {', '.join(SUFFIXES)}, or all but the last two with {' or '.join(COMPRESSED)}"
        )
        raise UserError(expected, path=path)
    unit, is_table, read = SUFFIXES[suffix]
    return RowFile(str(path), unit, is_table, lambda: _sha256(path), lambda: _reading(read, path))


def _reading(read: Callable[[Path], Iterator[NumberedRecord]], path: Path) -> Iterator[NumberedRecord]:
    try:
        yield from read(path)
    except (OSError, EOFError) as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _sha256(path: Path) -> str:
    try:
        return atomic.sha256_each([path])[0]
    except OSError as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    # Invalid UTF-8 is passed on, so that the error can name the column.
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError("is encoded in UTF-16; save it as UTF-8", path=path)
        return path.open(**options)
    return io.TextIOWrapper(io.BufferedReader(unpacking.UnpackedText(path), BLOCK), **options)


# ---------------------------------------------------------------------------------------------------------------- JSON


def _read_json(path: Path) -> Iterator[NumberedRecord]:
    with _open_text(path) as file:
        while (start := file.read(BLOCK)) and start.isspace():
            pass
    with _open_text(path) as file:
        yield from (_read_array if start.lstrip().startswith("[") else _read_lines)(file, path)


def _read_lines(file: TextIO, path: Path) -> Iterator[NumberedRecord]:
    decode = JSON_DECODER.decode
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            # Without its end, after which an error's column would count anew.
            yield number, _record(decode(line.rstrip("\n")), path, number)
        except json.JSONDecodeError as error:
            message = f"not valid JSON ({error.msg}, column {error.colno})"
            yield number, RowError(message, path=path, where=f"line {number}")
        except (ValueError, RecursionError) as error:
            # what the decoder rejects, integers of too many digits, brackets nested too deeply
            yield number, RowError(f"cannot be read ({error})", path=path, where=f"line {number}")


def _record(value: Any, path: Path, number: int) -> dict | RowError:
    if isinstance(value, dict):
        return value
    return RowError(f"{EXPECTED_OBJECT}, got {type_name(value)}", path=path, where=f"line {number}")


def _read_array(file: TextIO, path: Path) -> Iterator[NumberedRecord]:
    """The objects of one JSON array, each with the line where it starts; only some of the text is in memory."""
    text = file.read(BLOCK)
    # The place in the text, its line, and what may stand there: "[" at the start, then elements and "," or "]" in turn.
    place, line, expected = 0, 1, "["

    def read_more() -> bool:
        nonlocal text, place
        # Twice as much each time, so that a long element is not decoded anew too often.
        more = file.read(max(BLOCK, len(text) - place))
        text, place = text[place:] + more, 0
        return more != ""

    def error(message: str, at: int) -> UserError:
        number = line + text.count("\n", place, at)
        return UserError(message, path=path, where=f"line {number}")

    def skip_space() -> str:
        """Moves to the next character and returns it; empty at the end."""
        nonlocal place, line
        while True:
            end = _SPACE.match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]
            line += text.count("\n", place, end)
            place = end
            if place < len(text) or not read_more():
                return text[place : place + 1]

    is_empty = True
    while char := skip_space():
        if expected == "," and char == "]" or expected == "element" and char == "]" and is_empty:
            place += 1
            expected = "end"
        elif expected in ("[", ",") and char == expected:
            place += 1
            expected = "element"
        elif expected != "element":
            wanted = {",": ", or ]", "end": "nothing after the array"}.get(expected, expected)
            raise error(f"not valid JSON (expected {wanted})", place)
        else:
            try:
                value, end = JSON_DECODER.raw_decode(text, place)
            except json.JSONDecodeError as failed:
                is_cut = failed.pos > len(text) - 100 or failed.msg.startswith("Unterminated string")
                if is_cut and read_more():
                    continue
                raise error(f"not valid JSON ({failed.msg})", failed.pos) from None
            except (ValueError, RecursionError) as failed:
                raise error(f"cannot be read ({failed})", place) from None
            # Of a number, more digits may follow.
            if end == len(text) and read_more():
                continue
            yield line, _record(value, path, line)
            line += text.count("\n", place, end)
            place, expected, is_empty = end, ",", False
    if expected != "end":
        raise error("not valid JSON (the array is not closed)", place)


# -------------------------------------------------------------------------------------------------------------- tables


def _check_columns(names: list[str], path: Path, where: str | None = None) -> None:
    """Rejects duplicate columns: a record would silently have only one of them."""
    if len(set(names)) < len(names):
        duplicate, _ = Counter(names).most_common(1)[0]
        raise UserError("appears twice; rename or remove one", path=path, where=where, field=f"column {duplicate}")


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[NumberedRecord]:
    # Answers can be longer than the 128 KiB that the module allows by default.
    csv.field_size_limit(sys.maxsize)
    # The line where the current row starts: its cells may contain line breaks.
    line = 1
    with _open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_columns(header, path, "line 1")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    message = f"expected {len(header)} cells as in the header, got {len(cells)}"
                    yield line, RowError(message, path=path, where=f"line {line}")
                elif cells:
                    yield line, dict(zip(header, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            where = f"line {line}"
            raise UserError(f"not valid CSV ({error}) in the row that starts here", path=path, where=where) from None


def _read_text(path: Path) -> Iterator[NumberedRecord]:
    # Line endings are kept as they are.
    with _open_text(path, newline="") as file:
        yield 1, {"text": file.read()}


def _read_parquet(path: Path) -> Iterator[NumberedRecord]:
    from pyarrow.parquet import ParquetFile

    def batches():
        file = ParquetFile(path)
        _check_columns(file.schema_arrow.names, path)
        return unpacking.parquet_pieces(path, file)

    return _read_batches(batches, path, "parquet")


def _read_arrow(path: Path) -> Iterator[NumberedRecord]:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    import pyarrow

    def batches():
        source = pyarrow.memory_map(str(path))
        try:
            file = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            stream = pyarrow.ipc.open_stream(source)
            _check_columns(stream.schema.names, path)
            return (piece for batch in stream for piece in unpacking.pieces(batch, path))
        _check_columns(file.schema.names, path)
        found = map(file.get_batch, range(file.num_record_batches))
        return (piece for batch in found for piece in unpacking.pieces(batch, path))

    return _read_batches(batches, path, "Arrow")


def _read_batches(batches: Callable[[], Iterator], path: Path, kind: str) -> Iterator[NumberedRecord]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for record in batch.to_pylist():
                number += 1
                yield number, {name: drop_null_fields(value) for name, value in record.items()}
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        # ValueError: invalid UTF-8
        raise UserError(f"cannot be read as {kind} ({error})", path=path) from None


def drop_null_fields(value: Any) -> Any:
    """A value of Arrow's without the null fields of structs: each has every field that any row has."""
    if isinstance(value, list):
        return [drop_null_fields(item) for item in value]
    if isinstance(value, dict):
        return {key: drop_null_fields(item) for key, item in value.items() if item is not None}
    return value


# What the numbers of a file's records count, whether it is a table, and its reader.
SUFFIXES: dict[str, tuple[str, bool, Callable[[Path], Iterator[NumberedRecord]]]] = {
    ".jsonl": ("line", False, _read_json),
    ".json": ("line", False, _read_json),
    ".csv": ("line", True, _read_csv),
    ".tsv": ("line", True, partial(_read_csv, delimiter="\t")),
    ".txt": ("document", False, _read_text),
    ".parquet": ("row", True, _read_parquet),
    ".arrow": ("row", True, _read_arrow),
}
