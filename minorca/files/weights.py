"""Weights in and out of files: name maps, shards, and slices read straight into the model's parameters.

Reads Hugging Face's safetensors (single or sharded), `.bin` shards, and Mistral's consolidated.safetensors, all of them
mapped into memory; each rank copies only the rows it keeps, once, from the mapped file to its device. The network stores
its projections stacked (q, k and v in one), the files do not: a parameter is made of `SourceTensor`s, one a tensor in the files.
"""

import logging
import pickle
import pickletools
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from minorca.errors import UserError
from minorca.files.safe_io import find_file, parse_json, quote, read_json
from minorca.model.architecture import Architecture

log = logging.getLogger(__name__)

ROWS = 1024  # copied at a time, of a 7B model 8 MB: all the host holds of weights for another device
FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
# The header of a file with 1,200 tensors has 150 thousand bytes, the pickle of one 250 thousand. Parsed they take up to 60 times as much.
HEADER_BYTES = 10 * 10**6
# all that a state dict of plain tensors needs, as `torch.save` writes it
PICKLED = {
    "collections OrderedDict",
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")),
}
PICKLED |= {
    f"torch {kind}Storage"
    for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
PICKLED |= {"torch.storage UntypedStorage", "torch float8_e4m3fn", "torch float8_e5m2"}  # to be refused by name


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the files: `rows` of a stacked parameter; `heads` where its rows lie in Mistral's interleaved order."""

    name: str
    rows: int
    heads: int = 0


def huggingface_tensors(arch: Architecture) -> dict[str, list[SourceTensor]]:
    """Parameter name -> the tensors of Hugging Face's layout it stacks, in order."""
    attended, kv, inner, hidden = (
        arch.heads * arch.head_dim,
        arch.kv_heads * arch.head_dim,
        arch.intermediate_size,
        arch.hidden_size,
    )
    pieces = {"embedding.weight": [SourceTensor("model.embed_tokens.weight", arch.vocab_size)]}
    for i in range(arch.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        heads = {"q": attended, "k": kv, "v": kv}
        pieces |= {
            f"{ours}.attention_norm.weight": [SourceTensor(f"{theirs}.input_layernorm.weight", hidden)],
            f"{ours}.qkv.weight": [
                SourceTensor(f"{theirs}.self_attn.{name}_proj.weight", rows) for name, rows in heads.items()
            ],
            f"{ours}.o.weight": [SourceTensor(f"{theirs}.self_attn.o_proj.weight", hidden)],
            f"{ours}.mlp_norm.weight": [SourceTensor(f"{theirs}.post_attention_layernorm.weight", hidden)],
            f"{ours}.gate_up.weight": [
                SourceTensor(f"{theirs}.mlp.{name}_proj.weight", inner) for name in ("gate", "up")
            ],
            f"{ours}.down.weight": [SourceTensor(f"{theirs}.mlp.down_proj.weight", hidden)],
        }
    pieces["norm.weight"] = [SourceTensor("model.norm.weight", hidden)]
    if not arch.tied:
        pieces["head.weight"] = [SourceTensor("lm_head.weight", arch.vocab_size)]
    return pieces


def mistral_tensors(arch: Architecture) -> dict[str, list[SourceTensor]]:
    """The same for Mistral's own layout, whose query and key rows are interleaved."""
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
        **{f"mlp.{x}_proj": f"feed_forward.{w}" for x, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))},
    }

    def native(piece: SourceTensor) -> SourceTensor:
        heads = arch.heads if "q_proj" in piece.name else arch.kv_heads if "k_proj" in piece.name else 0
        name = piece.name
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        return SourceTensor(name, piece.rows, heads)

    return {name: [native(piece) for piece in pieces] for name, pieces in huggingface_tensors(arch).items()}


# ---------------------------------------------------------------------------------------------------------- files


def _check_names(path: Path, names) -> None:
    """UserError for a tensor's name that cannot be shown: messages hold names, and terminals obey control characters."""
    for name in names:
        if not isinstance(name, str) or len(name) > 500 or not name.isprintable():
            raise UserError(f"names a tensor {quote(name)}; expected at most 500 printable characters", path=path)


