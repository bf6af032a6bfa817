"""GGUF files: what is written, by llama.cpp's definitions and its gguf library, and the same read back."""

import json
import shutil
import stat

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model, load_tokenizer, render_chat
from minorca.data.chat_template import PROBES, resolve_template
from minorca.data.portable_files import SAMPLE
from minorca.export.__main__ import main
from minorca.export.gguf import export_gguf
from minorca.files.adapters import read_adapter_settings
from minorca.files.atomic import sha256
from minorca.model.row_order import mistral_order
from minorca.receipts import is_sealed
from minorca.replay.verify import verify_directory
from tests.data.test_portable_files import json_of_llama, tokenizer_v1, tokenizer_v3
from tests.data.test_tekken import FILE as TEKKEN
from tests.data.test_tokenizer import V3, byte_level, orca, sentencepiece_directory
from tests.helpers import random_adapter, random_mistral, save_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def command(*arguments, **options) -> None:
    named = (f"--{name.replace('_', '-')}={value}" for name, value in options.items())
    main([*map(str, arguments), *named, "--format=gguf"])


def fields(path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path) -> dict:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def logits(path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, torch.float32, "cpu")(TOKENS)


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {"head_dim": 32}], ids=["tied", "other head size"])
def test_reading_gives_the_values_that_were_written(type, shape, save_mistral, tmp_path):
    """Bit for bit: logits are those of a directory whose matrices the gguf library has quantized and dequantized."""
    directory, theirs = save_mistral(**SIZES | shape)
    export_gguf(directory, None, tmp_path / "out", type)
    weights = load_file(directory / "model.safetensors")
    head = "model.embed_tokens.weight" if theirs.config.tie_word_embeddings else "lm_head.weight"
    for name, weight in weights.items():
        if weight.ndim == 2:
            kind = GGMLQuantizationType["Q8_0" if name == head and type[:2] in ("q4", "q5") else type.upper()]
            weights[name] = torch.from_numpy(dequantize(quantize(weight.numpy(), kind).view(numpy.uint8), kind)).clone()
            weights[name] = weights[name].view(weight.shape)
    save_file(weights, directory / "model.safetensors")
    assert torch.equal(logits(tmp_path / "out" / f"model-{type.upper()}.gguf"), logits(directory))


def permute(weights, n_head):
    """llama.cpp's, conversion/llama.py."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def test_tensors_are_llama_cpps(save_mistral, tmp_path):
    """Names by the gguf library's table, shapes, types, and the order of query and key rows."""
    import gguf

    directory, theirs = save_mistral(**SIZES)
    command(model=directory, output=tmp_path / "out", type="f32")
    found = tensors(tmp_path / "out" / "model-F32.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = {}
    for name, weight in theirs.state_dict().items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        expected[names.get_name(name, (".weight",))] = permute(weight, heads) if heads else weight
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert numpy.array_equal(found[name].data, weight.numpy()), name
    assert mistral_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_metadata(save_mistral, tmp_path, capsys):
    directory, _ = save_mistral(vocab_size=258, sliding_window=100, rope_theta=5e4, rms_norm_eps=1e-6, head_dim=32)
    save_tokenizer(directory)
    export_gguf(directory, None, tmp_path / "a name", "q8_0")
    said = fields(tmp_path / "a name" / "model-Q8_0.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a name",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 100,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 258,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: said.get(name) for name in expected} == expected
    receipt = json.loads(said["minorca.receipt"])
    assert is_sealed(receipt) and receipt["base"] == {"model.safetensors": sha256(directory / "model.safetensors")}
    verify_directory(tmp_path / "a name")
    assert "its context is 100 tokens, the model's window: llama.cpp has none" in capsys.readouterr().out


@pytest.mark.parametrize("window, positions, context", [(100, 50, 50), (None, 70, 70), (100, 100, 100)])
def test_the_context_where_nothing_is_cut(window, positions, context, save_mistral, tmp_path, capsys):
    directory, _ = save_mistral(sliding_window=window, max_position_embeddings=positions)
    export_gguf(directory, None, tmp_path / "out")
    assert fields(tmp_path / "out" / "model-F16.gguf")["llama.context_length"] == context
    assert "window" not in capsys.readouterr().out


def test_rows_without_whole_blocks_are_fp16(save_mistral, tmp_path, capsys):
    directory, _ = save_mistral(intermediate_size=80)
    export_gguf(directory, None, tmp_path / "out", "q4_0")
    found = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "out" / "model-Q4_0.gguf").items()}
    assert found["blk.1.ffn_down.weight"] == "F16" and found["blk.1.ffn_up.weight"] == "Q4_0"
    assert found["output.weight"] == "Q8_0" and found["output_norm.weight"] == "F32"
    assert "2 tensors are in f16: their rows are not multiples of 32" in capsys.readouterr().out


