"""GGUF, the files of llama.cpp: metadata and tensors, memory-mapped. The format is that of ggml's docs/gguf.md.

Anybody may have made a file: every count, length and offset is compared with the file's size before memory is taken.
Rows of quantized tensors are dequantized when they are read, by the gguf library.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote

# the tokenizer is read without it
if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
# 3 differs from 2 by files for big-endian machines alone
VERSIONS = (2, 3)
# Limits for untrusted files, each several times the largest in use. As Python objects, a header can take ten times its
# size.
MAX_HEADER_BYTES = 40 * 10**6
MAX_ENTRIES = 10_000
MAX_TENSORS = 100_000
MAX_LIST = 2**20
MAX_DIMENSIONS = 4
MAX_NAME_CHARACTERS = 500

# by number in the file: of single values, struct's formats
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# ggml's name: torch's
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# that the gguf library dequantizes with a few operations
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
READABLE = (*_PLAIN, *_QUANTIZED)


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is named as GGUF files are."""
    return path.suffix == ".gguf" and path.is_file()


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, with the interface of safetensors' slices.

    Attributes:
        type: ggml's name of how it is stored.
        offset: of its first byte in the file.
        row_bytes: of one step along the first axis.
    """

    data: memoryview
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' name of the dtype of what is read."""
        return self.type if self.type in _PLAIN else "F32"

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows of a slice without a step; those of quantized tensors in fp32."""
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        # a copy: torch has no tensors of memory that cannot be written
        content = bytearray(self.data[self.offset + start * self.row_bytes : self.offset + stop * self.row_bytes])
        shape = (max(0, stop - start), *self.shape[1:])
        if not content:
            return torch.empty(shape, dtype=getattr(torch, _PLAIN[self.get_dtype()]))
        if self.type in _PLAIN:
            return torch.frombuffer(content, dtype=getattr(torch, _PLAIN[self.type])).view(shape)
        return self._dequantize(content).view(shape)

    def _dequantize(self, content: bytearray) -> Tensor:
        import numpy
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = numpy.frombuffer(content, numpy.uint8).reshape(1, -1)
        with numpy.errstate(all="ignore"):
            return torch.from_numpy(dequantize(rows, GGMLQuantizationType[self.type]))


class GGUF:
    """A file, opened and checked. Its tensors have the interface of `safe_open`.

    Attributes:
        metadata: numbers, texts and lists of them by key.
        tensors: by name.
        header_bytes: what comes before the tensors' data.

    Raises:
        UserError: another kind of file, one that is cut off, or what it says of itself cannot be.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if find_file(path.parent, path.name) is None:
                raise UserError("no such file", path=path)
            with path.open("rb") as file:
                self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        # an empty file cannot be mapped
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read ({error})", path=path) from None
        reader = _Reader(path, self.data)
        reader.magic()
        tensors, entries = reader.number("Q"), reader.number("Q")
        self.metadata = reader.metadata(entries)
        self.tensors = _tensors(reader, tensors, self.metadata.get("general.alignment", 32))
        self.header_bytes = reader.at

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> StoredTensor:
        return self.tensors[name]


class _Reader:
    """Reads a header from its start to its end."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0

    def refuse(self, problem: str) -> NoReturn:
        raise UserError(f"is not a whole GGUF file ({problem}); download or export it again", path=self.path)

    def magic(self) -> None:
        if bytes(self.data[:4]) != MAGIC:
            self.refuse("it does not start with GGUF")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise UserError(
                f"is GGUF of version {version}; expected {' or '.join(map(str, VERSIONS))}, for little-endian machines",
                path=self.path,
            )

    def take(self, size: int) -> memoryview:
        if size > min(len(self.data), MAX_HEADER_BYTES) - self.at:
            self.refuse(f"{size} bytes at byte {self.at}, of {len(self.data)} and a header of {MAX_HEADER_BYTES}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        size = self.number("Q")
        try:
            return bytes(self.take(size)).decode()
        except UnicodeDecodeError as error:
            self.refuse(f"text at byte {self.at - size} is not UTF-8: {error.reason}")

    def metadata(self, entries: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if entries > MAX_ENTRIES:
            self.refuse(f"{entries} entries of metadata")
        for _ in range(entries):
            key = self.text()
            if key in found or len(key) > MAX_NAME_CHARACTERS or not key.isprintable():
                self.refuse(f"invalid or repeated key {quote(key)}")
            found[key] = self.value(key, self.number("I"))
        return found

    def value(self, key: str, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind != _ARRAY:
            self.refuse(f"{key} has type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > MAX_LIST:
            self.refuse(f"{key} is a list of {count}")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _VALUES:
            self.refuse(f"{key} is a list of type {kind}")
        content = self.take(count * struct.calcsize(_VALUES[kind]))
        return list(struct.unpack(f"<{count}{_VALUES[kind]}", content))


def _tensors(reader: _Reader, count: int, alignment: Any) -> dict[str, StoredTensor]:
    """What follows the metadata: where each tensor is."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        reader.refuse(f"general.alignment is {quote(alignment)}")
    if count > MAX_TENSORS:
        reader.refuse(f"{count} tensors")
    described = {}
    for _ in range(count):
        name = reader.text()
        if name in described or len(name) > MAX_NAME_CHARACTERS:
            reader.refuse(f"invalid or repeated name of a tensor {quote(name)}")
        dimensions = reader.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            reader.refuse(f"{quote(name)} has {dimensions} axes")
        # innermost first
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = reader.number("I"), reader.number("Q")
        described[name] = (shape, *sizes.get(kind, (f"type {kind}", 0, 0)), offset)
    start = -(-reader.at // alignment) * alignment
    tensors, total = {}, 0
    for name, (shape, kind, block, block_bytes, offset) in described.items():
        if kind not in READABLE:
            raise UserError(
                f"is stored as {kind}, which is not read; expected one of {', '.join(READABLE)}: convert the file with "
                "llama.cpp's llama-quantize --allow-requantize, or use the model's safetensors",
                path=reader.path,
                field=name,
            )
        size = math.prod(shape) // block * block_bytes
        total += size
        ends_within = start + offset + size <= len(reader.data) and start + total <= len(reader.data)
        # of a vector every value is a row
        is_whole = 0 not in shape and (len(shape) > 1 or block == 1) and shape[-1] % block == 0
        if not is_whole or offset % alignment or not ends_within:
            reader.refuse(f"{quote(name)} has {list(shape)} values of {kind} at byte {offset} of the tensors' data")
        tensors[name] = StoredTensor(reader.data, kind, shape, start + offset, size // shape[0])
    return tensors
