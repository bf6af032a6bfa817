"""A GGUF file for llama.cpp and what is built on it, with a Modelfile for Ollama. One tensor is in memory at a time.

Names, the order of query and key rows, and which tensors have which type are those of llama.cpp's converter
(convert_hf_to_gguf.py).
"""

import logging
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minorca.data.portable_files import SAMPLE
from minorca.data.tokenizer import Tokenizer, load_tokenizer
from minorca.errors import UserError
from minorca.export.contents import Contents, ExportedTensor, check_new, merged_tensors, read_contents
from minorca.export.effect import print_effect, readers
from minorca.export.gguf_metadata import add_architecture, add_tokenizer, context_length
from minorca.export.merging import Merge
from minorca.export.ollama import modelfile
from minorca.files.atomic import publish, write_files
from minorca.files.gguf import GGUF
from minorca.files.gguf_directory import model_files
from minorca.files.weights import open_model
from minorca.model.architecture import Architecture
from minorca.model.layout import SourceTensor, source_tensors
from minorca.model.row_order import in_mistral_order
from minorca.progress import progress
from minorca.receipts import as_metadata, write_receipt

# this module has the library's name
if TYPE_CHECKING:
    import numpy
    from gguf import GGUFWriter

log = logging.getLogger(__name__)

# what the gguf library writes, and llama.cpp's numbers of files whose matrices are stored so (llama.h, llama_ftype)
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
# what llama.cpp's own program makes of a file
K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
DEFAULT_TYPE = "f16"
# values that are stored in one block, with a scale in fp16
_BLOCK = 32
_LARGEST_F16 = 65504.0
_PLAIN_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Written:
    """One tensor of a file: its place, what makes it, and ggml's name of its type."""

    place: SourceTensor
    tensor: ExportedTensor
    type: str


def export_gguf(model: str | Path, adapter: str | Path | Merge | None, output: Path, type: str = DEFAULT_TYPE) -> None:
    """Writes model-TYPE.gguf and a Modelfile to `output`, which appears when it is complete.

    Args:
        adapter: what is merged in.
        type: of `TYPES` or `K_QUANTS`.

    Raises:
        UserError: what is wrong with which file, that `output` exists, or a value that the type cannot hold.
    """
    check_new(output)
    quantize = _llama_quantize(type) if type in K_QUANTS else None
    contents = read_contents(model, adapter)
    stored = _PLAIN_TYPES.get(contents.tensors[0].dtype, "f32") if quantize else type
    name = f"model-{type.upper()}.gguf"
    description = modelfile(f"./{name}", contents.tok, contents.template, contents.source, "FROM")
    receipt = contents.receipt(format="gguf", type=type)

    def write(temporary: Path) -> None:
        if quantize:
            plain = temporary / "plain.gguf"
            _write(plain, contents, stored, output.name, as_metadata(receipt))
            _quantize(quantize, plain, temporary / name, type)
        else:
            _write(temporary / name, contents, stored, output.name, as_metadata(receipt))
        (temporary / "Modelfile").write_text(description, encoding="utf-8")
        write_receipt(temporary, receipt)

    publish(output, write)
    print(f"{output}: {name}, {len(contents.tensors)} tensors{contents.merged}")
    _print_differences(contents.source.arch, plan(contents, stored), stored)
    # what llama.cpp has quantized is not read here
    if not quantize:
        written = readers(merged_tensors(open_model(output / name), None, {}))
        print_effect(contents, written, f"storing as {type}")


def plan(contents: Contents, type: str) -> list[Written]:
    """How each tensor is stored.

    Vectors are fp32, and rows that are not made of whole blocks fp16, as the converter has it. The head, or the
    embedding that is one, is q8_0 in files of fewer bits, where llama-quantize has q6_k.
    """
    arch = contents.source.arch
    layouts = (source_tensors(arch, "huggingface"), source_tensors(arch, "gguf"))
    names, places = ([tensor for stacked in layout.values() for tensor in stacked] for layout in layouts)
    by_name = dict(zip((tensor.name for tensor in names), places))
    head = source_tensors(arch, "gguf")["embedding" if arch.tied else "head"][0].name

    def stored(place: SourceTensor) -> str:
        if place.columns is None:
            return "F32"
        if type.startswith("q") and place.columns % _BLOCK:
            return "F16"
        return "Q8_0" if type.startswith(("q4", "q5")) and place.name == head else type.upper()

    pairs = [(by_name[tensor.name], tensor) for tensor in contents.tensors]
    return [Written(place, tensor, stored(place)) for place, tensor in pairs]