@pytest.mark.parametrize("value, message", [(1e5, "over fp16's 65504; choose bf16"), (torch.nan, "contains NaN")])
def test_values_that_cannot_be_held(value, message, save_mistral, tmp_path):
    directory, _ = save_mistral()
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"blk.1.ffn_up.weight .*{message}"):
        export_gguf(directory, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


# ---------------------------------------------------------------------------------------------------------- K-quants


def test_without_llama_cpps_program(save_mistral, tmp_path, monkeypatch):
    directory, _ = save_mistral()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--type is q4_k_m, which llama.cpp's llama-quantize makes.*install.*f16"):
        command(model=directory, output=tmp_path / "out", type="q4_k_m")


@pytest.mark.parametrize("dtype, plain", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_what_llama_cpps_program_is_given(dtype, plain, save_mistral, tmp_path, monkeypatch):
    """A file in the weights' own dtype, the new file's name and the type; the first is removed."""
    directory, theirs = save_mistral()
    theirs.to(dtype).save_pretrained(directory)
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\ncp "$1" "$2"\necho "$3" > "$2.type"\n')
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    command(model=directory, output=tmp_path / "out", type="q4_k_m")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Modelfile", "model-Q4_K_M.gguf", "model-Q4_K_M.gguf.type", "receipt.json"]
    assert (tmp_path / "out" / "model-Q4_K_M.gguf.type").read_text() == "Q4_K_M\n"
    assert tensors(tmp_path / "out" / "model-Q4_K_M.gguf")["blk.0.attn_q.weight"].tensor_type.name == plain


def test_what_llama_cpps_program_says(save_mistral, tmp_path, monkeypatch):
    directory, _ = save_mistral()
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho loading\necho no room here >&2\nexit 3\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match="llama-quantize: ended with status 3: no room here"):
        command(model=directory, output=tmp_path / "out", type="q6_k")
    assert not list(tmp_path.glob("out*"))


# --------------------------------------------------------------------------------------------------------- tokenizers


def tekken(directory):
    shutil.copy(TEKKEN, directory / "tekken.json")


def without_first_space(directory):
    sentencepiece_directory(directory, V3, tokenizer_config={"add_prefix_space": False})


TOKENIZERS = {
    "SentencePiece v1": (tokenizer_v1, 32000),
    "SentencePiece v3": (tokenizer_v3, 32768),
    "without a first space": (without_first_space, 32768),
    "with added tokens": (orca, 32003),
    "tokenizer.json of Llama": (json_of_llama, 32000),
    "byte-level": (byte_level, 512),
    "tekken": (tekken, 131072),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "tekken" else name for name in TOKENIZERS]
)
def test_tokenizers_come_back(name, tmp_path):
    """The ids of ordinary text, of control tokens and of chats, and where a generation ends."""
    make, rows = TOKENIZERS[name]
    model = random_mistral(vocab_size=rows, hidden_size=32, num_hidden_layers=1, eos_token_id=[2, 7])
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    config = (directory / "config.json").read_text()
    make(directory)
    (directory / "config.json").write_text(config)
    before = load_tokenizer(directory)
    export_gguf(directory, None, tmp_path / "out", "q4_0")
    after = load_tokenizer(tmp_path / "out" / "model-Q4_0.gguf")
    texts = [SAMPLE, "", " a", "a  b\n\n", "<s>[INST] typed </s>", "été 12345 don't\t\r\n", "\x00\ufffd"]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    comes_back = [text for text in texts if before.decode(before.encode(text)) == text]
    assert len(comes_back) > 4 and [after.decode(after.encode(text)) for text in comes_back] == comes_back
    shared = {token: i for token, i in before.control_ids.items() if i < rows}
    assert shared.items() <= after.control_ids.items()
    assert (after.bos_id, after.eos_id, after.stop_ids) == (before.bos_id, before.eos_id, before.stop_ids)
    assert after.adds_bos == before.adds_bos
    around = "".join(f"{token}a {token}" for token in list(shared)[:20])
    assert after.encode_template(around) == before.as_in_llama_cpp().encode_template(around)
    try:
        template = resolve_template(before)
    except UserError:
        assert after.chat_template is None
        return
    for messages, prompt in PROBES:
        if prompt:
            assert render_chat(after, messages) == render_chat(before, messages, template=template)


