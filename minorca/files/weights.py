"""A model's weights, from its files into its modules.

Reads Hugging Face's safetensors and `.bin` files and Mistral's consolidated ones, single or sharded, those that
bitsandbytes quantized, and llama.cpp's GGUF files. Each rank copies only the rows it stores, once, from the mapped file
to its device.
"""

import functools
import logging
import math
import time
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minorca.errors import UserError
from minorca.files.bitsandbytes import NF4Tensor, names_beside, open_quantized, stored_quantization
from minorca.files.gguf import is_gguf
from minorca.files.safe_io import user_path
from minorca.files.tensor_files import FLOATS, TensorFiles, open_weights
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.layout import (
    LAYOUTS,
    Layout,
    ProjectionSpec,
    SourceTensor,
    outside_name,
    projections,
    source_tensors,
    unwrapped_name,
)
from minorca.model.network import RMSNorm
from minorca.model.projection import Projection
from minorca.model.quantization import Quantization
from minorca.model.row_order import huggingface_order
from minorca.model.vocabulary import VocabularyMatrix
from minorca.progress import progress_bar
from minorca_kernels import FrozenWeight, NF4Weight, fill_rows
from minorca_kernels.nf4 import BLOCK

log = logging.getLogger(__name__)

# Rows are copied so many at a time: of a 7B model 8 MB, which is all that the host holds of weights for another device.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory, opened, and checked against its configuration.

    Attributes:
        tensors: module of the network -> the tensors that its weight stacks, in order.
        new_ids: what a run adds to the vocabulary; no file has rows for them, or only such that pad it.
    """

    directory: Path
    arch: Architecture
    files: TensorFiles
    tensors: dict[str, list[SourceTensor]]
    # the projections that the files hold quantized, by their tensors' names
    quantized: dict[str, NF4Tensor] = field(default_factory=dict)
    # how the model's projections are stored
    quantization: Quantization | None = None
    new_ids: range = range(0)

    @property
    def paths(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted(set(self.files.files.values()))

    def with_new_ids(self, ids: range) -> "ModelFiles":
        """The same model with rows for ids that follow those of its tokenizer."""
        vocab_size = max(self.arch.vocab_size, ids.stop)
        return replace(self, arch=replace(self.arch, vocab_size=vocab_size), new_ids=ids)

    def untied(self) -> "ModelFiles":
        """The same model with a head of its own, which is equal to the embedding where they were tied."""
        tensors = {"head": self.tensors["embedding"]} | self.tensors
        return replace(self, arch=replace(self.arch, tied=False), tensors=tensors)

    def mean_row(self, module: str) -> Tensor:
        """The mean [H] of the rows before the new ids, in fp32, with which those start; the same on every rank."""
        (tensor,) = self.tensors[module]
        rows = min(tensor.rows, self.new_ids.start)
        blocks = (self.read(tensor, start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS))
        return (torch.stack([block.double().sum(0) for block in blocks]).sum(0) / rows).float()

    def read(self, tensor: SourceTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in Hugging Face's order, of a quantized one their values."""
        if tensor.name in self.quantized:
            return self.quantized[tensor.name].read(start, stop)
        if not tensor.rotary_heads:
            return self.files.read(tensor.name, start, stop)
        # whole heads
        size = tensor.rows // tensor.rotary_heads
        first, last = start // size * size, -(-stop // size) * size
        order = huggingface_order(last - first, (last - first) // size)
        return self.files.read(tensor.name, first, last)[order[start - first : stop - first]]

    def dtype(self, tensor: SourceTensor) -> torch.dtype:
        """Of what `read` gives."""
        if tensor.name in self.quantized:
            return self.quantized[tensor.name].dtype
        return self.files.read(tensor.name, 0, 1).dtype

    def bytes(self, tensor: SourceTensor) -> int:
        """What `read` gives of a whole tensor."""
        if tensor.name in self.quantized:
            return math.prod(tensor.shape) * self.quantized[tensor.name].dtype.itemsize
        return self.files.bytes(tensor.name)


def open_model(path: str | Path, quantization: Quantization | None = None) -> ModelFiles:
    """Opens a model's directory and checks its tensors, before any memory is taken for them.

    Args:
        quantization: how to quantize the projections while they load; None: not, but those of files that bitsandbytes
            quantized stay so.

    Raises:
        UserError: a configuration that is invalid; a tensor that is missing, unexpected, of another shape, or not
        floating
            point; names file and key.
    """
    directory = model_directory(path, weights=True)
    arch = read_architecture(directory)
    file = user_path(path)
    files = TensorFiles([file]) if is_gguf(file) else open_weights(directory)
    # compared before a table of all their tensors is made
    if arch.layers > len(files.files):
        raise UserError(
            f"holds {len(files.files)} tensors; the configuration says {arch.layers} layers of nine each",
            path=directory,
        )
    _unwrap_names(files, directory)
    layout = _layout(files)
    tensors = source_tensors(arch, layout)
    expected = {tensor.name: tensor for stacked in tensors.values() for tensor in stacked}
    shapes = _quantized_shapes(directory, tensors)
    beside = {other for name in shapes for other in names_beside(name)}
    unexpected = sorted(set(files.files) - set(expected) - beside)
    if missing := [name for name in expected if name not in files.files]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        # the one with most of the ending in common
        similar = max(unexpected, key=lambda name: len(commonprefix([name[::-1], missing[0][::-1]])), default=None)
        hint = f"; found {similar}, which is not a name of this network" if similar else "; is the download complete?"
        raise UserError(f"missing tensor {missing[0]}{more}{hint}", path=directory)
    for name in unexpected:
        _check_unexpected(files, name, arch, layout)
    for name, tensor in expected.items():
        if name in shapes:
            continue
        file = files.files[name]
        if files.shape(name) != tensor.shape:
            found, wanted = list(files.shape(name)), list(tensor.shape)
            raise UserError(f"has shape {found}; the configuration says {wanted}", path=file, field=name)
        if (dtype := files.dtype(name)) not in FLOATS:
            raise UserError(f"is {dtype}; expected unquantized weights in bf16, fp16 or fp32", path=file, field=name)
    if shapes or quantization:
        check_quantizable(arch, directory)
    quantized = open_quantized(files, shapes)
    if quantized:
        stored = next(iter(quantized.values())).quantization
        if quantization not in (None, stored):
            raise UserError(
                f"is stored in {stored}, and {quantization} was asked for; load it as it is", path=directory
            )
        quantization = stored
    return ModelFiles(directory, arch, files, tensors, quantized, quantization)


def _layout(files: TensorFiles) -> Layout:
    for layout in LAYOUTS:
        if outside_name("embedding", layout) in files.files:
            return layout
    return "huggingface"


def check_quantizable(arch: Architecture, directory: Path) -> None:
    """Raises UserError where the rows of a projection are not made of whole blocks."""
    if projection := not_quantizable(arch):
        raise UserError(
            f"cannot be quantized to nf4: the rows of {projection.huggingface_name} have {projection.in_features} "
            f"values, which is not a multiple of {BLOCK}; use the model unquantized",
            path=directory,
        )


def not_quantizable(arch: Architecture) -> ProjectionSpec | None:
    """A projection whose rows are not made of whole blocks; None where all are."""
    specs = (parts[0] for parts in projections(arch).values())
    return next((spec for spec in specs if spec.in_features % BLOCK), None)


def _quantized_shapes(directory: Path, tensors: dict[str, list[SourceTensor]]) -> dict[str, tuple[int, int]]:
    """The names and shapes of the layers' projections, where config.json says that bitsandbytes quantized them."""
    if not stored_quantization(directory):
        return {}
    return {
        tensor.name: (tensor.rows, tensor.columns)
        for module, stacked in tensors.items()
        if module.startswith("layers.")
        for tensor in stacked
        if tensor.columns is not None
    }


def _unwrap_names(files: TensorFiles, directory: Path) -> None:
    """Names the tensors as the network does, where they were saved from within another module."""
    for name, file in files.files.items():
        if "lora_" in name:
            raise UserError(
                f"{name} belongs to an adapter: a PEFT model was saved whole; merge the adapter first (PEFT's "
                f"merge_and_unload, then save_pretrained), or give the base as model and the adapter as adapter",
                path=file,
            )
    example = next((name for name in files.files if unwrapped_name(name) != name), None)
    renamed = files.rename(unwrapped_name)
    if "embed_tokens.weight" in files.files:
        # saved without a head, from within the model that has one
        example = example or "embed_tokens.weight"
        renamed += files.rename(lambda name: name if name.startswith("lm_head.") else f"model.{name}")
    if example:
        log.info("%s: read without the prefixes of %d names, such as that of %s", directory, renamed, example)


def _check_unexpected(files: TensorFiles, name: str, arch: Architecture, layout: Layout) -> None:
    """Raises UserError for a tensor that the network does not have, but for those that change nothing."""
    # a buffer that old versions saved; it follows from rope_theta
    if name.endswith("rotary_emb.inv_freq") or name == "rope.freqs":
        return
    file = files.files[name]
    embedding = outside_name("embedding", layout)
    if arch.tied and name == outside_name("head", layout) and files.shape(name) == files.shape(embedding):
        if torch.equal(files.read(name, 0, arch.vocab_size), files.read(embedding, 0, arch.vocab_size)):
            return
        raise UserError(f"differs from {embedding}, but the configuration ties them", path=file, field=name)
    raise UserError(f"unexpected tensor {name}: this network does not have it", path=file)


def load_weights(model: nn.Module, source: ModelFiles) -> None:
    """Fills a model's weights, sharded or not; adapters are left alone. Logs how much was read, and how fast.

    No tensor is made whole on the host beside the weight: a block of rows is, where the device wants another dtype or
    the rows another order.
    """
    started = time.perf_counter()
    size = 0
    weights = {name: _weight_of(model, name) for name in source.tensors}
    total = sum(_own_bytes(weights[name], source, tensors) for name, tensors in source.tensors.items())
    with progress_bar("loading weights", total, "B") as loaded:
        for name, tensors in source.tensors.items():
            weight = weights[name]
            if isinstance(weight, NF4Weight):
                size += _store_quantized(weight, source, tensors, loaded)
            elif isinstance(weight, FrozenWeight):
                size += _store_rows(weight, source, tensors, loaded)
                if isinstance(weight, VocabularyMatrix) and source.new_ids:
                    _store_mean(weight, source.mean_row(name), source.new_ids)
            elif isinstance(weight, RMSNorm):
                fill_rows(weight.weight, lambda start, stop, tensor=tensors[0]: source.read(tensor, start, stop))
                size += source.files.bytes(tensors[0].name)
    seconds = time.perf_counter() - started
    log.info("model: %.2f GB in %.2f s, %.1f GB/s", size / 1e9, seconds, size / seconds / 1e9)


def _weight_of(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base if isinstance(module, Projection) else module


def _own_bytes(weight: nn.Module, source: ModelFiles, tensors: list[SourceTensor]) -> int:
    """What this rank reads of a weight: of one that is quantized while it loads, all rows."""
    size = sum(map(source.bytes, tensors))
    if isinstance(weight, NF4Weight) or not isinstance(weight, FrozenWeight):
        return size
    start, stop = weight.local_rows()
    return size * (stop - start) // weight.out_features


def _store_mean(weight: VocabularyMatrix, mean_H: Tensor, ids: range) -> None:
    """Has the rows of new ids start as the mean of the others."""
    start, stop = weight.local_rows()
    own = range(max(start, ids.start), min(stop, ids.stop))
    if own:
        weight.store_rows(own.start, mean_H.expand(len(own), -1))
    if weight.rows is not None:
        fill_rows(weight.rows.values_NH, lambda start, stop: mean_H.expand(stop - start, -1))


def _store_rows(weight: FrozenWeight, source: ModelFiles, tensors: list[SourceTensor], loaded: tqdm) -> int:
    """Reads the rows that this rank stores of a stacked weight, block by block; returns how many bytes it read."""
    own_start, own_stop = weight.local_rows()
    size = 0
    first = 0  # where in the stacked weight a tensor begins
    for tensor in tensors:
        stop = min(tensor.rows, own_stop - first)
        for start in range(max(0, own_start - first), stop, BLOCK_ROWS):
            rows = source.read(tensor, start, min(start + BLOCK_ROWS, stop))
            weight.store_rows(first + start, rows)
            size += rows.nbytes
            loaded.update(rows.nbytes)
        first += tensor.rows
    return size


def _store_quantized(weight: NF4Weight, source: ModelFiles, tensors: list[SourceTensor], loaded: tqdm) -> int:
    """Quantizes the parts of a stacked weight while they are read, or stores what the files hold quantized; returns how
    many bytes were read.
    """
    size = 0
    for part, tensor in enumerate(tensors):
        if stored := source.quantized.get(tensor.name):
            weight.store_quantized_part(part, stored.whole())
            loaded.update(source.bytes(tensor))
        else:
            weight.store_part(part, functools.partial(_read_counted, source, tensor, loaded))
        size += source.files.bytes(tensor.name)
    return size


def _read_counted(source: ModelFiles, tensor: SourceTensor, loaded: tqdm, start: int, stop: int) -> Tensor:
    rows = source.read(tensor, start, stop)
    loaded.update(rows.nbytes)
    return rows
