"""GGUF files that others made: read as the gguf library reads them, or refused with what is wrong."""

import struct

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from minorca import UserError, load_model, load_tokenizer
from minorca.export.gguf import export_gguf
from minorca.files import gguf as gguf_module
from minorca.files.gguf import GGUF, MAX_HEADER_BYTES, READABLE
from minorca.model.architecture import read_architecture
from tests.helpers import save_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def exported(save_mistral, tmp_path):
    directory, _ = save_mistral(vocab_size=258)
    save_tokenizer(directory)
    export_gguf(directory, None, tmp_path / "out")
    return tmp_path / "out" / "model-F16.gguf"


def changed(path, values: dict, tensors: dict | None = None):
    """A copy of a file by the gguf library with other metadata and tensors (None: without)."""
    reader = GGUFReader(path)
    architecture = values.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in values:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in values.items():
        kind = gguf.GGUFValueType.get_type(value) if value is not None else None
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        if kind is not None and name != "general.architecture":
            writer.add_key_value(name, value, kind, gguf.GGUFValueType.INT32 if isinstance(value, list) else None)
    for name, value in ({tensor.name: tensor for tensor in reader.tensors} | (tensors or {})).items():
        if isinstance(value, numpy.ndarray):
            writer.add_tensor(name, value)
        elif value is not None:
            writer.add_tensor(name, value.data, raw_dtype=value.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def test_metadata_is_what_the_gguf_library_reads(exported):
    theirs = GGUFReader(exported)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert GGUF(exported).metadata == expected
    assert GGUF(exported).keys() == [tensor.name for tensor in theirs.tensors]


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_is_read_by_rows(kind, tmp_path):
    """Any bytes of the type, as the gguf library dequantizes them all at once; NaN where it has NaN."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    columns = 2 * max(block, 32)
    stored = numpy.random.default_rng(0).integers(0, 256, (5, columns // block * size), dtype=numpy.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("t", stored, raw_shape=stored.shape, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUF(tmp_path / "one.gguf").get_slice("t")
    with numpy.errstate(all="ignore"):
        expected = torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind]).copy())
    assert tensor.get_shape() == [5, columns]
    assert tensor[1:4].dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert torch.equal(tensor[1:4].float().nan_to_num(), expected[1:4].nan_to_num())
    assert tensor[5:9].shape == (0, columns)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; expected llama or mistral"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; expected a whole model"),
        ({"split.count": 3}, "split.count is 3: the file is one of several; join them.*llama-gguf-split"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which a Mistral network does not have"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', which a Mistral"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; the keys have 16"),
        ({"llama.block_count": None}, "llama.block_count is missing; expected a number"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]; expected a number, the same in every"),
        ({"llama.attention.head_count": 0}, "config.json: num_attention_heads is 0; expected a positive int"),
        ({"llama.embedding_length": 32}, "token_embd.weight has shape"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'; expected llama .* or gpt2"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre is 'qwen2', a pre-tokenizer that is not known here.*smollm"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999; expected an id below 258"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries; tokens has 258"),
    ],
)
def test_other_models_are_refused(values, message, exported):
    with pytest.raises(UserError, match=message):
        load_model(changed(exported, values), torch.float32, "cpu")


def test_harmless_metadata_is_read(exported):
    load_model(changed(exported, {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}), torch.float32, "cpu")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blk.1.ffn_up.weight": None}, "missing tensor blk.1.ffn_up.weight"),
        ({"blk.0.attn_q.bias": numpy.zeros(64, numpy.float32)}, "unexpected tensor blk.0.attn_q.bias"),
        ({"rope_freqs.weight": numpy.ones(8, numpy.float32)}, "rope_freqs.weight scales the rotary embeddings"),
        (
            {"output_norm.weight": numpy.zeros(64, numpy.int32)},
            "output_norm.weight is stored as I32, which is not",
        ),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
    ],
)
def test_other_tensors_are_refused(tensors, message, exported):
    with pytest.raises(UserError, match=message):
        load_model(changed(exported, {}, tensors), torch.float32, "cpu")


def test_what_is_missing_has_llama_cpps_defaults(exported):
    """Head sizes, the base of rotary embeddings, whether a bos is added, and tokens' kinds."""
    absent = ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"]
    absent += ["llama.rope.freq_base", "tokenizer.ggml.add_bos_token", "llama.context_length"]
    path = changed(exported, dict.fromkeys(absent))
    arch = read_architecture(path)
    assert (arch.head_dim, arch.rope_theta, arch.max_positions) == (16, 10000.0, None)
    assert not load_tokenizer(path).adds_bos


# ------------------------------------------------------------------------------------------------------ broken files


def header(path) -> int:
    return GGUF(path).header_bytes


def test_files_that_are_cut_off(exported):
    content = exported.read_bytes()
    end = header(exported)
    for size in [0, 1, 3, 4, 8, 20, *range(24, end, 211), end, end + 40, len(content) - 1]:
        exported.write_bytes(content[:size])
        with pytest.raises(UserError, match="is not a whole GGUF file|cannot be read"):
            GGUF(exported)


@pytest.mark.parametrize(
    "place, number, message",
    [
        (0, 7, "does not start with GGUF"),
        (4, 1, "is GGUF of version 1; expected 2 or 3"),
        (8, 2**63, "9223372036854775808 tensors"),
        (16, 2**63, "9223372036854775808 entries of metadata"),
        (24, 2**60, "1152921504606846976 bytes at byte 32"),
    ],
)
def test_counts_are_compared_with_the_size(place, number, message, exported):
    content = bytearray(exported.read_bytes())
    content[place : place + 8] = struct.pack("<Q", number)
    exported.write_bytes(content)
    with pytest.raises(UserError, match=message):
        GGUF(exported)


def written(path, *parts: bytes):
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + b"".join(parts) + bytes(4096))
    return path


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LIST = text(b"k") + struct.pack("<II", 9, 4)