def test_a_pre_tokenizer_that_llama_cpp_has_no_name_for(save_mistral, tmp_path):
    directory, _ = save_mistral(vocab_size=258)
    save_tokenizer(directory)
    values = json.loads((directory / "tokenizer.json").read_text())
    values["pre_tokenizer"]["use_regex"] = False
    (directory / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"pre-tokenizer .*'use_regex': False.*not known.*smollm.*--format hf"):
        export_gguf(directory, None, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["<e{{>", '<e""">', '<e">'])
def test_token_names_that_a_modelfile_cannot_hold(name, save_mistral, tmp_path):
    """They are in the GGUF file all the same."""
    directory, _ = save_mistral(vocab_size=32003)
    config = (directory / "config.json").read_text()
    tokenizer_v1(directory)
    (directory / "config.json").write_text(config)
    added = {"added_tokens_decoder": {"32002": {"content": name, "special": True}}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": name, "bos_token": "<s>"} | added))
    export_gguf(directory, None, tmp_path / "out", "q4_0")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "{{" not in name or "TEMPLATE" not in text.replace("add a TEMPLATE", "")
    assert f'stop "{name}"' not in text
    assert fields(tmp_path / "out" / "model-Q4_0.gguf")["tokenizer.ggml.tokens"][32002] == name


def test_a_model_without_tokenizer(save_mistral, tmp_path):
    directory, _ = save_mistral()
    export_gguf(directory, None, tmp_path / "out")
    assert fields(tmp_path / "out" / "model-F16.gguf")["tokenizer.ggml.model"] == "none"
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model-F16.gguf\nPARAMETER num_ctx 512\n"
    with pytest.raises(UserError, match="no tokenizer found"):
        load_tokenizer(tmp_path / "out" / "model-F16.gguf")


# ------------------------------------------------------------------------------------------------------------ adapters


def test_merged_weights_are_those_of_a_merged_directory(save_mistral, tmp_path):
    directory, theirs = save_mistral()
    random_adapter(theirs, tmp_path / "adapter", ("q", "k", "down"))
    command(model=directory, adapter=tmp_path / "adapter", output=tmp_path / "out", type="f32")
    merged = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
    with torch.no_grad():
        expected = merged(TOKENS)
    assert torch.allclose(logits(tmp_path / "out" / "model-F32.gguf"), expected, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
        {"lora_alpha": 0},
    ],
    ids=["plain", "rslora", "patterns", "zero"],
)
def test_an_adapter_alone_is_exact(config, save_mistral, tmp_path):
    """alpha / rank of each pair times B A, as llama.cpp computes it, is PEFT's update with q and k rows permuted."""
    directory, theirs = save_mistral(**SIZES)
    with_adapter = random_adapter(theirs, tmp_path / "adapter", ("q", "k", "v", "o", "gate", "up", "down"), **config)
    command("--adapter-only", model=directory, adapter=tmp_path / "adapter", output=tmp_path / "out")
    path = tmp_path / "out" / "adapter-F32.gguf"
    said, found = fields(path), tensors(path)
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    alpha = said["adapter.lora.alpha"]
    assert alpha == (config["lora_alpha"] or 1)
    [described] = json.loads(said["minorca.receipt"])["adapters"]
    weights = "adapter_model.safetensors"
    assert described["files"][weights] == sha256(tmp_path / "adapter" / weights)
    verify_directory(tmp_path / "out")
    modules = {name: module for name, module in with_adapter.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 2 * len(modules) == 28
    names = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2), "v_proj": ("attn_v", 0), "o_proj": ("attn_output", 0)}
    names |= {f"{name}_proj": (f"ffn_{name}", 0) for name in ("gate", "up", "down")}
    for name, module in modules.items():
        layer, (place, heads) = name.split("layers.")[1][0], names[name.rpartition(".")[2]]
        a, b = (torch.tensor(found[f"blk.{layer}.{place}.weight.lora_{part}"].data) for part in "ab")
        update = module.get_delta_weight("default")
        expected = permute(update, heads) if heads else update
        assert torch.allclose(b @ a * (alpha / len(a)), expected, rtol=1e-5, atol=1e-6), name
    assert read_adapter_settings(tmp_path / "adapter").alpha == config["lora_alpha"]


