"""Directories in 4 bits, those of bitsandbytes and ours: bits, values and logits are bitsandbytes' own.

Its modules are in train mode: in eval, on some CPUs, they multiply by scales that they have rounded to bf16.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minorca.files.tensor_files
from minorca import UserError, load_model
from minorca.export.__main__ import main as export
from minorca.files.weights import open_model
from minorca.generate import generate
from minorca_kernels import NF4Weight
from tests.files.test_weights import FILE, as_bin, edit
from tests.helpers import relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows of whole blocks
SIZES = {"intermediate_size": 192}
Q0 = "model.layers.0.self_attn.q_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def unquantized(save_mistral):
    """unquantized(dtype) -> a directory of weights in this dtype."""

    def save(dtype=torch.bfloat16, **options):
        directory, model = save_mistral(**SIZES, **options)
        model.to(dtype).save_pretrained(directory)
        return directory

    return save


def load_theirs(directory, dtype, double_quant: bool | None = None):
    """transformers' model, quantized by bitsandbytes where double_quant says how, or as the directory is."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bool(double_quant),
        bnb_4bit_compute_dtype=dtype,
    )
    options = {} if double_quant is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager", **options).train()


@pytest.fixture
def quantized(unquantized):
    """quantized(dtype, double_quant) -> a directory that transformers and bitsandbytes wrote."""

    def save(dtype=torch.bfloat16, double_quant=True):
        directory = unquantized(dtype)
        output = directory.with_name(f"{directory.name}-nf4")
        load_theirs(directory, dtype, double_quant).save_pretrained(output)
        return output

    return save


def dequantized(functional, directory) -> dict[str, torch.Tensor]:
    """bitsandbytes' values of every quantized tensor of a directory, by name."""
    tensors = load_file(directory / FILE)
    names = [name.removesuffix(f".{STATE}") for name in tensors if name.endswith(STATE)]
    found = {}
    for name in names:
        beside = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(beside, torch.device("cpu"))
        found[name] = functional.dequantize_4bit(tensors[name], state)
    return found


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_bitsandbytes(dtype, double_quant, quantized, bitsandbytes):
    """Of its own files, in the dtype that they name; read by rows, and as weights of a model."""
    directory = quantized(dtype, double_quant)
    source = open_model(directory)
    assert source.quantization is not None and source.quantization.double_quant == double_quant
    expected = dequantized(bitsandbytes, directory)
    assert source.quantized.keys() == expected.keys() and len(expected) == 14
    model = load_model(directory, torch.float32, "cpu")
    for module, stacked in source.tensors.items():
        if stacked[0].name not in expected:
            continue
        values = torch.cat([expected[tensor.name] for tensor in stacked])
        weight = model.get_submodule(module).base
        assert isinstance(weight, NF4Weight)
        assert torch.equal(weight.dequantize(dtype), values) and values.dtype == dtype
        for tensor in stacked:
            assert torch.equal(source.read(tensor, 3, 29), expected[tensor.name][3:29])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("layout", [lambda directory: None, as_bin])
def test_logits_and_tokens_of_its_directories(layout, double_quant, quantized):
    directory = quantized(torch.float32, double_quant)
    theirs = load_theirs(directory, torch.float32)
    layout(directory)
    ours = load_model(directory, torch.float32, "cpu")
    with torch.no_grad():
        assert relative_error(ours(TOKENS), theirs(TOKENS[None]).logits[0]) <= 1e-5
        longest = TOKENS[None]
        for _ in range(8):
            longest = torch.cat([longest, theirs(longest).logits[:, -1:].argmax(-1)], 1)
    assert generate(ours, [TOKENS.tolist()], 8) == [longest[0, len(TOKENS) :].tolist()]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_has_its_bits(dtype, double_quant, unquantized, tmp_path, monkeypatch):
    """In one file and in shards; the model is the same whether it is quantized in files or while it loads."""
    directory = unquantized(dtype)
    load_theirs(directory, dtype, double_quant).save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / FILE)
    options = ["--model", str(directory), "--quantize", "nf4", *([] if double_quant else ["--no-double-quant"])]
    export([*options, "--output", str(tmp_path / "ours")])
    monkeypatch.setattr(minorca.files.tensor_files, "FILE_BYTES", 60_000)
    export([*options, "--output", str(tmp_path / "shards")])
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 1 and max(file.stat().st_size for file in files) < 70_000
    shards = [load_file(file) for file in files]
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for shard in shards for tensor in shard.values())
    merged = {name: tensor for shard in shards for name, tensor in shard.items()}
    for found in (load_file(tmp_path / "ours" / FILE), merged):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(found[name].dtype == expected[name].dtype for name in found)
    logits = [
        load_model(path, torch.float32, "cpu", **how)(TOKENS)
        for path, how in [(tmp_path / name, {}) for name in ("theirs", "ours", "shards")]
        + [(directory, {"quantize": "nf4", "double_quant": double_quant})]
    ]
    assert all(torch.equal(found, logits[0]) for found in logits)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    written, theirs = (config["quantization_config"] for config in configs)
    assert written.items() <= theirs.items()


