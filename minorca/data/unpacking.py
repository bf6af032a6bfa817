"""Bounds what compressed files of rows unpack to: a few hundred bytes can say gigabytes.

At most `limit` bytes are unpacked of a compressed text, or of one row or row group of a table; the rows of a table are
taken in pieces of PIECE bytes.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from minorca.errors import UserError

# Texts of people compress to a tenth, rows that differ in a number to a fiftieth.
MAX_RATIO = 100
# What every file may unpack to, and what of a table is in memory at once.
PIECE = 64 * 2**20
# Rows of a table that are decoded at once.
BATCH = 1024


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
    from pyarrow.parquet import ParquetFile

    metadata = file.metadata
    for group in (metadata.row_group(n) for n in range(metadata.num_row_groups)):
        for column, chunk in ((metadata.schema.column(i), group.column(i)) for i in range(group.num_columns)):
            is_nested = column.max_repetition_level > 0
            # What one batch may have: a single row may have all the values of its group.
            values = chunk.num_values if is_nested else min(chunk.num_values, BATCH)
            check(path, chunk.total_uncompressed_size, f"its column {chunk.path_in_schema} unpacks")
            check(path, values * max(8, column.length), f"its column {chunk.path_in_schema} unpacks")
    columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    texts = [one.path for one in columns if one.physical_type == "BYTE_ARRAY" and one.logical_type.type != "DECIMAL"]
    for batch in ParquetFile(path, metadata=metadata, read_dictionary=texts).iter_batches(batch_size=BATCH):
        for piece in pieces(batch, path):
            yield piece.cast(file.schema_arrow)


def pieces(batch: Any, path: Path) -> Iterator[Any]:
    """A batch in pieces of which each takes at most PIECE bytes, but for single rows.

    Raises:
        UserError: a row that takes more than the file may unpack to.
    """
    size = sum(map(_size, batch.columns))
    if len(batch) > BATCH or (size > PIECE and len(batch) > 1):
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
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        size = 0
        if _has_lengths(kind.value_type):
            lengths = compute.call_function("binary_length", [array.dictionary]).take(array.indices)
            size = compute.call_function("sum", [lengths]).as_py() or 0
    elif types.is_struct(kind):
        size = sum(map(_size, array.flatten()))
    elif types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        size = sum(_size(part.slice(first, last - first)) for part in (array.keys, array.items))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
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


def _has_lengths(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind)
