"""Files of tensors that anybody may have made: safetensors, GGUF, and pickled `.bin` or `.pth`, read without running
code.

All are memory-mapped, except for files from before PyTorch 1.6; a row is read when it is asked for.
"""

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minorca.errors import UserError
from minorca.files.gguf import GGUF
from minorca.files.pickled_tensors import read_pickled
from minorca.files.safe_io import find_file, parse_json, quote, read_json

FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
# how much of a model is in a file that is written
FILE_BYTES = 5 * 10**9
# The header of a file with 1,200 tensors has 150 thousand bytes. Parsed they take up to 60 times as much.
MAX_HEADER_BYTES = 10 * 10**6


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


# a model's weights in one file, by precedence; instead there may be an index of several, or files numbered without one
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth")


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files that hold a model's weights and, where there is an index, which file each tensor is in."""
    for name in WEIGHT_FILES:
        if found := _files_of(directory, name):
            return found
    suffixes = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack")
    found = sorted(file.name for file in directory.iterdir() if file.suffix in suffixes and file.name.isprintable())
    more = f"; found {', '.join(found[:5])}, which is not read under that name" if found else ""
    raise UserError(
        "no weights; expected model.safetensors, model.safetensors.index.json with its shards, "
        f"consolidated.safetensors, consolidated.00.pth or pytorch_model*.bin{more}",
        path=directory,
    )


def _files_of(directory: Path, name: str) -> tuple[list[Path], dict[str, Path] | None] | None:
    """The file of a name, or those that it was split into; None where there is none."""
    if single := find_file(directory, name):
        return _one_of_one(single), None
    if index := find_file(directory, f"{name}.index.json"):
        return _indexed_files(directory, index, Path(name).suffix)
    if numbered := _numbered_files(directory, name):
        return numbered, None
    return None


def _one_of_one(path: Path) -> list[Path]:
    """The file, unless it is a part of tensors that were split over processes, as consolidated.01.pth beside it is."""
    if path.suffix == ".pth" and find_file(path.parent, "consolidated.01.pth"):
        raise UserError(
            "is one of several parts of tensors that were split for tensor parallelism; convert them to Hugging Face's "
            "layout first (transformers' convert_mistral_weights_to_hf.py)",
            path=path,
        )
    return [path]


