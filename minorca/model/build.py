"""From a model's directory to a model ready to run. Training builds in the same order, sharding before it loads (train.py)."""

from pathlib import Path

import torch

from minorca.files.weights import load_weights, open_weights
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.lora import (
    adapter_parameters,
    add_adapters,
    load_adapter,
    open_adapter,
    read_adapter_settings,
    room_for_adapters,
)
from minorca.model.network import Mistral


def build_model(arch: Architecture, dtype: torch.dtype) -> Mistral:
    """The frozen network on the meta device: shapes and dtypes, no memory."""
    with torch.device("meta"):
        return Mistral(arch).to(dtype).requires_grad_(False)


def fast_dtype() -> torch.dtype:
    """bf16 where this machine multiplies it in hardware, else fp32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    adapter: str | Path | None = None,
) -> Mistral:
    """A model ready to run, from a directory in Hugging Face's or Mistral's layout, with a PEFT adapter where given.

    Args:
        dtype: of weights and computation: torch.bfloat16 or torch.float32.
        device: by default CUDA where there is one, else the CPU.

    Raises:
        UserError: what is wrong with which file.
    """
    directory = model_directory(path)
    arch = read_architecture(directory)
    files, pieces = open_weights(directory, arch)  # checked before memory is taken
    model = build_model(arch, dtype)
    settings = None if adapter is None else read_adapter_settings(adapter)
    if settings:
        add_adapters(model, settings, dtype)
        open_adapter(adapter, adapter_parameters(model))  # checked likewise
    model.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.loaded = load_weights(model, files, pieces)
    if settings:
        room_for_adapters(model)
        load_adapter(model, adapter)
    return model.eval()
