"""A Hugging Face directory from a model in either layout, with an adapter merged in where given, quantized if asked.

One shard is in memory at a time, and the arithmetic of merging is fp32: W + scale B A, rounded once. Of a quantized
base W is its values, in the dtype that it was quantized from.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minorca.data.chat_template import resolve_template
from minorca.data.portable_files import has_tokenizer, load_chat, portable_files, tokenizer_files, write_files
from minorca.data.tokenizer import load_tokenizer
from minorca.errors import UserError
from minorca.export.effect import share_kept
from minorca.files import bitsandbytes
from minorca.files.adapters import open_adapter, other_base, read_adapter_settings
from minorca.files.atomic import publish
from minorca.files.safe_io import find_file, read_json, user_path
from minorca.files.tensor_files import write_tensors
from minorca.files.vocabulary import MatrixUpdate, adapt
from minorca.files.weights import ModelFiles, check_quantizable, open_model
from minorca.model.architecture import Architecture
from minorca.model.build import build_model
from minorca.model.layout import SourceTensor, projections, source_tensors
from minorca.model.lora import adapter_parameters, add_adapters
from minorca.model.quantization import Quantization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor to write: its name, what makes it, and whether it is a projection of a layer."""

    name: str
    make: Callable[[], Tensor]
    projection: bool


def export(
    model: str | Path, adapter: str | Path | None, output: Path, quantization: Quantization | None = None
) -> None:
    """Writes config, tokenizer and weights to `output`, which appears when it is complete.

    Args:
        quantization: of the projections that are written; None: as they are, and those of a quantized model as values.

    Raises:
        UserError: what is wrong with which file, that `output` exists, or that the adapter was trained on a base that
            was quantized in another way.
    """
    if output.exists():
        raise UserError("already exists; give --output a new name", path=output)
    source = open_model(model)
    if adapter is not None:
        _check_base(source, adapter)
    elif source.quantization and quantization:
        raise UserError(f"is already stored in {source.quantization}", path=source.directory)
    if quantization:
        check_quantizable(source.arch, source.directory)
    source, updates = adapt(source, adapter) if adapter else (source, {})
    tensors = merged_tensors(source, adapter, updates)
    files = _files_beside(source, adapter)

    def write(temporary: Path) -> None:
        found = find_file(source.directory, "config.json")
        if found and not (updates or source.quantization or quantization):
            shutil.copy(found, temporary)
        else:
            (temporary / "config.json").write_bytes(config_file(source, tensors[0].make().dtype, quantization))
        write_files(temporary, files)
        stored = (pair for tensor in tensors for pair in _stored(tensor, quantization).items())
        write_tensors(temporary / "model.safetensors", stored)

    publish(output, write)
    merged = f", {adapter} merged in" if adapter else ""
    print(f"{output}: {len(tensors)} tensors{merged}{f', in {quantization}' if quantization else ''}")
    if adapter is not None and quantization:
        # embedding and head, which are not quantized, count as the adapter made them
        _print_effect(source.arch, merged_tensors(source, None, updates), tensors, output)


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


def _print_effect(arch: Architecture, base: list[ExportedTensor], merged: list[ExportedTensor], output: Path) -> None:
    quantized = merged_tensors(open_model(output), None, {})
    weights = ({tensor.name: tensor.make for tensor in found} for found in (base, merged, quantized))
    share = share_kept(arch, *weights)
    if share is None:
        print("the adapter changes no logits")
    else:
        print(f"quantizing again keeps {share:.0%} of the adapter's change of the logits")


def _files_beside(source: ModelFiles, adapter: str | Path | None) -> dict[str, bytes]:
    """Tokenizer, chat template and stop ids, those that the adapter brings before the model's, by file name."""
    directory = source.directory
    brought = [] if adapter is None else [user_path(adapter)]
    beside = next(filter(has_tokenizer, [directory, *brought]), None)
    if beside is None:
        return tokenizer_files(directory)
    tok, recorded = load_chat(load_tokenizer(beside), source.arch.vocab_size, adapter)
    try:
        template = resolve_template(tok, recorded or "auto")
    except UserError as error:
        if recorded:
            raise
        log.warning("no chat template is written: %s", error)
        template = None
    return portable_files(tok, template, directory)


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


def config_file(source: ModelFiles, dtype: torch.dtype, quantization: Quantization | None = None) -> bytes:
    """config.json of a model whose weights are written in `dtype`, or projections quantized from it; it may have more
    ids than its files, and a head of its own.
    """
    path = find_file(source.directory, "config.json")
    config = read_json(path) if path else config_json(source.arch, dtype)
    config.pop("quantization_config", None)
    if quantization:
        config["quantization_config"] = bitsandbytes.config(quantization, dtype)
    # transformers 5 calls it dtype
    key = "dtype" if "dtype" in config else "torch_dtype"
    config |= {"vocab_size": source.arch.vocab_size, "tie_word_embeddings": source.arch.tied}
    return (json.dumps(config | {key: str(dtype).removeprefix("torch.")}, indent=2) + "\n").encode()


def _stored(tensor: ExportedTensor, quantization: Quantization | None) -> dict[str, Tensor]:
    """The tensors of a file that hold one of the model."""
    value = tensor.make().contiguous()
    if quantization and tensor.projection:
        return bitsandbytes.quantized_tensors(tensor.name, value, quantization)
    return {tensor.name: value}


def config_json(arch: Architecture, dtype: torch.dtype) -> dict:
    """config.json of a network that came with params.json, as transformers 4 and 5 both read it."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "sliding_window": arch.window,
        "tie_word_embeddings": arch.tied,
        "max_position_embeddings": arch.max_positions or 32768,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