def _shard(directory: Path, name: str, index: Path, suffix: str) -> Path:
    """The path of a shard that an index names: a file in the index's own directory, of the kind that the index is for."""
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
    """`safe_open`, with complaints that name the file and say what it is instead, and of a name that is there twice."""
    try:
        if find_file(path.parent, path.name) is None:
            raise FileNotFoundError("no such file")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes; expected at most {HEADER_BYTES}")
            handle = safe_open(path, framework="pt")
            parse_json(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        _refuse_what_is_no_weights(path)
        raise UserError(f"not a whole safetensors file ({str(error)[:300]}); download it again", path=path) from None
    _check_names(path, handle.keys())
    return handle


def open_exactly(path: Path, shapes: dict[str, tuple[int, ...]]):
    """A safetensors file, opened, once it is sure to hold just these tensors, of floating point.

    Raises:
        UserError: a tensor that is missing, surplus or of another shape or kind; names file and key.
    """
    file = open_safetensors(path)
    keys = set(file.keys())
    for name in sorted(keys ^ set(shapes)):
        raise UserError(f"{'holds' if name in keys else 'lacks'} {name}; was it made for another model?", path=path)
    for name, shape in shapes.items():
        held = file.get_slice(name)
        if held.get_dtype() not in FLOATS:
            raise UserError(f"{name} is {held.get_dtype()}; expected a floating-point type", path=path)
        if tuple(held.get_shape()) != shape:
            raise UserError(
                f"{name} has shape {held.get_shape()}; this model's has {list(shape)}; was it made for another one?",
                path=path,
            )
    return file


def _refuse_what_is_no_weights(path: Path) -> None:
    """A `UserError` that says so where a file is what downloads often leave instead of weights."""
    head = path.open("rb").read(64) if path.is_file() else b""
    if head.startswith(b"version https://git-lfs"):
        raise UserError("is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)", path=path)
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError("is a web page, not weights; the download went wrong", path=path)


def _refuse_surprises(path: Path) -> None:
    """UnpicklingError where a .bin asks for more than a dictionary of plain tensors. PyTorch runs no code either, but takes
    what memory the pickle asks for (bytearray(10**12), or a record that unpacks to a thousand times its size)."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            is_pickle = record.filename.endswith("data.pkl")
            if record.compress_type != zipfile.ZIP_STORED or (is_pickle and record.file_size > HEADER_BYTES):
                raise pickle.UnpicklingError
            for opcode, argument, _ in pickletools.genops(archive.read(record)) if is_pickle else ():
                if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX") or opcode.name.startswith(
                    "EXT"
                ):
                    raise pickle.UnpicklingError
                if opcode.name == "GLOBAL" and argument not in PICKLED:
                    raise pickle.UnpicklingError


def _open_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, read without running code and without reading the data yet (memory-mapped)."""
    try:
        _refuse_surprises(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's own message tells how to run the code
        raise UserError(
            "cannot be read without running code that it holds; use the model's safetensors files", path=path
        ) from None
    except Exception as error:  # torch has no common error for files that are cut or of another kind
        _refuse_what_is_no_weights(path)
        reason = str(error).partition("\n")[0][:300]
        raise UserError(f"cannot be read as PyTorch weights ({reason}); download it again", path=path) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError("expected a dictionary of tensors", path=path)
    _check_names(path, tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if (
        size > 2 * path.stat().st_size
    ):  # views show one number as many; twice, for a head may share its storage with the embedding
        raise UserError(
            f"its tensors take {size} bytes, far more than it has; use the model's safetensors files", path=path
        )
    return tensors


class WeightFiles:
    """The tensors of a model's directory, by name, each in exactly one file."""

    def __init__(self, directory: Path):
        self.directory = directory
        files, index = _weight_files(directory)
        self._handles = {path: _open_bin(path) if path.suffix == ".bin" else open_safetensors(path) for path in files}
        self.files: dict[str, Path] = {}
        for path, handle in self._handles.items():
            for name in handle.keys():
                if name in self.files:
                    raise UserError(
                        f"holds {name}, which {self.files[name].name} holds too; expected it once", path=path
                    )
                self.files[name] = path
        for name, path in (index or {}).items():
            if self.files.get(name) != path:
                raise UserError(f"does not hold {name}, which the index says it does", path=path)
        if index is not None and (surplus := sorted(set(self.files) - set(index))):
            raise UserError(f"holds {surplus[0]}, which the index does not name", path=self.files[surplus[0]])

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


def open_weights(directory: Path, arch: Architecture) -> tuple[WeightFiles, dict[str, list[SourceTensor]]]:
    """A model's files and the pieces its parameters are made of, both checked against each other.

    Raises:
        UserError: a tensor that is missing, surplus, of another shape, or not floating point; names file and key.
    """
    files = WeightFiles(directory)
    if arch.layers > len(files.files):  # before a table of all their tensors
        raise UserError(
            f"holds {len(files.files)} tensors; the configuration says {arch.layers} layers of nine each",
            path=directory,
        )
    native = "tok_embeddings.weight" in files.files
    pieces = mistral_tensors(arch) if native else huggingface_tensors(arch)
    expected = {
        piece.name: (piece.rows,) if "norm" in name else (piece.rows, _columns(arch, name))
        for name, parts in pieces.items()
        for piece in parts
    }
    if missing := [name for name in expected if name not in files.files]:
        raise UserError(
            f"no file holds {missing[0]} (and {len(missing) - 1} more are missing); is the download complete?",
            path=directory,
        )
    for name in sorted(set(files.files) - set(expected)):
        _check_surplus(
            files, name, arch, "output.weight" if native else "lm_head.weight", pieces["embedding.weight"][0].name
        )
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise UserError(
                f"{name} has shape {list(files.shape(name))}; the configuration says {list(shape)}",
                path=files.files[name],
            )
        if (dtype := files.dtype(name)) not in FLOATS:
            raise UserError(
                f"{name} is {dtype}; expected unquantised weights in bf16, fp16 or fp32", path=files.files[name]
            )
    return files, pieces


def _columns(arch: Architecture, parameter: str) -> int:
    if parameter.endswith(".o.weight"):
        return arch.heads * arch.head_dim
    return arch.intermediate_size if parameter.endswith(".down.weight") else arch.hidden_size


def _check_surplus(files: WeightFiles, name: str, arch: Architecture, head: str, embedding: str) -> None:
    if name.endswith(
        "rotary_emb.inv_freq"
    ):  # a buffer that old versions of transformers saved; follows from rope_theta
        return
    if arch.tied and name == head and files.shape(name) == files.shape(embedding):
        if torch.equal(files.read(name, 0, arch.vocab_size), files.read(embedding, 0, arch.vocab_size)):
            return
        raise UserError(f"{name} differs from {embedding}, but the configuration ties them", path=files.files[name])
    raise UserError(f"holds {name}, which this network has no place for", path=files.files[name])


# -------------------------------------------------------------------------------------------------------- loading


def _own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank keeps, of a DTensor maybe none, and which row of the whole is their first."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), offset[0]


def fill_rows(parameter: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Copies rows into a parameter, of a DTensor only this rank's own. `read(start, stop)` gives rows of the whole."""
    local, start = _own_rows(parameter)
    if len(local):
        local.copy_(read(start, start + len(local)))


def read_source_tensor(files: WeightFiles, piece: SourceTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a piece, in Hugging Face's order. Mistral's own rotary layout pairs rows (2i, 2i + 1) of a head,
    Hugging Face's (i, i + D/2)."""
    if not piece.heads:
        return files.read(piece.name, start, stop)
    order = torch.arange(piece.rows).view(piece.heads, -1, 2).transpose(1, 2).flatten()
    return files.read(piece.name, 0, piece.rows)[order[start:stop]]


def load_weights(model: nn.Module, files: WeightFiles, pieces: dict[str, list[SourceTensor]]) -> str:
    """Fills a model's base parameters (adapters are left alone), sharded or not, from what `open_weights` has checked. Returns, in
    words, how much was read, and how fast.

    No tensor is made whole on the host beside the parameter: a block of rows is, where the device wants another dtype or
    Mistral's order has to be mended."""
    started, size = time.perf_counter(), 0
    parameters = dict(model.named_parameters())
    for name, parts in pieces.items():
        local, start = _own_rows(parameters[name])
        first = -start  # where in `local` a piece begins
        for piece in parts:
            stop = min(piece.rows, len(local) - first)
            for a in range(max(0, -first), stop, ROWS):
                b = min(a + ROWS, stop)
                rows = read_source_tensor(files, piece, a, b)
                local[first + a : first + b].copy_(rows)
                size += rows.nbytes
            first += piece.rows
    seconds = time.perf_counter() - started
    told = f"{size / 1e9:.2f} GB in {seconds:.2f} s, {size / seconds / 1e9:.1f} GB/s"
    log.info("model: %s", told)
    return told
