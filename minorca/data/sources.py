"""Reads the rows of sources: files, directories, globs and hub data sets. Errors name the file and the line or row."""

import glob
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from minorca.config import Source
from minorca.data.conversation import Content
from minorca.data.formats import check_columns, convert_record
from minorca.data.hub import open_hub, pinned_source
from minorca.data.row_files import SUFFIXES, RowError, RowFile, open_file, suffix_of
from minorca.errors import UserError
from minorca.files.safe_io import read_json, user_path

log = logging.getLogger(__name__)

# The split that the name of a file or folder says: of a data set of the hub, or by its first word, as `datasets` does.
_SPLIT = re.compile(r"(\w+)(?=-\d{5}-of-\d{5}[-.])|(?:train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")


@dataclass
class SourceReader:
    """An opened source: one file, or all files of a directory or glob in the order of their names.

    Attributes:
        path: the path or hub id that data.train or data.eval names.
        source: its format, and how its columns and roles are called.
    """

    path: str
    source: Source
    files: list[RowFile]

    def identity(self) -> list:
        """What its rows follow from: the files' checksums, the format, and the names of columns and roles."""
        source = self.source
        return [[file.sha256() for file in self.files], source.format, source.columns, source.roles]


class Row(NamedTuple):
    """A row and its place.

    Attributes:
        path, unit, number: the file, what the number counts, and the number.
        content: a conversation, answers to compare, or plain text.
        file: the number of the file in its source.
        dropped: why the row is not used, whatever its content; None if it is.
    """

    path: str
    unit: str
    number: int
    content: Content
    file: int = 0
    dropped: str | None = None

    @property
    def where(self) -> str:
        """The place in the file, as "line 3"."""
        return f"{self.unit} {self.number}"


def read_rows(reader: SourceReader, limit: int | None, counts: Counter) -> Iterator[Row | RowError]:
    """The rows of at most `limit` records, an invalid one as the error.

    `counts` gets how many were read, and what was ignored or changed in them.

    Raises:
        UserError: a broken file, a table without a column that the format needs, a name in `columns` that no row has.
    """
    format = cast(str, reader.source.format)
    columns = reader.source.columns or {}
    roles = reader.source.roles or {}
    seen: dict[int, int] = {}
    missing = set(columns.values())
    read = 0
    for n, number, record in islice(_records(reader), limit):
        read += 1
        counts["read"] += 1
        file = reader.files[n]
        if isinstance(record, RowError):
            yield record
            continue
        if missing:
            missing -= record.keys()
        try:
            content = convert_record(record, format, counts, columns, roles)
        except UserError as error:
            if file.is_table:
                _check_table(record, format, columns, file)
            yield RowError(error.message, path=file.path, where=f"{file.unit} {number}", field=error.field)
            continue
        row_id = record.get(columns.get("id", "id"))
        has_id = format == "openorca" and row_id not in (None, "")
        dropped = "repeated" if has_id and _is_repeated(row_id, content, seen, counts) else None
        yield Row(file.path, file.unit, number, content, n, dropped)
    if missing and (limit is None or read < limit):
        names = ", ".join(sorted(missing))
        raise UserError(f"names {names}, which no row has; fix the name", path=reader.path, field="data.columns")


def _records(reader: SourceReader) -> Iterator[tuple[int, int, dict | RowError]]:
    for n, file in enumerate(reader.files):
        for number, record in file.records():
            yield n, number, record


def _check_table(record: dict, format: str, columns: dict[str, str], file: RowFile) -> None:
    """Raises UserError where a column is missing: then it is in every row of the table."""
    try:
        check_columns(record, format, columns)
    except UserError as error:
        error.path = file.path
        raise


def _is_repeated(row_id: Any, content: Any, seen: dict[int, int], counts: Counter) -> bool:
    """Whether a row with this id and these texts was seen before: copies of OpenOrca contain some twice.

    `seen` maps each id to the row that had it first, and contains every other row with one of these ids as a key. All
    are 8-byte hashes, as there are millions.
    """
    id_hash = _hash(row_id)
    row_hash = _hash((row_id, *[message["content"] for message in content.messages]))
    if id_hash not in seen:
        seen[id_hash] = row_hash
        return False
    if seen[id_hash] == row_hash or row_hash in seen:
        return True
    counts["with the id of another row"] += 1
    seen[row_hash] = row_hash
    return False


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).digest())


# ------------------------------------------------------------------------------------------------------------- opening


def at_commit(name: str) -> str | None:
    """A source that is a hub id, at the commit that it names now; None where it is none, or this cannot be known."""
    return None if _names_file(name) or user_path(name).exists() else pinned_source(name)


