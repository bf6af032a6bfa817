"""Merged and converted weights equal those that PEFT merges, and transformers loads them with what lies beside them."""

import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as JsonModel
from tokenizers import models
from transformers import AutoModelForCausalLM, AutoTokenizer

import minorca.files.tensor_files
from minorca import UserError, load_model, load_tokenizer, render_chat
from minorca.cli import config_parser, parse_config
from minorca.data.portable_files import RECORD, load_chat
from minorca.export.__main__ import export, main
from minorca.generate import __main__ as generate_command
from minorca.generate import engine, generate
from minorca.train import __main__ as train_command
from minorca.train.inputs import read_data, read_tokenizer
from tests.data.test_jinja_template import SHIPPED
from tests.data.test_portable_files import json_of_llama, tokenizer_v1, tokenizer_v3
from tests.data.test_tokenizer import byte_level, orca
from tests.files.test_weights import BIN, as_bin, as_bin_shards, as_consolidated, as_hub_cache
from tests.helpers import relative_error
from tests.serve.test_serve import IN_FP32, serving

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def adapted(model, directory, targets=TARGETS, **fields):
    """Saves a PEFT adapter with random B to `directory`; returns the model into which PEFT has merged it."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **fields)
    with_adapter = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    with_adapter.save_pretrained(directory)
    return with_adapter.merge_and_unload()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def read_back(directory):
    """An exported model loaded by transformers, which finds no missing, unexpected or mismatched tensor."""
    options = {"attn_implementation": "eager", "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, **options)
    model, info = loaded
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize(
    "fields, lora",
    [
        ({}, {}),
        ({"sliding_window": 8, "head_dim": 32}, {"use_rslora": True}),
        ({"tie_word_embeddings": True}, {}),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, {"targets": ["k_proj", "down_proj"]}),
    ],
    ids=["plain", "rslora", "tied", "some targets"],
)
def test_merging_equals_pefts(fields, lora, save_mistral, tmp_path):
    """In transformers and here, in fp32; the adapter changes the logits."""
    directory, theirs = save_mistral(**fields)
    without = logits_of(theirs)
    expected = logits_of(adapted(theirs, tmp_path / "adapter", **lora))
    export(directory, tmp_path / "adapter", tmp_path / "merged")
    assert relative_error(logits_of(read_back(tmp_path / "merged")), expected) <= 1e-6
    with torch.no_grad():
        assert relative_error(load_model(tmp_path / "merged", torch.float32, "cpu")(TOKENS), expected) <= 1e-5
    assert relative_error(without, expected) > 1e-2


@pytest.mark.parametrize("layout", [as_bin, as_bin_shards, as_consolidated, as_hub_cache])
def test_merging_from_every_layout(layout, save_mistral, tmp_path):
    """The tensors are bit-identical to those from plain safetensors; the base model's files are unchanged."""
    directory, theirs = save_mistral()
    adapted(theirs, tmp_path / "adapter")
    export(directory, tmp_path / "adapter", tmp_path / "expected")
    layout(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    export(directory, tmp_path / "adapter", tmp_path / "merged")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8])
def test_conversion_of_mistrals_layout(dtype, window, save_mistral, tmp_path):
    """Without an adapter transformers loads the same model, in the dtype of the files."""
    directory, theirs = save_mistral(sliding_window=window, rope_theta=5e4)
    as_consolidated(directory, dtype)
    export(directory, None, tmp_path / "converted")
    theirs.to(dtype).save_pretrained(tmp_path / "expected")
    converted, expected = read_back(tmp_path / "converted"), read_back(tmp_path / "expected")
    assert converted.dtype == dtype
    assert torch.equal(logits_of(converted), logits_of(expected))


