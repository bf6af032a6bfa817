"""What is exported, whatever the format: a model's tensors, with adapters merged in where given, its tokenizer and its
chat template.

The arithmetic of merging is fp32: W + scale B A, or what merging.py makes of several adapters, rounded once. Of a
quantized base W is its values, in the dtype that it was quantized from. A tensor is made when it is asked for, so that
one is in memory at a time.
"""

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minorca import receipts
from minorca.data.chat_template import resolve_template
from minorca.data.portable_files import has_tokenizer, load_chat
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError
from minorca.export.merging import Deltas, Merge, WeightedAdapter
from minorca.files.adapters import other_base
from minorca.files.gguf import is_gguf
from minorca.files.hub import local_directory, pinned
from minorca.files.vocabulary import MatrixUpdate, adapt
from minorca.files.weights import ModelFiles, open_model
from minorca.model.layout import SourceTensor, source_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor to write.

    Attributes:
        name: Hugging Face's.
        shape, dtype: of what `make` gives.
        make: reads or computes it.
        projection: whether it is a projection of a layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    projection: bool


@dataclass(frozen=True)
class Contents:
    """A model, opened and checked, and the adapters that are merged into it.

    Attributes:
        source: with the vocabulary that the adapters make.
        merge: which adapters, and how; None: none.
        updates: what an adapter makes of which module of the vocabulary.
        tensors: all tensors under Hugging Face's names, the adapters merged in.
        tok: the tokenizer, an adapter's before the model's; None where there is none.
        template: the resolved name of the chat template; None where there is none.
        commits: the hub ids of model and adapters, each with its commit.
    """

    source: ModelFiles
    merge: Merge | None
    updates: dict[str, MatrixUpdate]
    tensors: list[ExportedTensor]
    tok: Tokenizer | None
    template: str | None
    commits: list[str]

    @property
    def merged(self) -> str:
        """What is merged in, for what a command prints."""
        return f", {self.merge} merged in" if self.merge else ""

    def receipt(self, **done: str | None) -> dict[str, Any]:
        """What the receipt of an export says.

        Args:
            done: how it is written, as type="q8_0".
        """
        adapters = [adapter.directory for adapter in self.merge.adapters] if self.merge else []
        how = done | {"merge": self.merge and self.merge.without_paths(), "hub": self.commits}
        return {"export": how} | receipts.of_weights(self.source.paths, adapters)


def check_new(output: Path) -> None:
    """Raises UserError where the directory to write exists."""
    # a broken link is one too, which a directory cannot replace
    if os.path.lexists(output):
        raise UserError("already exists; give --output a new name", path=output)


def read_contents(model: str | Path, adapters: str | Path | Merge | None) -> Contents:
    """Opens a model, and an adapter or several.

    Raises:
        UserError: what is wrong with which file; that an adapter was trained on a base that was quantized in another
            way; that two change embedding or head, or bring different tokenizers.
    """
    source, merge = open_model(model), Merge.of(adapters)
    chosen = merge.adapters if merge else ()
    for adapter in chosen:
        _check_base(source, adapter.directory)
    source, updates = _adapted(source, chosen)
    directories = [adapter.directory for adapter in chosen]
    tok, template = read_chat(source, directories)
    commits = [str(found) for found in map(pinned, (model, *directories)) if found]
    return Contents(source, merge, updates, merged_tensors(source, merge, updates), tok, template, commits)


def _adapted(source: ModelFiles, adapters: tuple[WeightedAdapter, ...]) -> tuple[ModelFiles, dict[str, MatrixUpdate]]:
    """The model with the vocabulary of the one adapter that changes it, and what becomes of which module."""
    changed_by, result = None, source
    updates: dict[str, MatrixUpdate] = {}
    for directory, weight in adapters:
        adapted, found = adapt(source, directory)
        if not found:
            continue
        if changed_by:
            raise UserError(
                f"trains embedding or head, as {changed_by} does, and two versions of a row cannot be merged; leave "
                "one of the two out",
                path=directory,
            )
        if weight != 1 and any({"whole", "rows"} & update.names.keys() for update in found.values()):
            raise UserError(
                f"trains whole rows of embedding or head, which cannot be weighted; give it without ={weight:g}",
                path=directory,
            )
        changed_by, result = directory, adapted
        updates = {module: replace(update, scale=update.scale * weight) for module, update in found.items()}
    return result, updates


def read_chat(source: ModelFiles, adapters: Sequence[str | Path]) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer and the template's name, those that an adapter brings before the model's."""
    directories = [local_directory(adapter) for adapter in adapters]
    beside = next(filter(has_tokenizer, [source.directory, *directories]), None)
    if beside is None:
        return None, None
    base = tok = load_tokenizer(beside)
    recorded: dict[str, Path] = {}
    brought_by = None
    for directory in directories:
        brought, template = load_chat(base, source.arch.vocab_size, directory)
        if template:
            recorded.setdefault(template, directory)
        if brought is base:
            continue
        if brought_by and not brought.has_ids_of(tok):
            message = f"its tokenizer gives other ids than that of {brought_by}; merge adapters of one tokenizer"
            raise UserError(message, path=directory)
        if brought_by is None:
            tok, brought_by = brought, directory
    template = next(iter(recorded), None)
    if len(recorded) > 1:
        trained = ", ".join(f"{directory} with {name}" for name, directory in recorded.items())
        log.warning("adapters were trained with different templates (%s); that of the first is written", trained)
    try:
        return tok, resolve_template(tok, template or "auto")
    except UserError as error:
        if template:
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
    unquantized = "UNQUANTIZED" if source.quantization else as_argument(source)
    raise UserError(
        f"{other}; write the base of its training, python -m minorca.export --model {unquantized} "
        f"{other.trained_on.options} --output BASE, and merge it into BASE",
        path=adapter,
    )


def as_argument(source: ModelFiles) -> str:
    """What names a model in a command line: its directory, or the GGUF file itself."""
    path = source.paths[0]
    return shlex.quote(str(path if is_gguf(path) else source.directory))


def merged_tensors(
    source: ModelFiles, merge: Merge | None, updates: dict[str, MatrixUpdate], rounded: bool = True
) -> list[ExportedTensor]:
    """All tensors of a model under Hugging Face's names, those that an adapter acts on with its update added.

    Args:
        updates: what an adapter makes of which module of the vocabulary.
        rounded: to the dtype of the model's files; else what is merged stays in fp32.

    Raises:
        UserError: while a tensor is made, that merging gives values that its dtype does not hold.
    """
    deltas = Deltas(source.arch, merge) if merge else None

    def exported(module: str, wanted: SourceTensor, tensor: SourceTensor) -> ExportedTensor:
        dtype = source.dtype(tensor)

        def make() -> Tensor:
            weight = source.read(tensor, 0, tensor.rows)
            if module in updates:
                merged = updates[module].apply(weight.float(), wanted.rows)
            else:
                merged = deltas.add(wanted.name, weight) if deltas else weight
            made = merged.to(dtype) if rounded else merged
            if merged is not weight and not made.isfinite().all():
                raise UserError(
                    f"contains NaN or infinite values with what is merged in, in {str(made.dtype)[6:]}; give the "
                    "adapters smaller weights, or a base in bfloat16",
                    path=source.directory,
                    field=wanted.name,
                )
            return made

        projection = module.startswith("layers.") and tensor.columns is not None
        return ExportedTensor(wanted.name, wanted.shape, dtype, make, projection)

    return [
        exported(module, wanted, tensor)
        for module, stacked in source_tensors(source.arch, "huggingface").items()
        for wanted, tensor in zip(stacked, source.tensors[module])
    ]