def _names_file(name: str) -> bool:
    """Whether a source can only be a file or a pattern of files, whether there is one or not."""
    is_file_name = ":" not in name and (glob.has_magic(name) or suffix_of(Path(name)) in SUFFIXES)
    return is_file_name or name.startswith((".", "/", "~"))


def open_source(source: Source, limit: int | None) -> SourceReader:
    """Opens a file, a directory of files or one that `datasets` saved, a glob, a hub id[@REVISION], or one with :FILE.

    With a limit, at most that many rows of a hub data set are downloaded.

    Raises:
        UserError: no such file, an unknown file type, a hub data set that cannot be read, a split that it lacks.
    """
    name = source.path
    path = user_path(name)
    if path.is_dir():
        files = _open_directory(path, source)
    elif path.is_file():
        _check_no_split(source, "a file has none")
        files = [_open_file(path, source)]
    elif ":" not in name and glob.has_magic(name):
        _check_no_split(source, "a glob has none")
        paths = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
        files = [_open_file(path, source) for path in paths if path.is_file()]
        if not files:
            raise UserError("matches no file", path=name)
    elif path.exists() or _names_file(name):
        message = "no such file; data.train and data.eval take a file, a directory, a glob or a hub id"
        raise UserError(message, path=name)
    else:
        files = [open_hub(source, limit)]
    return SourceReader(str(path) if path.exists() else name, source, files)


def _open_file(path: Path, source: Source) -> RowFile:
    if suffix_of(path) == ".txt" and source.format != "text":
        message = f"is plain text, one document, which format {source.format} cannot read; set the format to text"
        raise UserError(message, path=path)
    return open_file(path)


def _check_no_split(source: Source, reason: str) -> None:
    """Raises UserError where a source names what only some kinds of sources have."""
    for key, value in (("split", source.split), ("name", source.name)):
        if value is not None:
            raise UserError(f"is {value}, but {reason}; leave it out", path=source.path, field=key)


def _open_directory(path: Path, source: Source) -> list[RowFile]:
    if source.name is not None:
        raise UserError("names a configuration, which only hub data sets have", path=path, field="name")
    if (path / "dataset_dict.json").is_file():
        splits = [str(name) for name in read_json(path / "dataset_dict.json").get("splits", [])]
        if source.split not in splits:
            found = f"is {source.split}" if source.split else "is missing"
            raise UserError(f"{found}; expected one of {', '.join(splits)}", path=path, field="split")
        return _open_saved(path / cast(str, source.split))
    if (path / "state.json").is_file():
        _check_no_split(source, "the directory holds one data set")
        return _open_saved(path)
    return _open_all(path, source)


def _open_saved(path: Path) -> list[RowFile]:
    """The Arrow files of a data set that `datasets.Dataset.save_to_disk` wrote."""
    entries = read_json(path / "state.json").get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    files = [path / Path(str(name)).name for name in names]
    if absent := [str(file.name) for file in files if not file.is_file()]:
        raise UserError(f"missing files that state.json names: {', '.join(absent)}", path=path)
    return [open_file(file) for file in files]


def _open_all(path: Path, source: Source) -> list[RowFile]:
    """All files in a directory and those in it whose names say that they hold rows; hidden ones excepted."""
    inside = (file for file in path.rglob("*") if file.is_file())
    visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    # Among other files, text is a licence or notes.
    suffixes = SUFFIXES.keys() - ({".txt"} if source.format != "text" else set())
    readable = [file for file in visible if suffix_of(file) in suffixes]
    splits = {file: _split_of(file.relative_to(path)) for file in readable}
    named = sorted({split for split in splits.values() if split})
    if source.split is not None and source.split not in named:
        found = ", ".join(named) or "none"
        raise UserError(f"is {source.split}; the names of its files have {found}", path=path, field="split")
    if source.split is None and len(named) > 1:
        raise UserError(f"is missing; expected one of {', '.join(named)}", path=path, field="split")
    files = sorted(file for file in readable if source.split in (None, splits[file]))
    if not files:
        raise UserError(f"has no file whose name ends in {', '.join(SUFFIXES)}", path=path)
    log.info("%s: %d files are read, %d others are not", path, len(files), len(visible) - len(files))
    return [_open_file(file, source) for file in files]


def _split_of(file: Path) -> str | None:
    """The split that a file's name says, or else that of the nearest folder whose name says one."""
    return next((match[0] for part in reversed(file.parts) if (match := _SPLIT.match(part))), None)