def test_adapters_that_gguf_does_not_hold(save_mistral, tmp_path):
    directory, theirs = save_mistral()
    random_adapter(theirs, tmp_path / "adapter", ("q",), modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="trains head too, which llama.cpp's adapters do not hold; merge it"):
        command("--adapter-only", model=directory, adapter=tmp_path / "adapter", output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format=gguf", "--adapter-only"], "--adapter-only needs one --adapter"),
        (["--format=consolidated", "--adapter-only", "--adapter=a"], "--adapter-only is of --format hf and gguf"),
        (["--type=f16"], "--type is an option of --format gguf"),
        (["--format=gguf", "--quantize=nf4"], "--quantize is an option of --format hf"),
        (["--format=gguf", "--type=q3"], "invalid choice: 'q3'"),
        (["--format=gguf", "--adapter-only", "--adapter=a", "--type=q6_k"], "--type is q6_k; expected f32"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main(["--model", str(tmp_path), "--output", str(tmp_path / "out"), *options])


def test_an_output_that_exists(save_mistral, tmp_path):
    directory, _ = save_mistral()
    with pytest.raises(UserError, match="already exists"):
        export_gguf(directory, None, directory)


# ------------------------------------------------------------------------------------------------------- other readers


def test_export_of_a_gguf_file_as_hugging_faces(save_mistral, tmp_path):
    """transformers loads it, with the values of the file."""
    directory, theirs = save_mistral(vocab_size=258, tie_word_embeddings=True)
    save_tokenizer(directory)
    export_gguf(directory, None, tmp_path / "out")
    main(["--model", str(tmp_path / "out" / "model-F16.gguf"), "--output", str(tmp_path / "back")])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    expected = {
        name: weight.half().float() if weight.ndim > 1 else weight for name, weight in theirs.state_dict().items()
    }
    found = back.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert load_tokenizer(tmp_path / "back").encode(SAMPLE) == load_tokenizer(directory).encode(SAMPLE)


def test_a_directory_that_holds_a_gguf_file(save_mistral, tmp_path):
    directory, _ = save_mistral()
    export_gguf(directory, None, tmp_path / "out")
    with pytest.raises(UserError, match=r"config.json nor params.json; give the file itself, .*out/model-F16.gguf"):
        load_model(tmp_path / "out", torch.float32, "cpu")
