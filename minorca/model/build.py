"""From a model's directory to a model ready to run.

Training builds in the same order, and shards before it loads (train/build.py).
"""

import logging
from pathlib import Path

import torch
from torch import nn

from minorca.device import default_device
from minorca.files.adapters import check_finite, load_adapter, open_adapter, other_base, read_adapter_settings
from minorca.files.vocabulary import adapt, check_shares_vocabulary
from minorca.files.weights import load_weights, open_model
from minorca.model.architecture import Architecture
from minorca.model.lora import AdapterChoice, LoRA, adapter_parameters, add_adapters, pad_for_adapters
from minorca.model.network import Mistral
from minorca.model.quantization import Quantization, parse_quantization
from minorca.model.row_lora import RowLoRA
from minorca_kernels import DenseWeight, NF4Weight, PrepackedNF4Weight, PrepackedWeight

log = logging.getLogger(__name__)


def build_model(arch: Architecture, dtype: torch.dtype, quantization: Quantization | None = None) -> Mistral:
    """The frozen network on the meta device: shapes and dtypes, no memory."""
    with torch.device("meta"):
        model = Mistral(arch).to(dtype).requires_grad_(False)
        if quantization:
            for _, projection in model.projections():
                rows = [part.out_features for part in projection.parts]
                projection.base = NF4Weight(rows, projection.base.in_features, dtype, quantization.double_quant)
    return model


def fast_dtype() -> torch.dtype:
    """bf16 where this machine multiplies it in hardware, else fp32."""
    if default_device().type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    double_quant: bool = True,
    vocabulary_only: bool = False,
) -> Mistral:
    """A model ready to run, from a directory in Hugging Face's or Mistral's layout, with a PEFT adapter where given; of
    both, a hub id (org/name or org/name@REVISION) is as good.

    What the adapter makes of the embedding and head is merged into them.

    Args:
        path: the directory of the weights: config.json or params.json, with safetensors or `.bin` files.
        dtype: of weights and computation: torch.bfloat16 or torch.float32.
        device: by default CUDA where there is one, else the CPU.
        adapter: the directory of a LoRA adapter in PEFT's format, which stays beside the frozen weights.
        quantize: "nf4" quantizes the projections while they load; files that are quantized stay so.
        double_quant: of nf4: quantizes the scales too.
        vocabulary_only: of the adapter, nothing but what it makes of the embedding and head.

    Returns:
        The network in evaluation mode: tokens [T] int64 -> logits [T, V] in `dtype`. Nothing of it requires a gradient
        but the adapter.

    Raises:
        UserError: what is wrong with which file; found before memory is taken for the model.
    """
    device = device or default_device()
    source = open_model(path, parse_quantization(quantize, double_quant))
    files, updates = (source, {}) if adapter is None else adapt(source, adapter)
    model = build_model(files.arch, dtype, files.quantization)
    adapter = None if vocabulary_only else adapter
    if adapter is not None:
        warn_of_other_base(adapter, files.quantization)
        add_adapters(model, read_adapter_settings(adapter).of_projections(), dtype)
        open_adapter(adapter, adapter_parameters(model))
        pad_for_adapters(model, device)
    _allocate(model, device)
    load_weights(model, files)
    for module, update in updates.items():
        weight = model.get_parameter(f"{module}.weight").detach()
        weight.copy_(update.apply(weight[: source.arch.vocab_size], len(weight)))
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def _allocate(module: nn.Module, device: torch.device | str) -> None:
    """As `module.to_empty`, which imports sympy where a tensor is on the meta device: half a second, and 40 MB."""
    module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def quantization_of(model: Mistral) -> Quantization | None:
    base = next(projection.base for _, projection in model.projections())
    return Quantization(base.double_quant) if isinstance(base, NF4Weight) else None


def warn_of_other_base(adapter: str | Path, quantization: Quantization | None) -> None:
    """Logs that an adapter was trained on a base that was quantized otherwise."""
    if other := other_base(adapter, quantization):
        advice = other.trained_on.options if other.trained_on else "no --quantize, and the unquantized model"
        log.warning("%s: %s; for the numbers of its training, give %s", adapter, other, advice)


