"""From a model's directory to a model ready to run. Training builds in the same order, sharding before it loads (train.py)."""

from pathlib import Path

import torch

from minorca.architecture import Architecture, model_directory, read_architecture
from minorca.lora import add_adapters, load_adapter, read_adapter_settings
from minorca.model import Mistral
from minorca.weights import load_weights


def build_model(arch: Architecture, dtype: torch.dtype) -> Mistral:
    """The frozen network on the meta device: shapes and dtypes, no memory."""
    with torch.device("meta"):
        return Mistral(arch).to(dtype).requires_grad_(False)


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
    model = build_model(read_architecture(directory), dtype)
    if adapter is not None:
        add_adapters(model, read_adapter_settings(adapter), dtype)
    model.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load_weights(model, directory, model.arch)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()