def _indexed_files(directory: Path, index: Path, suffix: str) -> tuple[list[Path], dict[str, Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("expected an object weight_map from tensor to file", path=index)
    _check_names(index, weight_map)
    for shard in weight_map.values():
        if not isinstance(shard, str):
            raise UserError(f"names the file {quote(shard)}; expected text", path=index)
    shards = {shard: _shard(directory, shard, index, suffix) for shard in dict.fromkeys(weight_map.values())}
    return sorted(shards.values()), {key: shards[shard] for key, shard in weight_map.items()}


def _numbered_files(directory: Path, name: str) -> list[Path]:
    """model-00001-of-00003.safetensors and so on, without an index: all of them, or none."""
    stem, suffix = Path(name).stem, Path(name).suffix
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    found = {match[0]: match for file in directory.iterdir() if (match := pattern.fullmatch(file.name))}
    totals = sorted({match[2] for match in found.values()})
    if not found:
        return []
    names = [f"{stem}-{number:05d}-of-{totals[0]}{suffix}" for number in range(1, len(found) + 1)]
    if len(totals) > 1 or int(totals[0]) != len(found) or set(names) != set(found):
        raise UserError(
            f"{', '.join(sorted(found)[:5])}: expected each of {totals[-1]} files once; is the download complete?",
            path=directory,
        )
    return [path for path in (find_file(directory, name) for name in names) if path]


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


def _check_download(path: Path) -> None:
    """Raises UserError where a file is what a failed download often leaves instead of weights."""
    head = path.open("rb").read(64) if path.is_file() else b""
    if head.startswith(b"version https://git-lfs"):
        raise UserError("is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)", path=path)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError("is a web page, not weights; the download went wrong", path=path)


def _open_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running code and, if it is a zip file, without reading the data yet."""
    try:
        tensors = read_pickled(path)
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


def open_tensors(path: Path):
    """A file of tensors: `open_safetensors`, the same of GGUF, or a dictionary for pickled files, none of whose code
    runs.
    """
    if path.suffix == ".gguf":
        gguf = GGUF(path)
        _check_names(path, gguf.keys())
        return gguf
    return open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


class TensorFiles:
    """The tensors of several files, by name, each in exactly one of them.

    Args:
        index: which file each tensor is in, where another file says so.
    """

    def __init__(self, files: list[Path], index: dict[str, Path] | None = None):
        self._handles = {path: open_tensors(path) for path in files}
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

        # the names that the tensors have in the files
        self._stored = {name: name for name in self.files}

    def rename(self, new_name: Callable[[str], str]) -> int:
        """Gives every tensor the name that the function makes of its own; returns how many were changed.

        Raises:
            UserError: two tensors of one name.
        """
        stored: dict[str, str] = {}
        for name in self.files:
            if (new := new_name(name)) in stored:
                raise UserError(f"{stored[new]} and {name} are both {new}; remove one", path=self.files[name])
            stored[new] = name
        self.files = {new: self.files[name] for new, name in stored.items()}
        self._stored = {new: self._stored[name] for new, name in stored.items()}
        return sum(new != name for new, name in stored.items())

    def check(self, shapes: dict[str, tuple[int, ...]], dtypes: set[str] = FLOATS) -> None:
        """Checks that the files hold exactly these tensors, by default of floating point.

        Raises:
            UserError: a tensor that is missing, unexpected or of another shape or type; names file and key.
        """
        path = next(iter(self._handles))
        for name in sorted(self.files.keys() ^ shapes.keys()):
            problem = "unexpected" if name in self.files else "missing"
            raise UserError(f"{problem} tensor {name}; was it made for another model?", path=self.files.get(name, path))
        self.check_shapes(shapes, dtypes)

    def check_shapes(self, shapes: dict[str, tuple[int, ...]], dtypes: set[str] = FLOATS) -> None:
        """Checks these tensors alone; errors as `check`."""
        for name, shape in shapes.items():
            if self.dtype(name) not in dtypes:
                expected = "a floating-point type" if dtypes == FLOATS else " or ".join(sorted(dtypes))
                message = f"is {self.dtype(name)}; expected {expected}"
                raise UserError(message, path=self.files[name], field=name)
            if self.shape(name) != shape:
                message = f"has shape {list(self.shape(name))}; expected {list(shape)}; was it made for another model?"
                raise UserError(message, path=self.files[name], field=name)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, name = self._handles[self.files[name]], self._stored[name]
        return tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        handle, name = self._handles[self.files[name]], self._stored[name]
        return str(handle[name].dtype) if isinstance(handle, dict) else handle.get_slice(name).get_dtype()

    def bytes(self, name: str) -> int:
        """What a tensor takes in memory."""
        row = self.read(name, 0, 1)
        return row.numel() * row.element_size() * self.shape(name)[0]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        handle, name = self._handles[self.files[name]], self._stored[name]
        return handle[name][start:stop] if isinstance(handle, dict) else handle.get_slice(name)[start:stop]

    def whole(self, name: str) -> Tensor:
        """All rows of a tensor."""
        return self.read(name, 0, self.shape(name)[0])


def open_weights(directory: Path) -> TensorFiles:
    """The tensors of a model's directory."""
    return TensorFiles(*_weight_files(directory))


def open_exactly(path: Path, shapes: dict[str, tuple[int, ...]], dtypes: set[str] = FLOATS) -> TensorFiles:
    """A file of exactly these tensors, or what it was split into; errors as `TensorFiles.check`."""
    files = TensorFiles(*(_files_of(path.parent, path.name) or ([path], None)))
    files.check(shapes, dtypes)
    return files


# as safetensors names them
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


class PlannedTensor(NamedTuple):
    """What a file's header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_one_file(path: Path, planned: list[PlannedTensor], values: Iterable[Tensor]) -> None:
    """Writes a safetensors file of any size, of which one tensor is in memory at a time: the header, which says where
    each is, then their bytes (the format: huggingface.co/docs/safetensors).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # so that the tensors are aligned
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(planned, values, strict=True):
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors by name to a safetensors file, or to several of `FILE_BYTES` with an index, as transformers does.

    The tensors of one file are in memory at a time.
    """
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def part(number: int) -> Path:
        return path.with_name(f"{path.stem}-{number:05d}")

    def write() -> None:
        nonlocal size
        files.append(list(pending))
        # safetensors' own writer has all of them in memory twice
        planned = [PlannedTensor(name, tensor.shape, tensor.dtype) for name, tensor in pending.items()]
        write_one_file(part(len(files)), planned, pending.values())
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > FILE_BYTES:
            write()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(files) == 1:
        part(1).rename(path)
        return
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = path.with_name(f"{path.stem}-{number:05d}-of-{len(files):05d}{path.suffix}")
        part(number).rename(file)
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
