"""What is exported, whatever the format: a model's tensors, with an adapter merged in where given, its tokenizer and
its chat template.

The arithmetic of merging is fp32: W + scale B A, rounded once. Of a quantized base W is its values, in the dtype that
it was quantized from. A tensor is made when it is asked for, so that one is in memory at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minorca.data.chat_template import resolve_template
from minorca.data.portable_files import has_tokenizer, load_chat
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError
from minorca.files.adapters import open_adapter, other_base, read_adapter_settings
from minorca.files.safe_io import user_path
from minorca.files.vocabulary import MatrixUpdate, adapt
from minorca.files.weights import ModelFiles, open_model
from minorca.model.architecture import Architecture
from minorca.model.build import build_model
from minorca.model.layout import SourceTensor, projections, source_tensors
from minorca.model.lora import adapter_parameters, add_adapters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor to write: its name, what makes it, and whether it is a projection of a layer."""

    name: str
    make: Callable[[], Tensor]
    projection: bool


@dataclass(frozen=True)
class Contents:
    """A model, opened and checked, and the adapter that is merged into it.

    Attributes:
        source: with the vocabulary that the adapter makes.
        adapter: its directory.
        updates: what the adapter makes of which module of the vocabulary.
        tensors: all tensors under Hugging Face's names, the adapter merged in.
        tok: the tokenizer, the adapter's before the model's; None where there is none.
        template: the resolved name of the chat template; None where there is none.
    """

    source: ModelFiles
    adapter: str | Path | None
    updates: dict[str, MatrixUpdate]
    tensors: list[ExportedTensor]
    tok: Tokenizer | None
    template: str | None

    @property
    def merged(self) -> str:
        """What is merged in, for what a command prints."""
        return f", {self.adapter} merged in" if self.adapter else ""


def read_contents(model: str | Path, adapter: str | Path | None) -> Contents:
    """Opens a model and an adapter.

    Raises:
        UserError: what is wrong with which file, or that the adapter was trained on a base that was quantized in
            another way.
    """
    source = open_model(model)
    if adapter is not None:
        _check_base(source, adapter)
    source, updates = adapt(source, adapter) if adapter else (source, {})
    tok, template = read_chat(source, adapter)
    return Contents(source, adapter, updates, merged_tensors(source, adapter, updates), tok, template)


def read_chat(source: ModelFiles, adapter: str | Path | None) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer and the template's name, those that the adapter brings before the model's."""
    brought = [] if adapter is None else [user_path(adapter)]
    beside = next(filter(has_tokenizer, [source.directory, *brought]), None)
    if beside is None:
        return None, None
    tok, recorded = load_chat(load_tokenizer(beside), source.arch.vocab_size, adapter)
    try:
        return tok, resolve_template(tok, recorded or "auto")
    except UserError as error:
        if recorded:
            raise
        log.warning("no chat template is written: %s", error)
        return tok, None


def _check_base(source: ModelFiles, adapter: str | Path) -> None:
    """Raises UserError where an adapter was trained on a base that was quantized in another way than the model."""
    other = other_base(adapter, source.quantization)
    if other is None:
        return
    if other.trained_on is None:
        raise UserError(f"{other}; merge it into the unquantized model", path=adapter)
    unquantized = "UNQUANTIZED" if source.quantization else source.directory
    raise UserError(
        f"{other}; write the base of its training, python -m minorca.export --model {unquantized} "
        f"{other.trained_on.options} --output BASE, and merge it into BASE",
        path=adapter,
    )


def merged_tensors(
    source: ModelFiles, adapter: str | Path | None, updates: dict[str, MatrixUpdate]
) -> list[ExportedTensor]:
    """All tensors of a model under Hugging Face's names, those that an adapter acts on with its update added.

    updates: what the adapter makes of which module of the vocabulary.
    """
    merge = _merge(source.arch, adapter) if adapter else lambda name, weight: weight

    def exported(module: str, name: str, tensor: SourceTensor, rows: int) -> ExportedTensor:
        def make() -> Tensor:
            weight = source.read(tensor, 0, tensor.rows)
            return updates[module].apply(weight, rows) if module in updates else merge(name, weight)

        projection = module.startswith("layers.") and tensor.columns is not None
        return ExportedTensor(name, make, projection)

    return [
        exported(module, wanted.name, tensor, wanted.rows)
        for module, stacked in source_tensors(source.arch, "huggingface").items()
        for wanted, tensor in zip(stacked, source.tensors[module])
    ]


def _merge(arch: Architecture, adapter: str | Path) -> Callable[[str, Tensor], Tensor]:
    """A function of a tensor's name and value that adds the adapter's update, if there is one for it."""
    settings = read_adapter_settings(adapter).of_projections()
    model = build_model(arch, torch.float32)
    add_adapters(model, settings)
    file = open_adapter(adapter, adapter_parameters(model))
    updates = {
        part.tensor_name(layer, "huggingface"): (part.peft_name(layer, "A"), part.peft_name(layer, "B"), chosen.scale)
        for layer in range(arch.layers)
        for parts in projections(arch).values()
        for part in parts
        if (chosen := settings.part(layer, part.name))
    }

    def merge(name: str, weight: Tensor) -> Tensor:
        if name not in updates:
            return weight
        *matrices, scale = updates[name]
        a, b = (file.read(matrix, 0, file.shape(matrix)[0]).float() for matrix in matrices)
        return weight.float().add_(b @ a, alpha=scale).to(weight.dtype)

    return merge