def test_shards_load_in_transformers(save_mistral, tmp_path, monkeypatch):
    """No shard exceeds the limit, no two neighbouring shards fit into one, and the logits are the same."""
    directory, theirs = save_mistral()
    adapted(theirs, tmp_path / "adapter")
    export(directory, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(minorca.files.tensor_files, "FILE_BYTES", 60_000)
    export(directory, tmp_path / "adapter", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in (tmp_path / "sharded").glob("model-*.safetensors")}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert max(sizes) <= 60_000
    # two neighbouring shards together exceed the limit
    assert 4 < len(sizes) < 2 * sum(sizes) / 60_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert torch.equal(logits_of(read_back(tmp_path / "sharded")), logits_of(read_back(tmp_path / "whole")))


def test_bf16_is_rounded_once(save_mistral, tmp_path):
    """W + scale B A is computed in fp32 and rounded once: not the result of bf16 arithmetic."""
    directory, theirs = save_mistral()
    theirs.to(torch.bfloat16).save_pretrained(directory)
    base = load_file(directory / "model.safetensors")
    adapted(theirs.float(), tmp_path / "adapter")
    export(directory, tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys() and len(adapter) == 2 * 7 * 2
    rounded_twice = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in adapter:
            assert torch.equal(merged[name], weight), name
            continue
        update = 2.0 * (adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"])
        assert torch.equal(merged[name], (weight.float() + update).to(torch.bfloat16)), name
        rounded_twice += int((merged[name] != weight + update.to(torch.bfloat16)).sum())
    assert rounded_twice > 0


def test_what_belongs_to_the_model_comes_along(save_mistral, tmp_path, capsys):
    """Configuration, tokenizer and template are copied, other formats' weights are not; the output is printed."""
    directory, _ = save_mistral(vocab_size=512)
    byte_level(directory)
    for name in ("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "README.md"):
        (directory / name).write_text("{}")
    as_bin(directory)
    main(["--model", str(directory), "--output", str(tmp_path / "out" / "model")])
    assert str(tmp_path / "out" / "model") in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "out" / "model").iterdir()}
    assert names == {file.name for file in directory.iterdir()} - {BIN, "README.md"} | {
        "model.safetensors",
        "receipt.json",
    }
    assert (tmp_path / "out" / "model" / "config.json").read_text() == (directory / "config.json").read_text()
    text = "the quick brown fox <|im_end|>"
    assert load_tokenizer(tmp_path / "out" / "model").encode(text) == load_tokenizer(directory).encode(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


OTHER = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Reverse ab"},
    {"role": "assistant", "content": "ba"},
    {"role": "user", "content": "Reverse cd"},
]


# A tokenizer and its size, the shipped template, data.template, and the template that it stands for. Those of Mistral's
# Instruct models write the system prompt into the first user message (v0.2) or the last (v0.3).
STATIONS = {
    "v0.1": (tokenizer_v1, 32000, None, "auto", "mistral-v1"),
    "v0.3": (tokenizer_v3, 32768, None, "auto", "mistral-v3"),
    "Instruct-v0.2": (json_of_llama, 32000, SHIPPED["v0.2"][1], "auto", "mistral-v1"),
    "Instruct-v0.3": (tokenizer_v3, 32768, SHIPPED["v0.3"][1], "auto", "mistral-v3"),
    "another": (tokenizer_v1, 32000, OTHER, "mistral-v1", "mistral-v1"),
    "chatml": (orca, 32002, None, "auto", "chatml"),
    "jinja": (orca, 32002, OTHER, "auto", "jinja"),
}


FAST = ("Instruct-v0.3", "jinja")


@pytest.mark.parametrize(
    "station", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in STATIONS if name not in FAST)]
)
def test_the_same_ids_at_every_station(station, workplace, save_mistral, monkeypatch, capsys):
    """Trained on OpenOrca's rows, the adapter asks with the template of training in `generate` and over HTTP, and so
    does what is exported in transformers, where the greedy answer is the same and ends at the same ids."""
    make, rows, shipped, setting, template = STATIONS[station]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    directory, _ = save_mistral(vocab_size=rows, num_key_value_heads=1, **sizes)
    config = (directory / "config.json").read_text()
    make(directory)
    (directory / "config.json").write_text(config)
    if shipped:
        (directory / "chat_template.jinja").write_text(shipped)
    tok = load_tokenizer(directory)
    prompt = render_chat(tok, CHAT, template=template)
    run = workplace(**{"model.path": directory, "data.template": setting, "data.train_on": "all", "train.steps": 2})
    settings = parse_config(config_parser("minorca.train", ""), run)[1]
    store, _ = read_data(settings, *read_tokenizer(settings))
    for i, line in enumerate((workplace.path / "rows.jsonl").read_text().splitlines()):
        row = json.loads(line)
        system = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
        asked = render_chat(tok, [*system, {"role": "user", "content": row["question"]}], template=template)
        assert store.row(i)[0][: len(asked)].tolist() == asked
    train_command.main(run)
    adapter = workplace.path / "run" / "adapter"
    ours = load_model(directory, torch.float32, "cpu", adapter=adapter)
    [answer] = generate(ours, [prompt], 20)
    # Another stop id, which only config.json names.
    (directory / "config.json").write_text(json.dumps(json.loads(config) | {"eos_token_id": answer[9]}))
    tok = load_tokenizer(directory)
    [answer] = generate(ours, [prompt], 20, stop_ids=tok.stop_ids)
    assert 0 < len(answer) <= 10

    monkeypatch.setattr(engine, "fast_dtype", lambda: torch.float32)
    [system, user] = CHAT[:2]
    options = ["--model", directory, "--adapter", adapter, "--system", system["content"], "--prompt", user["content"]]
    capsys.readouterr()
    generate_command.main([*map(str, options), "--max-new-tokens", "20", "--json"])
    single = render_chat(tok, [system, user], template=template)
    said = json.loads(capsys.readouterr().out)
    assert said["prompt_tokens"] == len(single)
    assert said["text"] == tok.decode(generate(ours, [single], 20, stop_ids=tok.stop_ids)[0])
    # A checkpoint records the template too.
    assert load_chat(tok, rows, workplace.path / "run" / "checkpoints" / "step-00000002") == (tok, template)

    with serving("--model", directory, "--adapter", f"own={adapter}", program=("-c", IN_FP32)) as server:
        conversation: Any = CHAT
        ask = {"model": "own", "messages": conversation, "max_tokens": 20, "temperature": 0}
        response = server.client().chat.completions.create(**ask)
    assert response.usage.prompt_tokens == len(prompt)
    # A response leaves out the stop id, here one of an ordinary token.
    assert response.choices[0].message.content == tok.decode(answer[:-1])

    output = workplace.path / "merged"
    export(directory, adapter, output)
    for path in (output, adapter):
        theirs = AutoTokenizer.from_pretrained(path)
        assert theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == prompt
        assert theirs.apply_chat_template([system, user], add_generation_prompt=True)["input_ids"] == single
    assert render_chat(load_tokenizer(output), CHAT) == prompt
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt))}
    ids = read_back(output).generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert ids[0, len(prompt) :].tolist() == answer


