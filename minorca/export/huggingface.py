"""Weights for others: a Hugging Face directory from a model in either layout, with an adapter merged in where given.

One shard is in memory at a time, and the arithmetic of merging is fp32: W + scale B A, rounded once.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minorca.errors import UserError
from minorca.files.atomic import publish
from minorca.files.safe_io import find_file
from minorca.files.weights import huggingface_tensors, open_weights, read_source_tensor
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.build import build_model
from minorca.model.lora import adapter_parameters, add_adapters, open_adapter, read_adapter_settings

SHARD_BYTES = 5 * 10**9
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def export(model: str | Path, adapter: str | Path | None, output: Path) -> None:
    """Writes config, tokenizer and weights to `output`, which appears when it is complete.

    Raises:
        UserError: what is wrong with which file, or that `output` exists.
    """
    directory = model_directory(model)
    if output.exists():
        raise UserError("exists already; give --output a new name", path=output)
    arch = read_architecture(directory)
    tensors = list(merged_tensors(directory, arch, adapter))
    copied = [find_file(directory, file.name) for file in directory.iterdir() if any(map(file.match, COPIED))]

    def write(temporary: Path) -> None:
        if config := find_file(directory, "config.json"):
            shutil.copy(config, temporary)
        else:
            embedding = tensors[0][2]()
            (temporary / "config.json").write_text(json.dumps(hf_config(arch, embedding.dtype), indent=2) + "\n")
        for file in filter(None, copied):
            shutil.copy(file, temporary)
        _write_shards(temporary, tensors)

    publish(output, write)
    print(f"{output}: {len(tensors)} tensors{f', {adapter} merged in' if adapter else ''}")


def merged_tensors(
    directory: Path, arch: Architecture, adapter: str | Path | None
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Hugging Face's name, bytes, and a function that makes the tensor, for each of a model's tensors."""
    files, pieces = open_weights(directory, arch)
    updates = None
    if adapter:
        settings = read_adapter_settings(adapter)
        model = build_model(arch, torch.float32)
        add_adapters(model, settings)
        updates = open_adapter(adapter, adapter_parameters(model))

    def merged(name: str, piece) -> Tensor:
        weight = read_source_tensor(files, piece, 0, piece.rows)
        a, b = (f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight" for x in "AB")
        if updates is None or a not in updates.keys():
            return weight
        update = updates.get_tensor(b).float() @ updates.get_tensor(a).float()
        return weight.float().add_(update, alpha=settings.scale).to(weight.dtype)

    for parameter, outside in huggingface_tensors(arch).items():
        for theirs, piece in zip(outside, pieces[parameter]):
            size = files.bytes(piece.name)
            yield theirs.name, size, lambda name=theirs.name, piece=piece: merged(name, piece)


def _write_shards(directory: Path, tensors: list[tuple[str, int, Callable[[], Tensor]]]) -> None:
    shards: list[list[tuple[str, Callable[[], Tensor]]]] = [[]]
    room = SHARD_BYTES
    for name, size, make in tensors:
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, make))
        room -= size
    if len(shards) == 1:
        save_file(
            {name: make().contiguous() for name, make in shards[0]}, directory / "model.safetensors", {"format": "pt"}
        )
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: make().contiguous() for name, make in shard}, directory / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": sum(size for _, size, _ in tensors)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def hf_config(arch: Architecture, dtype: torch.dtype) -> dict:
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