def test_an_offset_without_a_point(quantized, bitsandbytes):
    """As JSON of other writers has it."""
    directory = quantized()
    state(nested_offset=1)(directory)
    source = open_model(directory)
    [q0] = [tensor for tensor in source.tensors["layers.0.qkv"] if tensor.name == Q0]
    assert torch.equal(source.read(q0, 0, q0.rows), dequantized(bitsandbytes, directory)[Q0])
    weight = load_model(directory, torch.bfloat16, "cpu").get_submodule("layers.0.qkv").base
    assert isinstance(weight, NF4Weight) and torch.equal(weight.dequantize()[: q0.rows], source.read(q0, 0, q0.rows))


def test_transformers_loads_what_is_written(unquantized, tmp_path):
    directory = unquantized(torch.bfloat16)
    export(["--model", str(directory), "--quantize", "nf4", "--output", str(tmp_path / "ours")])
    expected = load_theirs(directory, torch.bfloat16, double_quant=True)
    found = load_theirs(tmp_path / "ours", torch.bfloat16)
    assert type(found.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        assert torch.equal(found(TOKENS[None]).logits, expected(TOKENS[None]).logits)


# -------------------------------------------------------------------------------------------------------- broken files


def change(**changes):
    """Of a directory's tensors, `...` removes one, and a function makes another value of it."""

    def apply(directory):
        tensors = load_file(directory / FILE)
        for part, make in changes.items():
            name = ".".join(filter(None, (Q0, part)))
            value = tensors.pop(name, None)
            if make is not ...:
                tensors[name] = make(value).contiguous()
        save_file(tensors, directory / FILE, {"format": "pt"})

    return apply


def state(**fields):
    """The JSON beside the weight, with other fields; `...` removes one."""

    def make(value):
        values = json.loads(bytes(value.tolist())) | fields
        text = json.dumps({key: value for key, value in values.items() if value is not ...})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change(**{STATE: make})


def raw(text: bytes):
    return change(**{STATE: lambda value: torch.tensor(list(text), dtype=torch.uint8)})


def quantization(**fields):
    def apply(directory):
        config = json.loads((directory / "config.json").read_text())
        edit(directory / "config.json", quantization_config=config["quantization_config"] | fields)

    return apply


def shifted(tensor):
    return tensor + (torch.arange(len(tensor)) == 3)


# what is done to a directory -> what is complained of, after the file
BROKEN = {
    "no absmax": (change(absmax=...), f"{Q0}.absmax is missing beside a quantized weight"),
    "no state": (change(**{STATE: ...}), f"{Q0}.{STATE} is missing"),
    "no code": (change(quant_map=...), f"{Q0}.quant_map is missing"),
    "no nested scales": (change(nested_absmax=...), f"{Q0}.nested_absmax is missing"),
    "no nested code": (change(nested_quant_map=...), f"{Q0}.nested_quant_map is missing"),
    "no weight": (change(**{"": ...}), f"missing tensor {Q0}"),
    "fewer codes": (change(**{"": lambda codes: codes[:-1]}), rf"{Q0} is U8 \[2047, 1\]; expected uint8 \[2048, 1\]"),
    "codes in a row": (change(**{"": lambda codes: codes.t()}), rf"{Q0} is U8 \[1, 2048\]"),
    "other codes": (change(**{"": lambda codes: codes.view(torch.int8)}), f"{Q0} is I8"),
    "dense": (change(**{"": lambda codes: torch.zeros(64, 64)}), f"{Q0} is not quantized, in a directory that is"),
    "fewer scales": (change(absmax=lambda scales: scales[1:]), rf"{Q0}.absmax is U8 \[63\]; expected uint8 \[64\]"),
    "plain scales": (change(absmax=lambda scales: scales.float()), f"{Q0}.absmax is F32"),
    "nested in bf16": (change(nested_absmax=lambda s: s.bfloat16()), f"{Q0}.nested_absmax is BF16"),
    "another code": (change(quant_map=shifted), f"{Q0}.quant_map holds other values"),
    "another nested code": (change(nested_quant_map=shifted), f"{Q0}.nested_quant_map holds other values"),
    "block size": (state(blocksize=128), f"{Q0}.{STATE} has blocksize 128; expected 64"),
    "nested block size": (state(nested_blocksize=64), f"{Q0}.{STATE} has nested_blocksize 64; expected 256"),
    "nested type": (state(nested_dtype="float16"), f"{Q0}.{STATE} has nested_dtype 'float16'"),
    "type": (state(dtype="float64"), f"{Q0}.{STATE} has dtype 'float64'; expected bfloat16, float16, float32"),
    "no type": (state(dtype=["float32"]), f"{Q0}.{STATE} has dtype"),
    "another type": (state(dtype="float16"), f"{Q0}|is nf4 with double quantization, torch.bfloat16, and .* float16"),
    "shape": (state(shape=[32, 128]), rf"{Q0}.{STATE} has shape \[32, 128\]; expected \[64, 64\]"),
    "quantizer": (state(quant_type="fp4"), f"{Q0}.{STATE} has quant_type 'fp4'"),
    "no offset": (state(nested_offset=...), f"{Q0}.{STATE} has nested_offset None"),
    "offset true": (state(nested_offset=True), f"{Q0}.{STATE} has nested_offset True"),
    "offset in text": (state(nested_offset="1.0"), f"{Q0}.{STATE} has nested_offset '1.0'"),
    "huge offset": (state(nested_offset=1e39), f"{Q0}.{STATE} has nested_offset 1e\\+39"),
    "NaN": (raw(b'{"nested_offset": NaN}'), f"{Q0}.{STATE} is not valid JSON"),
    "no object": (raw(b"[]"), f"{Q0}.{STATE} holds \\[\\]; expected an object"),
    "deep": (raw(b"[" * 4000), f"{Q0}.{STATE} is not valid JSON"),
    "no text": (raw(b"\xff"), f"{Q0}.{STATE} is not valid JSON"),
    "long": (raw(b" " * 10**6), f"{Q0}.{STATE} has 1000000 bytes; expected at most 4096"),
    "empty": (raw(b""), f"{Q0}.{STATE} is not valid JSON"),
    "a number": (change(**{STATE: lambda value: torch.tensor(5, dtype=torch.uint8)}), f"{Q0}.{STATE} is U8 \\[\\]"),
    "fp4": (quantization(bnb_4bit_quant_type="fp4"), "quantization_config has bnb_4bit_quant_type 'fp4'.* quantizes"),
    "8 bits": (quantization(load_in_4bit=False), "quantization_config has load_in_4bit False"),
    "storage": (quantization(bnb_4bit_quant_storage="bfloat16"), "has bnb_4bit_quant_storage 'bfloat16'"),
    "GPTQ": (quantization(quant_method="gptq"), "quantization_config has quant_method 'gptq'.* unquantized model"),
    "not said": (lambda d: edit(d / "config.json", quantization_config=...), f"{Q0} .*expected|unexpected tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, quantized):
    directory = quantized()
    damage, complaint = BROKEN[name]
    damage(directory)
    with pytest.raises(UserError) as error:
        load_model(directory, torch.bfloat16, "cpu")
    said = str(error.value)
    assert said.startswith(str(directory)) and re.search(complaint, said), said
    assert len(said) < 1000 and said.isprintable()
    for file in ("config.json", FILE):
        assert (directory / file).exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq", None, 5])
def test_another_quantizer(method, unquantized):
    directory = unquantized()
    edit(directory / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        UserError, match="quantization_config has .*; use the unquantized model, which model.quantize nf4"
    ):
        load_model(directory, torch.bfloat16, "cpu")


def test_rows_of_broken_blocks(save_mistral):
    """The rows of down have 96 values."""
    directory, _ = save_mistral()
    with pytest.raises(UserError, match=f"^{directory}: cannot be quantized to nf4: the rows of mlp.down_proj have 96"):
        load_model(directory, torch.float32, "cpu", quantize="nf4")


def test_it_stays_as_it_is_stored(quantized):
    directory = quantized(double_quant=False)
    load_model(directory, torch.bfloat16, "cpu", quantize="nf4", double_quant=False)
    with pytest.raises(UserError, match="is stored in nf4 without double quantization, and nf4 with double"):
        load_model(directory, torch.bfloat16, "cpu", quantize="nf4")
