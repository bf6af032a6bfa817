"""Directories that speak for themselves: transformers gives the ids of our renderer from what lies beside weights."""

import json
import shutil
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig

from minorca import UserError, load_tokenizer, render_chat
from minorca.data.portable_files import RECORD, adapter_files, load_chat, portable_files
from minorca.files.atomic import write_files
from tests.data.test_tokenizer import NAMES, ORCA_TOKENS, V1, V2, V3, byte_level, orca, sentencepiece_directory

# Without runs of spaces, to which transformers gives other ids than SentencePiece (test_tokenizer.py).
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "What is\n\n2 + 2?\n"}
ANSWER = {"role": "assistant", "content": "It is 4 \n ünïcode 🦜"}
AGAIN = {"role": "user", "content": "日本語"}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, AGAIN],
    [SYSTEM, USER, ANSWER, AGAIN],
    [AGAIN, ANSWER, USER, ANSWER, AGAIN],
]
CONFIG = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def tokenizer_v1(directory):
    return sentencepiece_directory(directory, V1, "tokenizer.model", config=CONFIG)


def tokenizer_v2(directory):
    return sentencepiece_directory(directory, V2, "tokenizer.model.v2", config=CONFIG)


def tokenizer_v3(directory):
    return sentencepiece_directory(directory, V3, "tokenizer.model.v3", config=CONFIG)


def converted(directory, source, **config):
    """tokenizer.json as transformers writes it; it gives the spaces after control tokens by `legacy`."""
    beside = sentencepiece_directory(directory.parent / "source", source, config=CONFIG, tokenizer_config=config)
    AutoTokenizer.from_pretrained(beside).save_pretrained(directory)
    return directory


def json_v3(directory):
    return converted(directory, V3, legacy=False)


def json_v1(directory):
    return converted(directory, V1, legacy=False, add_bos_token=True)


def json_of_llama(directory):
    """As Mistral's fine-tunes ship it: the class would give other spaces than the file does."""
    converted(directory, V1, legacy=True)
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMES | {"tokenizer_class": "LlamaTokenizer"}))
    return directory


def with_bos(directory):
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return byte_level(directory, template)


MODELS = [
    (tokenizer_v1, "mistral-v1"),
    (json_v1, "mistral-v1"),
    (json_of_llama, "mistral-v1"),
    (tokenizer_v2, "mistral-v2"),
    (tokenizer_v3, "mistral-v3"),
    (tokenizer_v3, "mistral-v2"),
    (json_v3, "mistral-v3"),
    (orca, "chatml"),
    (orca, "mistral-v1"),
    (byte_level, "chatml"),
    (with_bos, "chatml"),
]


