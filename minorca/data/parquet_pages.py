"""What the pages of a parquet file unpack to, by their own headers: what the footer says of it may be a lie.

Arrow's decoders never write more of a page than its header says, so that the headers' sizes bound what is unpacked.
"""

from typing import Any, NamedTuple

# Numbers of the format: kinds of pages, and encodings of their values.
DATA_PAGE, DATA_PAGE_V2 = 0, 3
DICTIONARY = {2, 8}
DELTA_LENGTH, DELTA = 6, 7
# By kind of page, the fields of its header that hold the number of values and their encoding.
_FIELDS = {DATA_PAGE: ((5, 1), (5, 2)), DATA_PAGE_V2: ((8, 1), (8, 4))}
# What some old writers' chunks are longer than they say; Arrow reads as much.
_SLACK = 100

# The numbers in a struct of Thrift's by the path of their fields, which has the places of items in lists. The last of a
# number of 64 bits is negative.
_Numbers = dict[tuple[int, ...], int]
# pyarrow's names of the footer's codecs.
_CODECS = (None, "snappy", "gzip", "lzo", "brotli", "lz4_raw", "zstd", "lz4_raw")


class Chunk(NamedTuple):
    """What the footer says of one column of a row group.

    Attributes:
        start: where its first page begins.
        size: the bytes that it takes in the file.
        values: how many values it has.
        codec: how its pages are compressed, as pyarrow names it; None: they are not.
    """

    start: int
    size: int
    values: int
    codec: str | None


class Pages(NamedTuple):
    """The pages of one column of a row group.

    Attributes:
        values: how many values they have.
        size: the bytes that they unpack to.
        largest: those of the largest.
        encodings: all that their values have.
    """

    values: int
    size: int
    largest: int
    encodings: set[int]


