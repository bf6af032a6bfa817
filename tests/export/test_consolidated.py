"""Mistral's own layout out: back and forth to the bit, and as transformers' conversion script reads it."""

import json
import shutil
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece
from mistral_common.tokens.tokenizers.tekken import is_tekken
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from minorca import UserError, load_model, load_tokenizer, render_chat
from minorca.export.__main__ import main
from minorca.files.adapters import RECORD
from minorca.files.safe_io import read_json
from minorca.files.tensor_files import PlannedTensor, write_one_file
from minorca.model.architecture import read_architecture
from tests.data.test_portable_files import converted, json_v3, tokenizer_v1, tokenizer_v2, tokenizer_v3
from tests.data.test_tekken import FILE as TEKKEN
from tests.data.test_tokenizer import V3, orca, sentencepiece_directory
from tests.export.test_export import adapted
from tests.helpers import relative_error, save_tokenizer

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
SHAPES = [
    {},
    {"sliding_window": 8, "rope_theta": 5e4, "rms_norm_eps": 1e-5},
    {"head_dim": 32, "max_position_embeddings": 77},
    {"num_attention_heads": 8, "num_key_value_heads": 1},
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
]


def export(directory, output, *options):
    main(["--model", str(directory), "--output", str(output), *map(str, options)])
    return output


def logits(directory, **options) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, torch.float32, "cpu", **options)(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_back_and_forth_to_the_bit(fields, dtype, save_mistral, tmp_path):
    """The tensors and the architecture; the logits in between are those of Hugging Face's files."""
    directory, theirs = save_mistral(**fields)
    theirs.to(dtype).save_pretrained(directory)
    there = export(directory, tmp_path / "there", "--format", "consolidated")
    assert torch.equal(logits(there), logits(directory))
    assert read_architecture(there) == read_architecture(directory)
    back = export(there, tmp_path / "back")
    found, expected = (load_file(path / "model.safetensors") for path in (back, directory))
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == dtype and torch.equal(found[name], expected[name]), name
    assert read_architecture(back) == read_architecture(directory)


# The rules of transformers' convert_mistral_weights_to_hf.py: names, and rows of queries and keys.
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def converted_by_transformers(directory) -> Any:
    params = read_json(directory / "params.json")
    heads = {"wq": params["n_heads"], "wk": params["n_kv_heads"]}
    fields: dict[str, Any] = {
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "intermediate_size": params["hidden_dim"],
        "num_attention_heads": params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "head_dim": params["head_dim"],
        "vocab_size": params["vocab_size"],
        "sliding_window": params.get("sliding_window"),
        "num_key_value_heads": params["n_kv_heads"],
        "rope_theta": params["rope_theta"],
        "max_position_embeddings": params["max_seq_len"],
    }
    config = MistralConfig(**fields)
    state = {}
    for name, value in load_file(directory / "consolidated.safetensors").items():
        whole = {"output": "lm_head", "norm": "model.norm", "tok_embeddings": "model.embed_tokens"}
        module = name.removesuffix(".weight")
        if module in whole:
            state[f"{whole[module]}.weight"] = value
            continue
        _, layer, kind = module.split(".", 2)
        if n := heads.get(kind.removeprefix("attention.")):
            rows, columns = value.shape
            value = value.view(n, rows // n // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        state[f"model.layers.{layer}.{NAMES[kind]}.weight"] = value
    model: Any = MistralForCausalLM._from_config(config, attn_implementation="eager")
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_as_transformers_converts_it(fields, save_mistral, tmp_path):
    """Every tensor has its name and shape, the head of a tied model among them, and the model computes the same."""
    directory, theirs = save_mistral(**fields)
    model = converted_by_transformers(export(directory, tmp_path / "out", "--format", "consolidated"))
    state, expected = model.state_dict(), theirs.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        ours = load_model(tmp_path / "out", torch.float32, "cpu")(TOKENS)
        assert relative_error(model(TOKENS[None]).logits[0], ours) < 1e-5
        assert relative_error(theirs(TOKENS[None]).logits[0], ours) < 1e-5
    assert model.config.rope_parameters == theirs.config.rope_parameters


def test_the_keys_of_params_json(save_mistral, tmp_path):
    """Those that mistral-inference's TransformerArgs requires, and the others where a reader would take another
    default."""
    plain, _ = save_mistral()
    windowed, _ = save_mistral(sliding_window=8, tie_word_embeddings=True)
    required = {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"}
    always = required | {"rope_theta", "max_position_embeddings", "max_seq_len"}
    assert read_json(export(plain, tmp_path / "a", "--format", "consolidated") / "params.json").keys() == always
    found = read_json(export(windowed, tmp_path / "b", "--format", "consolidated") / "params.json")
    assert found.keys() == always | {"sliding_window", "tied_embeddings"} and found["sliding_window"] == 8


def test_a_tied_head_is_said(save_mistral, tmp_path, capsys):
    directory, _ = save_mistral(tie_word_embeddings=True)
    export(directory, tmp_path / "out", "--format", "consolidated")
    assert "the head a copy of the embedding, to which it is tied" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])


def test_with_an_adapter_and_a_quantized_base(save_mistral, tmp_path):
    """The merged tensors are those of Hugging Face's layout; quantized bases become values, and stay so."""
    directory, theirs = save_mistral(intermediate_size=128)
    adapted(theirs, tmp_path / "adapter")
    export(directory, tmp_path / "nf4", "--quantize", "nf4")
    for base in (directory, tmp_path / "nf4"):
        options = ["--adapter", tmp_path / "adapter"]
        plain = export(base, tmp_path / f"{base.name}-hf", *options)
        there = export(base, tmp_path / f"{base.name}-mistral", *options, "--format", "consolidated")
        back = export(there, tmp_path / f"{base.name}-back")
        found, expected = (load_file(path / "model.safetensors") for path in (back, plain))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="--quantize is an option of --format hf"):
        export(directory, tmp_path / "out", "--format", "consolidated", "--quantize", "nf4")
    with pytest.raises(UserError, match="already exists; give --output a new name"):
        export(directory, tmp_path / "nf4", "--format", "consolidated")