@pytest.mark.parametrize("make, template", MODELS, ids=lambda value: getattr(value, "__name__", value))
def test_transformers_gives_our_ids(make, template, tmp_path):
    """From the files beside an adapter, for one turn and several; the model's own template writes something else."""
    directory = make(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tok = load_tokenizer(directory)
    (tmp_path / "adapter").mkdir()
    write_files(tmp_path / "adapter", adapter_files(tok, template))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for messages in CONVERSATIONS:
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == render_chat(tok, messages, template=template), messages
    whole = theirs.apply_chat_template([SYSTEM, USER, ANSWER])["input_ids"]
    assert whole == render_chat(tok, [SYSTEM, USER, ANSWER], add_generation_prompt=False, template=template)
    again, recorded = load_chat(tok, tok.vocab_size, tmp_path / "adapter")
    assert recorded == template and again is not tok
    assert (again.bos_id, again.eos_id, again.adds_bos, again.stop_ids) == (
        tok.bos_id,
        tok.eos_id,
        tok.adds_bos,
        tok.stop_ids,
    )
    assert again.control_ids == tok.control_ids and again.encode("  a b") == tok.encode("  a b")


@pytest.mark.parametrize("template", ["mistral-v1", "mistral-v3", "chatml"])
def test_what_a_template_cannot_write_is_refused(template, tmp_path):
    """Never left out: tools, and messages in another order."""
    tok = load_tokenizer(orca(tmp_path / "model") if template == "chatml" else tokenizer_v3(tmp_path / "model"))
    write_files(tmp_path, portable_files(tok, template, tok.path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for messages, tools in [([USER], [tool]), ([USER, call], None), ([USER, {"role": "tool", "content": "4"}], None)]:
        with pytest.raises(Exception, match="no form for tool|expected"):
            theirs.apply_chat_template(messages, tools=tools)
    if template != "chatml":
        with pytest.raises(Exception, match="expected user and assistant messages in turn"):
            theirs.apply_chat_template([USER, AGAIN])


def test_a_template_that_writes_the_same_is_kept(smollm2, tmp_path):
    """SmolLM2's is ChatML except for a system prompt of its own; where it is what was trained, it is copied."""
    tok = load_tokenizer(smollm2)
    shipped = (smollm2 / "chat_template.jinja").read_bytes()
    assert portable_files(tok, "jinja", smollm2)["chat_template.jinja"] == shipped
    ours = portable_files(tok, "chatml", smollm2)["chat_template.jinja"]
    assert ours != shipped
    write_files(tmp_path, portable_files(tok, "chatml", smollm2))
    assert portable_files(load_tokenizer(tmp_path), "chatml", tmp_path)["chat_template.jinja"] == ours


def test_ids_that_no_template_gives_are_said(tmp_path, caplog):
    """mistral-v1 writes [INST] as text, which is a control token of this tokenizer."""
    tok = load_tokenizer(tokenizer_v3(tmp_path))
    portable_files(tok, "mistral-v1", tmp_path)
    assert "no Jinja template gives the ids of mistral-v1" in caplog.text


@pytest.mark.parametrize("shipped, said", [("{{ tools }}", True), ("{% if tools %}{{ [].x.y }}{% endif %}", False)])
def test_a_replaced_template_that_writes_tools_is_said(shipped, said, tmp_path, caplog):
    tok = load_tokenizer(orca(tmp_path, tokenizer_config={"chat_template": shipped}))
    portable_files(tok, "jinja", tmp_path)
    assert not caplog.records
    portable_files(tok, "chatml", tmp_path)
    assert ("its chat template writes tools" in caplog.text) == said


def test_every_template_file_comes_along(tmp_path):
    """In all the places where models have them; none contradicts a template that replaces them."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    settings = {"tokenizer_config": {"chat_template": named}, "chat_template": {"chat_template": "C"}}
    directory = orca(tmp_path / "model", **settings)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("R")
    tok = load_tokenizer(directory)
    files = portable_files(tok, "jinja", directory)
    assert files["additional_chat_templates/rag.jinja"] == b"R" and "chat_template.json" in files
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == named
    files = portable_files(tok, "chatml", directory)
    assert [name for name in files if "template" in name] == ["chat_template.jinja"]
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])


def test_files_have_the_names_that_others_look_for(tmp_path):
    """mistral-common knows the version by the name, all others look for tokenizer.model."""
    files = portable_files(load_tokenizer(tokenizer_v3(tmp_path / "v3")), "mistral-v3", tmp_path / "v3")
    assert files["tokenizer.model"] == files["tokenizer.model.v3"] == V3.read_bytes()
    config = json.loads(files["tokenizer_config.json"])
    assert config == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
    }
    given = {"tokenizer_class": "CodeLlamaTokenizer", "model_max_length": 9} | NAMES
    directory = sentencepiece_directory(tmp_path / "given", V1, tokenizer_config=given)
    files = portable_files(load_tokenizer(directory), "mistral-v1", directory)
    assert json.loads(files["tokenizer_config.json"]) == given | {"legacy": True, "add_bos_token": True}


def test_generation_stops_at_every_stop_id(tmp_path):
    """Merged into what the model says on generation."""
    settings = {"eos_token_id": 7, "temperature": 0.7, "do_sample": True}
    directory = orca(tmp_path / "model", generation_config=settings, config=CONFIG | {"eos_token_id": 2})
    write_files(tmp_path, portable_files(load_tokenizer(directory), "chatml", directory))
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == [32000, 2, 7]
    assert (theirs.bos_token_id, theirs.temperature, theirs.do_sample) == (1, 0.7, True)


def test_the_tokenizer_of_an_adapter(tmp_path, caplog):
    """One that gives other ids is used and named; the same one is not kept twice; too many ids are refused."""
    base = load_tokenizer(orca(tmp_path / "base", config={"eos_token_id": 2}))
    (tmp_path / "bare").mkdir()
    assert load_chat(base, 32002, tmp_path / "bare") == load_chat(base, 32002, None) == (base, None)
    # As TRL saves it: without the model's configuration, and as tokenizer.json.
    shutil.copy(tmp_path / "base" / "special_tokens_map.json", orca(tmp_path / "same"))
    assert load_chat(base, 32002, tmp_path / "same") == (base, None)
    assert not caplog.records
    more = ORCA_TOKENS | {"<|tool|>": 32002}
    other, _ = load_chat(base, 32003, orca(tmp_path / "other", added_tokens=more))
    assert other.control_ids == more and other.stop_ids == {2, 32000}
    assert "other: its tokenizer gives other ids than the model's (control tokens, number of ids)" in caplog.text
    orca(tmp_path / "beyond", added_tokens=more, special_tokens_map={"bos_token": "<s>", "eos_token": "<|tool|>"})
    with pytest.raises(UserError, match="beyond: .* 32002"):
        load_chat(base, 32002, tmp_path / "beyond")


@pytest.mark.parametrize("word", ["word", "fox"])
def test_an_adapter_with_an_added_word(word, tmp_path, caplog):
    """As transformers saves it, not special; it is found in text even where the vocabulary has it anyway."""
    base = load_tokenizer(byte_level(tmp_path / "base"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "same")
    assert load_chat(base, 512, tmp_path / "same") == (base, None) and not caplog.records
    theirs.add_tokens([word])
    theirs.save_pretrained(tmp_path / "adapter")
    tok, _ = load_chat(base, 512, tmp_path / "adapter")
    assert "its tokenizer gives other ids than the model's" in caplog.text and "vocabulary" in caplog.text
    expected = theirs(f"a {word}s", add_special_tokens=False)["input_ids"]
    assert tok.encode(f"a {word}s") == expected != base.encode(f"a {word}s")


@pytest.mark.parametrize("setting", [{"legacy": False}, {"add_prefix_space": False}])
def test_an_adapter_with_other_spaces(setting, tmp_path, caplog):
    base = load_tokenizer(orca(tmp_path / "base"))
    other, _ = load_chat(base, 32002, orca(tmp_path / "adapter", tokenizer_config=setting))
    assert other is not base and "(text" in caplog.text


def test_an_adapter_takes_from_the_model_what_it_does_not_say(tmp_path, caplog):
    """Chat templates, and bos and eos where tokenizer.json or tokenizer.model lies alone."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config = NAMES | {"chat_template": named, "add_bos_token": True}
    for make, file in ((byte_level, "tokenizer.json"), (sentencepiece_directory, "tokenizer.model")):
        for more in ({}, {"eos_token": "<unk>", "add_bos_token": False}):
            place = tmp_path / f"{file}-{len(more)}"
            place.mkdir()
            base = load_tokenizer(make(place / "base", tokenizer_config=config | more))
            (place / "adapter").mkdir()
            shutil.copy(place / "base" / file, place / "adapter")
            tok, _ = load_chat(base, 32002, place / "adapter")
            for name in ("bos_id", "eos_id", "adds_bos", "chat_templates", "chat_template"):
                assert getattr(tok, name) == getattr(base, name) is not None, name
            (place / "adapter" / "tokenizer_config.json").write_text('{"bos_token": "<unk>", "eos_token": "<s>"}')
            tok, _ = load_chat(base, 32002, place / "adapter")
            assert (tok.bos_id, tok.eos_id, tok.chat_template) == (0, 1, "D")


@pytest.mark.parametrize("beside", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("shipped", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_an_adapter_that_brings_a_template_alone(shipped, beside, tmp_path):
    """It is asked and exported with that template, whether or not the model ships another."""
    directory = orca(tmp_path / "base", tokenizer_config={"chat_template": shipped}, config=CONFIG)
    (tmp_path / "adapter").mkdir()
    template = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"
    (tmp_path / "adapter" / beside).write_text(
        template if beside.endswith("jinja") else json.dumps({"chat_template": template})
    )
    base = load_tokenizer(directory)
    tok, recorded = load_chat(base, 32002, tmp_path / "adapter")
    assert (recorded, base.chat_template) == (None, shipped)
    assert render_chat(tok, [USER, ANSWER, AGAIN]) == tok.encode_template(
        "".join(message["content"] + "!" for message in (USER, ANSWER, AGAIN))
    )
    write_files(tmp_path, portable_files(tok, "jinja", directory))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template([USER], tokenize=False) == USER["content"] + "!"


@pytest.mark.parametrize("record", ['{"template": "mistral-v9"}', "{}", '{"template": ["chatml"]}', "[]", "{"])
def test_an_invalid_record_is_named(record, tmp_path):
    (tmp_path / RECORD).write_text(record)
    with pytest.raises(UserError, match=RECORD):
        load_chat(load_tokenizer(orca(tmp_path / "base")), 32002, tmp_path)
