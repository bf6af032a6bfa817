"""A Hugging Face directory, quantized if asked. One shard is in memory at a time."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minorca.data.portable_files import portable_files, tokenizer_files
from minorca.errors import UserError
from minorca.export.contents import ExportedTensor, check_new, merged_tensors, read_contents
from minorca.export.effect import print_effect, readers, rounding
from minorca.export.merging import Merge
from minorca.files import bitsandbytes
from minorca.files.atomic import publish, write_files
from minorca.files.safe_io import find_file, read_json
from minorca.files.tensor_files import write_tensors
from minorca.files.weights import ModelFiles, check_quantizable, open_model
from minorca.model.architecture import Architecture
from minorca.model.quantization import Quantization
from minorca.progress import progress
from minorca.receipts import write_receipt


def export(
    model: str | Path, adapter: str | Path | Merge | None, output: Path, quantization: Quantization | None = None
) -> None:
    """Writes config, tokenizer and weights to `output`, which appears when it is complete.

    Args:
        adapter: what is merged in.
        quantization: of the projections that are written; None: as they are, and those of a quantized model as values.

    Raises:
        UserError: what is wrong with which file, that `output` exists, or that adapters cannot be merged (as
            `read_contents`).
    """
    check_new(output)
    contents = read_contents(model, adapter)
    source, tensors = contents.source, contents.tensors
    if quantization:
        if contents.merge is None and source.quantization:
            raise UserError(f"is already stored in {source.quantization}", path=source.directory)
        check_quantizable(source.arch, source.directory)
    if contents.tok:
        files = portable_files(contents.tok, contents.template, source.directory)
    else:
        files = tokenizer_files(source.directory)

    def write(temporary: Path) -> None:
        found = find_file(source.directory, "config.json")
        if found and not (contents.updates or source.quantization or quantization):
            shutil.copy(found, temporary)
        else:
            (temporary / "config.json").write_bytes(config_file(source, tensors[0].dtype, quantization))
        write_files(temporary, files)
        stored = (
            pair
            for tensor in progress(tensors, "writing", unit="tensors")
            for pair in _stored(tensor, quantization).items()
        )
        write_tensors(temporary / "model.safetensors", stored)
        receipt = contents.receipt(format="hf", quantization=str(quantization) if quantization else None)
        write_receipt(temporary, receipt)

    publish(output, write)
    print(f"{output}: {len(tensors)} tensors{contents.merged}{f', in {quantization}' if quantization else ''}")
    written = readers(merged_tensors(open_model(output), None, {}))
    print_effect(contents, written, "quantizing again" if quantization else rounding(contents))


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