def _write(path: Path, contents: Contents, type: str, name: str, metadata: Mapping[str, str]) -> None:
    import gguf

    source = contents.source
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    written = plan(contents, type)
    parameters = sum(torch.Size(each.place.shape).numel() for each in written)
    writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
    add_architecture(writer, source.arch)
    writer.add_file_type(TYPES[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, contents.tok, contents.template, source.arch, source.directory)
    write_tensors(
        writer,
        metadata,
        {each.place.name: (each.place.shape, each.type) for each in written},
        ((each.place.name, in_mistral_order(each.tensor.make(), each.place.rotary_heads)) for each in written),
    )
    if contents.tok:
        _check_tokenizer(path, contents.tok)


def _check_tokenizer(path: Path, tok: Tokenizer) -> None:
    """Warns where a file's tokenizer, which is llama.cpp's, gives other ids to text than the one that it is made of.

    SentencePiece has kinds and normalizers that llama.cpp lacks.

    Raises:
        UserError: the file cannot be read back.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_files(Path(directory), model_files(GGUF(path)))
        ids = load_tokenizer(directory).encode(SAMPLE)
    if ids != tok.encode(SAMPLE):
        log.warning("%s: llama.cpp gives other ids to some texts: it has no such kind or normalizer", tok.file)


def write_tensors(
    writer: "GGUFWriter",
    metadata: Mapping[str, str],
    described: Mapping[str, tuple[tuple[int, ...], str]],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Writes the header and then the tensors as they are made, and closes the file.

    Args:
        metadata: texts, beside what the writer has.
        described: shapes and ggml's types by name.
        tensors: in the same order.
    """
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    for key, text in metadata.items():
        writer.add_string(key, text)
    for name, (shape, kind) in described.items():
        stored = GGMLQuantizationType[kind]
        stored_bytes = int(numpy.prod(quant_shape_to_byte_shape(shape, stored)))
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), stored_bytes, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in progress(tensors, "writing", len(described), unit="tensors"):
            writer.write_tensor_data(_encoded(name, tensor, described[name][1]))
    finally:
        writer.close()


def _encoded(name: str, tensor: Tensor, kind: str) -> "numpy.ndarray":
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.float()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest < torch.inf:
        raise UserError("contains NaN or infinite values; did training diverge?", field=name)
    if kind not in ("F32", "BF16") and largest > _LARGEST_F16:
        raise UserError(f"has a value of {largest:.6g}, over fp16's {_LARGEST_F16:.0f}; choose bf16", field=name)
    return quantize(values.contiguous().numpy(), GGMLQuantizationType[kind])


def _print_differences(arch: Architecture, written: list[Written], type: str) -> None:
    if arch.window and context_length(arch) < (arch.max_positions or torch.inf):
        print(f"its context is {arch.window} tokens, the model's window: llama.cpp has none for this network")
    unfit = [each for each in written if each.place.columns and each.place.columns % _BLOCK]
    if type.startswith("q") and unfit:
        print(
            f"{len(unfit)} tensors are in f16: their rows are not multiples of {_BLOCK} values, as {type} stores them"
        )


def _llama_quantize(type: str) -> str:
    program = which("llama-quantize")
    if program is None:
        raise UserError(
            f"is {type}, which llama.cpp's llama-quantize makes, and that is not on PATH; install llama.cpp (its "
            f"releases hold the program), or choose {', '.join(TYPES)}",
            field="--type",
        )
    return program


def _quantize(program: str, plain: Path, path: Path, type: str) -> None:
    """Has llama.cpp quantize a file, which is removed."""
    command = [program, str(plain), str(path), type.upper()]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not path.is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(f"ended with status {done.returncode}: {said[-1] if said else 'no output'}", path=program)
    plain.unlink()