def test_one_file_of_any_size(tmp_path):
    """Whose tensors are made one after another, after the header was written."""
    planned = [PlannedTensor(f"tensor {n}", (n + 1, 3), torch.bfloat16) for n in range(5)]
    planned += [PlannedTensor("empty", (0, 2), torch.float32), PlannedTensor('é"', (2,), torch.float16)]
    values = {}

    def make():
        for tensor in planned:
            values[tensor.name] = torch.randn(tensor.shape).to(tensor.dtype)
            yield values[tensor.name]

    write_one_file(tmp_path / "x.safetensors", planned, make())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in found)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def tekken(directory):
    directory.mkdir()
    shutil.copy(TEKKEN, directory / "tekken.json")
    return directory


def only_v3_unversioned(directory):
    """As Mistral-7B-Instruct-v0.3 ships it beside tokenizer.json."""
    converted(directory, V3, legacy=False)
    return sentencepiece_directory(directory, V3, "tokenizer.model")


# what makes a directory, the rows of its embedding, the file that is written and the version that mistral-common reads
READ_BY_MISTRAL = {
    "v1": (tokenizer_v1, 32000, "tokenizer.model.v1", "v1"),
    "v2": (tokenizer_v2, 32768, "tokenizer.model.v2", "v2"),
    "v3": (tokenizer_v3, 32768, "tokenizer.model.v3", "v3"),
    "v3 unversioned": (only_v3_unversioned, 32768, "tokenizer.model.v3", "v3"),
    "tekken": (tekken, 131072, "tekken.json", "v3"),
}
SLOW = ("tekken", "v3 unversioned")
MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3? naïve 日本語"},
]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in READ_BY_MISTRAL]
)
def test_mistral_common_gives_our_ids(name, save_mistral, tmp_path, caplog):
    """mistral-inference finds one tokenizer, which renders conversations as we do there, and as we do after the way
    back."""
    make, rows, file, version = READ_BY_MISTRAL[name]
    directory, _ = save_mistral(vocab_size=rows, num_key_value_heads=1, **SMALL)
    for path in make(tmp_path / "tokenizer").iterdir():
        if path.name != "config.json":
            shutil.copy(path, directory)
    there = export(directory, tmp_path / "there", "--format", "consolidated")
    assert [path.name for path in there.iterdir() if is_tekken(path) or is_sentencepiece(path)] == [file]
    theirs = MistralTokenizer.from_file(str(there / file))
    assert theirs.version.value == version
    asked: list = MESSAGES
    expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=asked)).tokens
    back = export(there, tmp_path / "back")
    for path in (directory, there, back):
        assert render_chat(load_tokenizer(path), MESSAGES) == expected, path
    assert "Mistral's readers" not in caplog.text


def test_the_version_that_an_adapter_was_trained_with(save_mistral, tmp_path, caplog):
    """Template v2 on v3's vocabulary: mistral-common then writes v2."""
    directory, theirs = save_mistral(vocab_size=32768, num_key_value_heads=1, **SMALL)
    sentencepiece_directory(directory, V3, "tokenizer.model.v3")
    adapted(theirs, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text(json.dumps({"template": "mistral-v2"}))
    export(directory, tmp_path / "out", "--adapter", tmp_path / "adapter", "--format", "consolidated")
    reader = MistralTokenizer.from_file(str(tmp_path / "out" / "tokenizer.model.v2"))
    asked: list = MESSAGES
    expected = reader.encode_chat_completion(ChatCompletionRequest(messages=asked)).tokens
    assert render_chat(load_tokenizer(tmp_path / "out"), MESSAGES, template="mistral-v2") == expected


def test_what_mistrals_readers_would_not_know(save_mistral, tmp_path, caplog):
    """Added tokens and another template are said; a tokenizer of another kind too. Ours stay beside the weights."""
    directory, _ = save_mistral(vocab_size=32002, num_key_value_heads=1, **SMALL)
    config = (directory / "config.json").read_text()
    orca(directory)
    (directory / "config.json").write_text(config)
    export(directory, tmp_path / "orca", "--format", "consolidated")
    assert "tokenizer.model.v1 lacks <|im_end|>, <|im_start|>, which Mistral's readers will not know" in caplog.text
    assert "the model's chat template is chatml; Mistral's readers write [INST] instead" in caplog.text
    assert render_chat(load_tokenizer(tmp_path / "orca"), MESSAGES) == render_chat(load_tokenizer(directory), MESSAGES)
    assert load_tokenizer(tmp_path / "orca").stop_ids == load_tokenizer(directory).stop_ids

    directory, _ = save_mistral(vocab_size=260)
    save_tokenizer(directory)
    export(directory, tmp_path / "bytes", "--format", "consolidated")
    assert "no tokenizer for Mistral's readers: tokenizer.json cannot be written as" in caplog.text
    assert load_tokenizer(tmp_path / "bytes").encode("é <b>") == load_tokenizer(directory).encode("é <b>")

    directory, _ = save_mistral(vocab_size=32768, num_key_value_heads=1, **SMALL)
    json_v3(tmp_path / "json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "json" / name, directory)
    sentencepiece_directory(directory)
    caplog.clear()
    export(directory, tmp_path / "stale", "--format", "consolidated")
    assert "gives other ids to text than tokenizer.json, which is the model's" in caplog.text
