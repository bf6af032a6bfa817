"""Pickled state dicts, as `torch.save` writes them (`.bin`, `.pth`), read without running code.

Of a zip file torch is not asked: its reader finds records that Python's does not (DATA.PKL for data.pkl), and what one
has checked the other would read. Python's `zipfile` finds the records, torch's unpickler for `weights_only` gets their
content. torch reads files from before PyTorch 1.6 itself.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler

# The pickle of 1,200 tensors has 250 thousand bytes. Parsed they take up to 60 times as much.
MAX_PICKLE_BYTES = 10 * 10**6
# all that a state dict of plain tensors needs, as `torch.save` writes it
PICKLED_NAMES = {
    "collections OrderedDict",
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")),
}
PICKLED_NAMES |= {
    f"torch {kind}Storage"
    for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
# the last two are refused later, by name
PICKLED_NAMES |= {"torch.storage UntypedStorage", "torch float8_e4m3fn", "torch float8_e5m2"}
# the first bytes of a file that `torch.save` wrote before PyTorch 1.6: its magic number, pickled
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# such a file: the magic number, a version, the sizes of C's types, the dictionary of tensors, the names of its storages
OLD_PICKLES = 5
OLD_TENSORS = 3
FORBIDDEN_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
# a record's header in a zip file: its size without the name and what follows it, and where their two lengths are
ZIP_HEADER = 30
ZIP_LENGTHS = 26


def read_pickled(path: Path) -> Any:
    """The object in a file, whose tensors are mapped to it, but for files from before PyTorch 1.6.

    Raises:
        UnpicklingError: it needs more than a dictionary of plain tensors, or is compressed. PyTorch runs no code
            either, but allocates what the pickle asks for (bytearray(10**12), or a record that unpacks to a thousand
            times its size).
    """
    with path.open("rb") as file:
        if file.read(len(OLD_PICKLE)) != OLD_PICKLE:
            return _read_zip(path)
        stream = io.BytesIO(OLD_PICKLE + file.read(MAX_PICKLE_BYTES))
    for number in range(OLD_PICKLES):
        _check_opcodes(stream, path.stat().st_size if number == OLD_TENSORS else None)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        pickles = [record for name, record in records.items() if name.endswith("/data.pkl")]
        if (
            len(pickles) != 1
            or len(records) < len(archive.infolist())
            or any(record.compress_type != zipfile.ZIP_STORED for record in records.values())
            or pickles[0].file_size > MAX_PICKLE_BYTES
        ):
            raise pickle.UnpicklingError
        data = archive.read(pickles[0])
        home = pickles[0].filename.removesuffix("data.pkl")
        order = records.get(f"{home}byteorder")
        if order and (order.file_size > 10 or archive.read(order) != b"little"):
            raise ValueError("its numbers are not in little-endian order")
    _check_opcodes(io.BytesIO(data))
    size = path.stat().st_size
    mapped = torch.UntypedStorage.from_file(str(path), False, size)
    storages = {}

    def load_storage(stored: tuple) -> torch.TypedStorage:
        _, kind, key, _, count = stored
        if key not in storages:
            record = records[f"{home}data/{key}"]
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            start = _record_start(path, record)
            if not 0 <= count * dtype.itemsize <= record.file_size or start + record.file_size > size:
                raise ValueError(f"storage {key} is larger than its record")
            bytes_of_storage = mapped[start : start + count * dtype.itemsize]
            storages[key] = torch.TypedStorage(wrap_storage=bytes_of_storage, dtype=dtype, _internal=True)
        return storages[key]

    unpickler: Any = Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = load_storage
    return unpickler.load()


def _record_start(path: Path, record: zipfile.ZipInfo) -> int:
    """Where in the file a record's content begins."""
    with path.open("rb") as file:
        file.seek(record.header_offset + ZIP_LENGTHS)
        lengths = file.read(4)
    return record.header_offset + ZIP_HEADER + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))


def _check_opcodes(stream: io.BytesIO, largest: int | None = None) -> None:
    """Reads one pickle's instructions. `largest`: of its integers, which are sizes of memory in old files."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in FORBIDDEN_OPCODES or opcode.name.startswith("EXT"):
            raise pickle.UnpicklingError
        if opcode.name == "GLOBAL" and argument not in PICKLED_NAMES:
            raise pickle.UnpicklingError
        if largest is not None and isinstance(argument, int) and abs(argument) > largest:
            raise pickle.UnpicklingError
