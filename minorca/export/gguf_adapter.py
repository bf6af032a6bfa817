"""A LoRA adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER.

The form is that of llama.cpp's convert_lora_to_gguf.py. llama.cpp multiplies B A by alpha / rank, with the rank of each
pair (llama-adapter.h), so that any other scale becomes a part of B.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minorca.errors import UserError
from minorca.export.contents import check_new, read_chat
from minorca.export.gguf import TYPES, write_tensors
from minorca.export.ollama import modelfile
from minorca.files.adapters import open_adapter, read_adapter_settings
from minorca.files.atomic import publish
from minorca.files.tensor_files import TensorFiles
from minorca.files.vocabulary import vocabulary_updates
from minorca.files.weights import open_model
from minorca.model.architecture import Architecture
from minorca.model.build import build_model
from minorca.model.layout import ProjectionSpec, projections
from minorca.model.lora import LoRASettings, PartSettings, adapter_parameters, add_adapters
from minorca.model.row_order import in_mistral_order
from minorca.receipts import as_metadata, of_adapters, write_receipt

# this module is loaded by commands that need no gguf
if TYPE_CHECKING:
    from gguf import GGUFWriter

DEFAULT_TYPE = "f32"

# the layer, the projection and the settings of each pair of matrices
Parts = list[tuple[int, ProjectionSpec, PartSettings]]


def export_adapter(model: str | Path, adapter: str | Path, output: Path, type: str = DEFAULT_TYPE) -> None:
    """Writes adapter-TYPE.gguf and a Modelfile to `output`, which appears when it is complete.

    Args:
        model: the adapter's base.
        type: of `TYPES`, with rows of whole blocks or in fp16, as in gguf.py.

    Raises:
        UserError: what is wrong with which file, that `output` exists, or that the adapter changes embedding or head.
    """
    check_new(output)
    if type not in TYPES:
        raise UserError(f"is {type}; expected {', '.join(TYPES)} for an adapter", field="--type")
    source = open_model(model)
    if updates := vocabulary_updates(adapter):
        raise UserError(
            f"trains {' and '.join(updates)} too, which llama.cpp's adapters do not hold; merge it: leave out "
            "--adapter-only",
            path=adapter,
        )
    settings = read_adapter_settings(adapter)
    parts = _parts(source.arch, settings)
    shadow = build_model(source.arch, torch.float32)
    add_adapters(shadow, settings)
    files = open_adapter(adapter, adapter_parameters(shadow))
    name = f"adapter-{type.upper()}.gguf"
    description = modelfile(f"./{name}", *read_chat(source, [adapter]), source, "ADAPTER")
    receipt = {"export": {"format": "gguf", "type": type}} | of_adapters([adapter])

    def write(temporary: Path) -> None:
        writer = _writer(temporary / name, output.name, settings.alpha or 1.0, type)
        tensors = _tensors(parts, settings.alpha or 1.0, files)
        write_tensors(writer, as_metadata(receipt), _described(parts, type), tensors)
        (temporary / "Modelfile").write_text(description, encoding="utf-8")
        write_receipt(temporary, receipt)

    publish(output, write)
    print(f"{output}: {name}, {2 * len(parts)} tensors")


def _parts(arch: Architecture, settings: LoRASettings) -> Parts:
    specs = [part for stacked in projections(arch).values() for part in stacked]
    found = ((layer, part, settings.part(layer, part.name)) for layer in range(arch.layers) for part in specs)
    return [(layer, part, chosen) for layer, part, chosen in found if chosen]


def _writer(path: Path, name: str, alpha: float, type: str) -> "GGUFWriter":
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_name(name)
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_file_type(TYPES[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _described(parts: Parts, type: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and ggml's type of each tensor."""
    described = {}
    for layer, part, (rank, _) in parts:
        for matrix, shape in (("a", (rank, part.in_features)), ("b", (part.out_features, rank))):
            fits = not type.startswith("q") or shape[1] % 32 == 0
            described[f"{part.tensor_name(layer, 'gguf')}.lora_{matrix}"] = (shape, type.upper() if fits else "F16")
    return described


def _tensors(parts: Parts, alpha: float, files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
    for layer, part, (rank, scale) in parts:
        name = part.tensor_name(layer, "gguf")
        a = files.read(part.peft_name(layer, "A"), 0, rank)
        b = files.read(part.peft_name(layer, "B"), 0, part.out_features)
        b = b.float() * (scale * rank / alpha)
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", in_mistral_order(b, part.rotary_heads)
