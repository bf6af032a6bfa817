"""Files of tensors that anybody may have made: safetensors, and pickled `.bin` files read without running code.

All are memory-mapped; a row is read when it is asked for.
"""

import pickle
import pickletools
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minorca.errors import UserError
from minorca.files.safe_io import find_file, parse_json, quote, read_json

FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
# The header of a file with 1,200 tensors has 150 thousand bytes, the pickle of one 250 thousand. Parsed they take up to
# 60 times as much.
MAX_HEADER_BYTES = 10 * 10**6
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
FORBIDDEN_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}


def _check_names(path: Path, names) -> None:
    """Raises UserError for a tensor's name that is not printable: messages contain names, and terminals obey control
    characters.
    """
    for name in names:
        if not isinstance(name, str) or len(name) > 500 or not name.isprintable():
            raise UserError(f"names a tensor {quote(name)}; expected at most 500 printable characters", path=path)


def _shard(directory: Path, name: str, index: Path, suffix: str) -> Path:
    """The path of a shard that an index names: a file in the index's own directory, of the kind that the index is
    for.
    """
    try:
        path = find_file(directory, name)
    except UserError as error:
        raise UserError(f"names the file {quote(name)}; {error}", path=index) from None
    if path is None:
        raise UserError(f"names the file {name}, which is not in {directory}; is the download complete?", path=index)
    if path.suffix != suffix:
        raise UserError(f"names the file {name}; expected one that ends in {suffix}", path=index)
    return path


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files that hold a model's weights and, where there is an index, which file each tensor is in."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if single := find_file(directory, name):
            return [single], None
        if index := find_file(directory, f"{name}.index.json"):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError("expected an object weight_map from tensor to file", path=index)
            _check_names(index, weight_map)
            for shard in weight_map.values():
                if not isinstance(shard, str):
                    raise UserError(f"names the file {quote(shard)}; expected text", path=index)
            shards = {
                shard: _shard(directory, shard, index, Path(name).suffix)
                for shard in dict.fromkeys(weight_map.values())
            }
            return sorted(shards.values()), {key: shards[shard] for key, shard in weight_map.items()}
    if single := find_file(directory, "consolidated.safetensors"):
        return [single], None
    raise UserError(
        "no weights; expected model.safetensors, model.safetensors.index.json with its shards, "
        "consolidated.safetensors, or pytorch_model*.bin",
        path=directory,
    )


def open_safetensors(path: Path):
    """`safe_open`, with errors that name the file and say what it is instead, and one for a repeated name."""
    try:
        if find_file(path.parent, path.name) is None:
            raise FileNotFoundError("no such file")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes; expected at most {MAX_HEADER_BYTES}")
            handle = safe_open(path, framework="pt")
            parse_json(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        _check_download(path)
        raise UserError(f"not a whole safetensors file ({str(error)[:300]}); download it again", path=path) from None
    _check_names(path, handle.keys())
    return handle


def open_exactly(path: Path, shapes: dict[str, tuple[int, ...]]):
    """A safetensors file, opened, once it is sure to hold exactly these tensors, of floating point.

    Raises:
        UserError: a tensor that is missing, unexpected or of another shape or type; names file and key.
    """
    file = open_safetensors(path)
    keys = set(file.keys())
    for name in sorted(keys ^ set(shapes)):
        problem = "unexpected" if name in keys else "missing"
        raise UserError(f"{problem} tensor {name}; was it made for another model?", path=path)
    for name, shape in shapes.items():
        tensor = file.get_slice(name)
        if tensor.get_dtype() not in FLOATS:
            raise UserError(f"is {tensor.get_dtype()}; expected a floating-point type", path=path, field=name)
        if tuple(tensor.get_shape()) != shape:
            message = f"has shape {tensor.get_shape()}; expected {list(shape)}; was it made for another model?"
            raise UserError(message, path=path, field=name)
    return file


def _check_download(path: Path) -> None:
    """Raises UserError where a file is what a failed download often leaves instead of weights."""
    head = path.open("rb").read(64) if path.is_file() else b""
    if head.startswith(b"version https://git-lfs"):
        raise UserError("is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)", path=path)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError("is a web page, not weights; the download went wrong", path=path)


def _check_pickle(path: Path) -> None:
    """Raises UnpicklingError where a .bin needs more than a dictionary of plain tensors.

    PyTorch runs no code either, but allocates what the pickle asks for (bytearray(10**12), or a record that unpacks to
    a thousand times its size).
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            is_pickle = record.filename.endswith("data.pkl")
            if record.compress_type != zipfile.ZIP_STORED or (is_pickle and record.file_size > MAX_HEADER_BYTES):
                raise pickle.UnpicklingError
            for opcode, argument, _ in pickletools.genops(archive.read(record)) if is_pickle else ():
                if opcode.name in FORBIDDEN_OPCODES or opcode.name.startswith("EXT"):
                    raise pickle.UnpicklingError
                if opcode.name == "GLOBAL" and argument not in PICKLED_NAMES:
                    raise pickle.UnpicklingError


def _open_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running code and without reading the data yet (memory-mapped)."""
    try:
        _check_pickle(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch's own message explains how to run the code
    except pickle.UnpicklingError:
        raise UserError(
            "cannot be read without running code that it holds; use the model's safetensors files", path=path
        ) from None
    # torch has no common error for files that are truncated or of another kind
    except Exception as error:
        _check_download(path)
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"cannot be read as PyTorch weights ({reason}); download it again", path=path) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError("expected a dictionary of tensors", path=path)
    _check_names(path, tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # views may repeat one number many times; twice, because a head may share its storage with the embedding
    if size > 2 * path.stat().st_size:
        raise UserError(
            f"its tensors take {size} bytes, far more than it has; use the model's safetensors files", path=path
        )
    return tensors


class TensorFiles:
    """The tensors of a model's directory, by name, each in exactly one file."""

    def __init__(self, directory: Path):
        self.directory = directory
        files, index = _weight_files(directory)
        self._handles = {path: _open_bin(path) if path.suffix == ".bin" else open_safetensors(path) for path in files}
        self.files: dict[str, Path] = {}
        for path, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118  (a file, not a dict)
                if name in self.files:
                    raise UserError(f"duplicate tensor {name}, which is also in {self.files[name].name}", path=path)
                self.files[name] = path
        for name, path in (index or {}).items():
            if self.files.get(name) != path:
                raise UserError(f"missing tensor {name}, which the index places here", path=path)
        if index is not None and (unexpected := sorted(set(self.files) - set(index))):
            name = unexpected[0]
            raise UserError(f"unexpected tensor {name}, which the index does not name", path=self.files[name])

    def shape(self, name: str) -> tuple[int, ...]:
        handle = self._handles[self.files[name]]
        return tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        handle = self._handles[self.files[name]]
        return str(handle[name].dtype) if isinstance(handle, dict) else handle.get_slice(name).get_dtype()

    def bytes(self, name: str) -> int:
        """What a tensor takes in memory."""
        row = self.read(name, 0, 1)
        return row.numel() * row.element_size() * self.shape(name)[0]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        handle = self._handles[self.files[name]]
        return handle[name][start:stop] if isinstance(handle, dict) else handle.get_slice(name)[start:stop]