def test_a_base_without_any_template(save_mistral, tmp_path, caplog):
    """Nothing is made up for a tokenizer that no built-in template fits."""
    directory, _ = save_mistral(vocab_size=512, bos_token_id=None, eos_token_id=None)
    model = JsonModel(models.BPE({"a": 0, "b": 1}, []))
    model.save(str(directory / "tokenizer.json"))
    export(directory, None, tmp_path / "out")
    assert "no chat template is written" in caplog.text
    assert not list((tmp_path / "out").glob("*.jinja"))


def test_a_tokenizer_that_only_the_adapter_brings(save_mistral, tmp_path):
    """With the model's stop ids; without any tokenizer, what lies beside the model is copied."""
    directory, theirs = save_mistral(vocab_size=512)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    adapted(theirs, tmp_path / "adapter")
    export(directory, tmp_path / "adapter", tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    byte_level(tmp_path / "adapter")
    export(directory, tmp_path / "adapter", tmp_path / "out")
    text = "the quick brown fox"
    ids: Any = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False)
    assert ids["input_ids"] == load_tokenizer(tmp_path / "adapter").encode(text)
    assert render_chat(load_tokenizer(tmp_path / "out"), CHAT) == render_chat(
        load_tokenizer(tmp_path / "adapter"), CHAT
    )
    assert {5, 7} < set(json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"])


def test_a_recorded_template_that_the_model_cannot_write(save_mistral, tmp_path):
    """The adapter is another model's: nothing is written without the template of its training."""
    directory, theirs = save_mistral(vocab_size=512)
    byte_level(directory)
    adapted(theirs, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text('{"template": "mistral-v3"}')
    with pytest.raises(UserError, match="template mistral-v3 needs the control token"):
        export(directory, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["broken link", "long name"])
def test_a_name_that_no_directory_can_have(kind, save_mistral, tmp_path):
    """Said before anything is computed, and without a traceback."""
    directory, _ = save_mistral()
    output = tmp_path / ("o" if kind == "broken link" else "o" * 300)
    if kind == "broken link":
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists" if kind == "broken link" else "File name too long"):
        main([f"--model={directory}", f"--output={output}"])


@pytest.mark.parametrize("format", ["onnx", "pt"])
def test_only_formats_that_exist(format, tmp_path):
    with pytest.raises(UserError, match="--format.*invalid choice"):
        main(["--model", str(tmp_path), "--output", str(tmp_path / "out"), "--format", format])