@pytest.mark.parametrize(
    "parts, message",
    [
        ((0, 1, LIST + struct.pack("<Q", 2**40)), "k is a list of 1099511627776"),
        ((0, 1, LIST + struct.pack("<Q", 10**6)), "4000000 bytes at byte"),
        ((0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "k is a list of type 9"),
        ((0, 1, text(b"k") + struct.pack("<I", 99)), "k has type 99"),
        ((0, 2, 2 * (text(b"k") + struct.pack("<II", 4, 1))), "repeated key 'k'"),
        ((0, 1, text(b"\xff")), "is not UTF-8"),
        ((0, 1, text(b"general.alignment") + struct.pack("<II", 4, 3)), "general.alignment is 3"),
        ((1, 0, tensor(b"t", (1, 1, 1, 1, 1))), "'t' has 5 axes"),
        ((1, 0, tensor(b"t", (2**40, 2**40))), "'t' has .*1099511627776, 1099511627776"),
        ((1, 0, tensor(b"t", (2**10, 2))), "'t' has"),
        ((1, 0, tensor(b"t", (8, 0))), "'t' has"),
        ((1, 0, tensor(b"t", (8, 8), 2)), "'t' has"),
        ((1, 0, tensor(b"t", (8, 8), offset=2**63)), "'t' has"),
        ((1, 0, tensor(b"t", (8, 8), offset=5)), "'t' has"),
        ((1, 0, tensor(b"t", (8, 8), 77)), "t is stored as type 77, which is not read; expected one of F32"),
        ((2, 0, 2 * tensor(b"t", (8, 8))), "repeated name of a tensor 't'"),
        ((20, 0, b"".join(tensor(b"t%d" % n, (8, 32)) for n in range(20))), "has"),
    ],
)
def test_headers_that_contradict_the_file(parts, message, tmp_path):
    tensors, entries, content = parts
    with pytest.raises(UserError, match=message):
        GGUF(written(tmp_path / "t.gguf", struct.pack("<QQ", tensors, entries), content))


def test_the_header_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_module, "MAX_HEADER_BYTES", 100)
    content = text(b"k") + struct.pack("<I", 8) + text(bytes(200))
    with pytest.raises(UserError, match="200 bytes at byte"):
        GGUF(written(tmp_path / "t.gguf", struct.pack("<QQ", 0, 1), content))
    assert MAX_HEADER_BYTES < 10**8


def test_a_changed_file_is_read_anew(exported, own_cache):
    assert not load_tokenizer(exported).adds_bos
    changed(exported, {"tokenizer.ggml.add_bos_token": True}).replace(exported)
    assert load_tokenizer(exported).adds_bos
    assert len(list((own_cache / "minorca" / "gguf").iterdir())) == 2