def chunks(data: Any, groups: int, columns: int) -> list[list[Chunk]]:
    """The columns of each row group of a file's bytes. pyarrow, which has opened it, would end the process with some.

    Raises:
        ValueError: the footer lacks one, or is broken.
    """
    fields: _Numbers = {}
    try:
        _read_struct(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"), (), fields)
        return [[_chunk(fields, (4, group, 1, column, 3)) for column in range(columns)] for group in range(groups)]
    except (IndexError, KeyError):
        raise ValueError("its footer is broken") from None


def _chunk(fields: _Numbers, path: tuple[int, ...]) -> Chunk:
    first, size, values = (fields[*path, -number] for number in (9, 7, 5))
    dictionary = fields.get((*path, -11), 0)
    start = dictionary if 0 < dictionary < first else first
    codec = fields[*path, 4]
    if min(start, size, values, codec) < 0:
        raise IndexError
    return Chunk(start, size, values, _CODECS[codec])


def read(data: Any, chunk: Chunk, column: Any, most: int) -> Pages:
    """The pages that Arrow reads of a chunk, whose column's schema this is, of a file's bytes.

    None is unpacked of more than `most` bytes: a caller refuses it.

    Raises:
        ValueError: a header that is broken or lies, or whose page does, beyond the chunk.
    """
    from pyarrow import ArrowInvalid

    place = chunk.start
    end = min(place + chunk.size + _SLACK, len(data))
    values, sizes, encodings, encoding = 0, [0], set(), -1
    # As Arrow does: as many pages as the values take that the footer says, the last one whole.
    while values < chunk.values:
        fields: _Numbers = {}
        try:
            place = _read_struct(data, place, (), fields) + fields[3,]
            sizes.append(fields[2,])
            count = 0
            if fields[1,] in _FIELDS:
                count, encoding = (fields[path] for path in _FIELDS[fields[1,]])
                encodings.add(encoding)
            values += count
            if place > end or min(fields[2,], fields[3,], count) < 0:
                raise IndexError
            # Arrow makes room for as many lengths of texts as these encodings themselves say.
            is_delta = count > 0 and encoding in (DELTA_LENGTH, DELTA) and fields[2,] <= most
            if is_delta and column.physical_type == "BYTE_ARRAY":
                _check_lengths(_unpack(data[place - fields[3,] : place], fields, chunk.codec, column), encoding, count)
        except (IndexError, KeyError, OSError, ArrowInvalid):
            raise ValueError(f"the pages of column {column.path} are broken") from None
    return Pages(values, sum(sizes), max(sizes), encodings)


def _unpack(page: bytes, fields: _Numbers, codec: str | None, column: Any) -> bytes:
    """The values of a data page, without its levels."""
    from pyarrow import Codec

    levels = fields[8, 5] + fields[8, 6] if fields[1,] == DATA_PAGE_V2 else 0
    if levels < 0:
        raise IndexError
    size, page = fields[2,] - levels, page[levels:]
    if codec and fields.get((8, 7, 0), 1) and page:
        page = Codec(codec).decompress(page, max(0, size), asbytes=True)
    # Levels that repeat and levels that say what is null, each after its length.
    for most, path in ((column.max_repetition_level, (5, 4)), (column.max_definition_level, (5, 3))):
        if fields[1,] == DATA_PAGE and most > 0:
            if fields[path] != 3:
                raise IndexError
            page = page[4 + int.from_bytes(page[:4], "little") :]
    return page


def _check_lengths(page: bytes, encoding: int, count: int) -> None:
    """Raises IndexError where a page's texts have more lengths than it has values, or more beginnings."""
    place = 0
    # The lengths of what texts begin with, in blocks of parts, each of numbers of so many bits; then those of the rest.
    for is_last in (False, True) if encoding == DELTA and page else (True,) if page else ():
        block, place = _read_varint(page, place)
        parts, place = _read_varint(page, place)
        left, place = _read_varint(page, place)
        if left > count or not 0 < parts <= block:
            raise IndexError
        _, place = _read_varint(page, place)
        left = 0 if is_last else left - 1
        while left > 0:
            _, place = _read_varint(page, place)
            if place + parts > len(page):
                raise IndexError
            place, widths = place + parts, page[place : place + parts]
            for width in widths[: -(-left // (block // parts))]:
                place += width * (block // parts) // 8
            left -= block


def _read_struct(data: Any, place: int, path: tuple[int, ...], fields: _Numbers) -> int:
    """Reads a struct in Thrift's compact protocol; returns where it ends.

    Of a number that is there twice the last one counts, and numbers of another type do not, as in Arrow.
    """
    number = 0
    while kind := data[place] & 15:
        step, place = data[place] >> 4, place + 1
        if step == 0:
            step, place = _read_number(data, place)
            number = 0
        number += step
        # Arrow would take such a number modulo 2^16.
        if not 0 < number < 2**15:
            raise IndexError
        if kind in (1, 2):
            # True and false.
            fields[*path, number, 0] = 2 - kind
        else:
            place = _read_value(data, place, kind, (*path, number), fields)
    return place + 1


def _read_value(data: Any, place: int, kind: int, path: tuple[int, ...], fields: _Numbers) -> int:
    if kind in (4, 5, 6):
        value, place = _read_number(data, place)
        if kind == 5:
            fields[path] = value
            if not -(2**31) <= value < 2**31:
                raise IndexError
        elif kind == 6:
            fields[*path[:-1], -path[-1]] = value
    elif kind == 8:
        length, place = _read_varint(data, place)
        place += length
    elif kind in (9, 10):
        place = _read_list(data, place, path, fields)
    elif kind == 12 and len(path) < 12:
        place = _read_struct(data, place, path, fields)
    elif kind in (1, 2, 3, 7):
        place += 8 if kind == 7 else 1
    # A map, which the format has nowhere.
    else:
        raise IndexError
    return place


def _read_list(data: Any, place: int, path: tuple[int, ...], fields: _Numbers) -> int:
    kind, count, place = data[place] & 15, data[place] >> 4, place + 1
    if count == 15:
        count, place = _read_varint(data, place)
    # One that is there twice would be read into the first.
    if (*path, -1, 0) in fields or len(path) > 12:
        raise IndexError
    fields[*path, -1, 0] = count
    for item in range(count):
        place = _read_value(data, place, kind, (*path, item), fields)
    return place


def _read_number(data: Any, place: int) -> tuple[int, int]:
    """A signed number, and where it ends."""
    value, place = _read_varint(data, place)
    return value >> 1 ^ -(value & 1), place


def _read_varint(data: Any, place: int) -> tuple[int, int]:
    value = 0
    # As many bytes as Arrow reads of one.
    for shift in range(0, 70, 7):
        byte, place = data[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise IndexError
