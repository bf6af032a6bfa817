"""Bounds what compressed files of rows unpack to: a few hundred bytes can say gigabytes.

At most `limit` bytes are unpacked of a compressed text, or of one row or row group of a table; the rows of a table are
taken in pieces of PIECE bytes.
"""

import io
import mmap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from minorca.data import parquet_pages
from minorca.errors import UserError

# Texts of people compress to a tenth, rows that differ in a number to a fiftieth.
MAX_RATIO = 100
# What every file may unpack to, and what of a table is in memory at once.
PIECE = 64 * 2**20
# Rows of a table that are in memory at once as Python's values, and as Arrow's: for each lot of those, Arrow copies the
# values that are stored once.
BATCH, LOT = 1024, 65536


def limit(path: Path) -> int:
    """The bytes that a file may unpack to."""
    return PIECE + MAX_RATIO * path.stat().st_size


def check(path: Path, size: int, what: str) -> None:
    """Raises UserError where `what`, a whole file or a part of one, unpacks to more than the file may."""
    if size > limit(path):
        raise UserError(
            f"{what} to more than {limit(path)} bytes, {MAX_RATIO} times the file's size and {PIECE >> 20} MiB; if you "
            f"trust it, unpack it to .jsonl and name that",
            path=path,
        )


class UnpackedText(io.RawIOBase):
    """The content of a compressed file, up to the limit."""

    def __init__(self, path: Path):
        import pyarrow

        self.path = path
        self.stream = pyarrow.input_stream(str(path), compression="detect")
        self.left = limit(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(buffer)
        self.left -= count
        if self.left < 0:
            check(self.path, limit(self.path) - self.left, "unpacks")
        return count

    def close(self) -> None:
        self.stream.close()
        super().close()


def parquet_pieces(path: Path, file: Any) -> Iterator[Any]:
    """The batches of an opened parquet file, as `pieces` of them.

    A text that many rows have is stored once, and read so: a megabyte for a thousand rows would be a gigabyte.
    """
    from pyarrow import ArrowNotImplementedError
    from pyarrow.parquet import ParquetFile

    metadata = file.metadata
    columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        chunks = parquet_pages.chunks(data, metadata.num_row_groups, len(columns))
        # Chunks that overlap would be read again and again.
        if sum(chunk.size for group in chunks for chunk in group) > len(data):
            raise ValueError("its columns take more than the file")
        found = [[parquet_pages.read(data, *one, limit(path)) for one in zip(group, columns)] for group in chunks]
    texts, rows, lengths, longest = [], LOT, [], 0
    for column, pages in zip(columns, zip(*found)):
        encodings = set().union(*(one.encodings for one in pages))
        length = max(8, column.length)
        rows = min(rows, max(BATCH, PIECE // length))
        if column.physical_type == "BYTE_ARRAY" and encodings & {parquet_pages.DELTA, *parquet_pages.DICTIONARY}:
            # Arrow reads no others so.
            if not encodings & {parquet_pages.DELTA, parquet_pages.DELTA_LENGTH} and not _is_decimal(column):
                texts.append(column.path)
            else:
                # Each value may be as long as its page: the beginning of one may be that of the one before.
                length = max(8, *(one.largest for one in pages))
                longest += length
                rows = min(rows, max(1, PIECE // 2 // longest))
        lengths.append(length)
    for number, group in enumerate(found):
        size = sum(one.size for one in group)
        for column, length, one in zip(columns, lengths, group):
            if one.encodings & {parquet_pages.DELTA, parquet_pages.DELTA_LENGTH}:
                # Two lengths of each text.
                size += 8 * one.values
            # What one batch may have: a single row may have all the values of its group.
            size += length * (one.values if column.max_repetition_level > 0 else min(one.values, rows))
        check(path, size, f"its row group {number} unpacks")
    reader = ParquetFile(path, metadata=metadata, read_dictionary=texts)
    # One row group at a time: Arrow joins no dictionaries of nested columns.
    batches = (reader.iter_batches(rows, row_groups=[number]) for number in range(len(chunks)))
    for batch in chain.from_iterable(batches):
        for piece in pieces(batch, path):
            try:
                yield piece.cast(file.schema_arrow)
            except ArrowNotImplementedError:
                # To views; the values are the same.
                yield piece


def _is_decimal(column: Any) -> bool:
    return column.logical_type.type == "DECIMAL"


def pieces(batch: Any, path: Path) -> Iterator[Any]:
    """A batch in pieces of which each takes at most PIECE bytes, but for single rows.

    Raises:
        UserError: a row that takes more than the file may unpack to.
    """
    if len(batch) > BATCH:
        for start in range(0, len(batch), BATCH):
            yield from pieces(batch.slice(start, BATCH), path)
        return
    size = sum(map(_size, batch.columns))
    if size > PIECE and len(batch) > 1:
        half = len(batch) // 2
        yield from pieces(batch.slice(0, half), path)
        yield from pieces(batch.slice(half), path)
    else:
        check(path, size, "one of its rows unpacks")
        yield batch


def _size(array: Any) -> int:
    """The bytes that an Arrow array takes where each value has a place of its own.

    Raises:
        ValueError: a type of which one value may stand for many in another way than a dictionary's.
    """
    from pyarrow import BaseExtensionType, types

    kind = array.type
    if isinstance(kind, BaseExtensionType):
        return _size(array.storage)
    if types.is_dictionary(kind):
        size = _size_of_entries(array)
    elif types.is_struct(kind):
        size = sum(map(_size, array.flatten()))
    elif types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        size = sum(_size(part.slice(first, last - first)) for part in (array.keys, array.items))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or _are_views(array):
        size = _size(array.flatten())
    elif types.is_string_view(kind) or types.is_binary_view(kind):
        # Of the four numbers of a value, its length comes first.
        size = int(numpy.frombuffer(array.buffers()[1], "<i4")[4 * array.offset :: 4][: len(array)].sum())
    elif kind.num_fields > 0:
        raise ValueError(f"type {kind} is not supported; write it as another")
    else:
        size = array.nbytes
    # A place in a list for each value.
    return size + 8 * len(array)


def _size_of_entries(array: Any) -> int:
    """The bytes that the values of a dictionary array take, without a look at its other entries: they may be many."""
    from pyarrow import types

    entries, kind = array.dictionary, array.type.value_type
    is_large = types.is_large_string(kind) or types.is_large_binary(kind)
    if is_large or types.is_string(kind) or types.is_binary(kind):
        offsets = entries.buffers()[1]
        places = array.indices.drop_null().to_numpy(zero_copy_only=False).astype(numpy.int64)
        if offsets is None or len(places) == 0:
            return 0
        if places.min() < 0 or places.max() >= len(entries):
            raise ValueError("a value is in no dictionary")
        found = numpy.frombuffer(offsets, "<i8" if is_large else "<i4")[entries.offset :]
        if len(found) <= len(entries):
            raise ValueError("a dictionary is broken")
        return int((found[places + 1].astype(numpy.int64) - found[places]).sum())
    is_of_one_size = kind.num_fields == 0 and not types.is_string_view(kind) and not types.is_binary_view(kind)
    return len(array) * (kind.bit_width // 8 if is_of_one_size else _size(entries))


def _are_views(array: Any) -> bool:
    """Whether an array is of views of lists, of which none share values: a list of a megabyte can be seen often."""
    from pyarrow import types

    if not types.is_list_view(array.type) and not types.is_large_list_view(array.type):
        return False
    first, count = (part.to_numpy(zero_copy_only=False).astype(numpy.int64) for part in (array.offsets, array.sizes))
    first, count = first[count > 0], count[count > 0]
    return bool((first[:-1] + count[:-1] <= first[1:]).all())