def load_adapters(model: Mistral, directories: dict[str, str | Path], alone: bool = False) -> AdapterChoice:
    """Puts several PEFT adapters, by name, beside a model's projections, in the model's dtype, for inference.

    Args:
        alone: the only adapter's embedding and head are the model's (`vocabulary_only` of `load_model`).

    Returns:
        The choice among them, which is made anew before each forward.

    Raises:
        UserError: what is wrong with which file.
    """
    choice = AdapterChoice([], model.embedding.weight.device)
    adapters = {}
    for name, directory in directories.items():
        if not alone:
            check_shares_vocabulary(directory)
        warn_of_other_base(directory, quantization_of(model))
        adapters[name] = read_adapter(model, directory, choice.index_T1.device)
    install_adapters(model, choice, adapters)
    return choice


def read_adapter(model: Mistral, directory: str | Path, device: torch.device | str) -> dict[int, LoRA]:
    """An adapter in the model's dtype, by the place of each projection that it acts on in `model.projections()`.

    Nothing is computed with the model: another thread may run it, where `device` is the CPU.

    Raises:
        UserError: what is wrong with which file.
    """
    dtype = model.embedding.weight.dtype
    # a network without weights, which gives the adapter's matrices their places
    shadow = build_model(model.arch, dtype)
    add_adapters(shadow, read_adapter_settings(directory).of_projections(), dtype)
    open_adapter(directory, adapter_parameters(shadow))
    loras = {place: projection.lora for place, (_, projection) in enumerate(shadow.projections()) if projection.lora}
    for lora in loras.values():
        _allocate(lora, device)
    load_adapter(shadow, directory)
    for name, parameter in adapter_parameters(shadow).items():
        # zero times NaN would reach the rows that do not use the adapter
        check_finite(parameter, directory, name)
    return loras


def install_adapters(model: Mistral, choice: AdapterChoice, adapters: dict[str, dict[int, LoRA]]) -> None:
    """Puts adapters that `read_adapter` has read beside the model's projections, and those that are there.

    Args:
        choice: of the model's adapters, to which theirs are added by name.

    Raises:
        ValueError: the model has an adapter of that name, or had one.
        torch.OutOfMemoryError: the model is as it was.
    """
    if used := set(choice.names).intersection(adapters):
        raise ValueError(f"names of adapters cannot be used again, and {sorted(used)} were")
    indices = {name: len(choice.names) + i for i, name in enumerate(adapters)}
    row_loras = {}
    for place, (_, projection) in enumerate(model.projections()):
        loras = [
            (index, adapters[name][place].to(choice.index_T1.device))
            for name, index in indices.items()
            if place in adapters[name]
        ]
        if loras:
            added = RowLoRA.of(projection.base.out_features, choice, loras)
            row_loras[projection] = projection.row_lora.beside(added) if projection.row_lora else added
    choice.names.extend(indices)
    for projection, row_lora in row_loras.items():
        projection.row_lora = row_lora


def remove_adapter(model: Mistral, choice: AdapterChoice, name: str) -> None:
    """Takes an adapter away from the model's projections. No later one may have its name."""
    choice.removed.add(name)
    for _, projection in model.projections():
        if projection.row_lora:
            projection.row_lora = projection.row_lora.without(choice.index(name))


def prepack(model: Mistral, rows: int = PrepackedWeight.ROWS) -> Mistral:
    """Prepacks a model's weights in place, for inference alone, where this machine gains by it; returns the model.

    Projections are done one at a time, so that the model is never in memory twice; of the head there are two copies
    where it is also the embedding. Projections in NF4 stay in 4 bits where bitsandbytes multiplies them so; elsewhere
    they become dense, which a CPU would make of them in every product. Projections with trained adapters stay as they
    are.

    Args:
        rows: of most products: the sequences that are decoded at once. For one, many weights in bf16 stay as they are.
    """
    if model.embedding.weight.is_cuda:
        return model
    for _, projection in model.projections():
        if projection.lora is not None:
            continue
        if isinstance(projection.base, NF4Weight):
            if PrepackedNF4Weight.supports(projection.base, model.dtype):
                projection.base = PrepackedNF4Weight(projection.base)
                continue
            projection.base = DenseWeight(projection.base.dequantize(model.dtype))
        if isinstance(projection.base, DenseWeight) and PrepackedWeight.is_faster(projection.base.weight, rows):
            projection.base = PrepackedWeight(projection.base.weight)
    head = model.embedding if model.head is None else model.head
    if isinstance(head, DenseWeight) and PrepackedWeight.is_faster(head.weight, rows):
        model.head = PrepackedWeight(head.weight)
    return model
