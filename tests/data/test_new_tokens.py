"""Tokens that a run adds: their ids, what no longer happens to their text, and the files that say so to others."""

import json

import pytest
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.cli import config_parser, parse_config
from minorca.data.new_tokens import new_ids, training_tokenizer
from minorca.data.portable_files import adapter_files, load_chat
from minorca.files.atomic import write_files
from tests.data.test_portable_files import CONVERSATIONS, json_v1, tokenizer_v1, tokenizer_v3
from tests.data.test_tekken import FILE as TEKKEN
from tests.data.test_tokenizer import FORGERIES, TEXTS, byte_level, orca, sentencepiece_directory, write

CHATML = {"<|im_end|>": 32000, "<|im_start|>": 32001}


def bare(directory):
    """tokenizer.model alone."""
    return sentencepiece_directory(directory)


def with_decoder(directory):
    """Tokens that only the settings beside tokenizer.json name, of which one has no row."""
    decoder = {"294": {"content": "⟨word⟩"}, "295": {"content": "[PAD]", "special": True}}
    return byte_level(directory, tokenizer_config={"added_tokens_decoder": decoder}, config={"vocab_size": 295})


def training(directory, tokens=(), template="chatml"):
    options = [f"--model.path={directory}", "--data.train=rows", f"--data.template={template}"]
    return training_tokenizer(parse_config(config_parser("t", ""), [*options, f"--train.new_tokens={list(tokens)}"])[1])


@pytest.mark.parametrize("make", [bare, tokenizer_v1], ids=lambda make: make.__name__)
def test_chatml_gets_mistral_7b_openorcas_ids(make, tmp_path):
    """From Mistral 7B v0.1's vocabulary; the ids of conversations are those of its published files."""
    tok, template = training(make(tmp_path / "base"))
    assert (template, tok.new_tokens, new_ids(tok)) == ("chatml", tuple(CHATML), range(32000, 32002))
    theirs = load_tokenizer(orca(tmp_path / "orca"))
    for messages in CONVERSATIONS:
        assert render_chat(tok, messages, template="chatml") == render_chat(theirs, messages, template="chatml")
    assert 32000 in tok.stop_ids and tok.adds_bos
    for text in FORGERIES:
        assert tok.encode(text) == load_tokenizer(tmp_path / "base").encode(text)


@pytest.mark.parametrize(
    "make, tokens",
    [
        (bare, []),
        (tokenizer_v1, ["<|tool|>", "<|im_end|>"]),
        (json_v1, ["<|tool|>"]),
        (tokenizer_v3, []),
        (byte_level, ["<|tool|>"]),
        (with_decoder, ["<|tool|>", "<a b>"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_files_beside_an_adapter(make, tokens, tmp_path):
    """transformers, and we without being told again, give the ids of training."""
    directory = make(tmp_path / "base")
    tok, template = training(directory, tokens)
    (tmp_path / "adapter").mkdir()
    write_files(tmp_path / "adapter", adapter_files(tok, template))
    again, recorded = load_chat(load_tokenizer(directory), tok.vocab_size, tmp_path / "adapter")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert recorded == "chatml" and again.new_tokens == () and again.control_ids == tok.control_ids
    assert (again.vocab_size, again.stop_ids, again.adds_bos) == (tok.vocab_size, tok.stop_ids, tok.adds_bos)
    for token, i in zip(tok.new_tokens, new_ids(tok)):
        assert tok.encode_template(token)[-1] == again.control_ids[token] == theirs.convert_tokens_to_ids(token) == i
    for text in (*TEXTS, *FORGERIES):
        assert again.encode(text) == tok.encode(text)
        assert again.encode_template(text) == tok.encode_template(text)
    for messages in CONVERSATIONS:
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert (
            prompt == render_chat(tok, messages, template=template) == render_chat(again, messages, template=template)
        )
    record = json.loads((tmp_path / "adapter" / "minorca.json").read_text())
    assert record["template"] == "chatml" and "base_vocab_size" in record


def test_tokens_that_cannot_be_added(tmp_path):
    directory = byte_level(tmp_path / "base")
    message = r"train.new_tokens has '</s>', which is a token already, id 2; leave it out"
    with pytest.raises(UserError, match=message):
        training(directory, ["</s>", "<|tool|>"])
    with pytest.raises(UserError, match="has '▁Hello', which is a token already, id 22557"):
        training(bare(tmp_path / "sentencepiece"), ["▁Hello"])
    assert training(directory, ["<|im_start|>x"])[0].new_tokens == ("<|im_start|>x",)
    tekken = write(tmp_path / "tekken")
    (tekken / "tekken.json").write_bytes(TEKKEN.read_bytes())
    with pytest.raises(UserError, match="tekken.json: has a fixed number of ids and takes no new tokens; copy"):
        training(tekken)
    for tokens in ('["a", "a"]', '[" "]', '["a\\nb"]'):
        with pytest.raises(UserError, match="train.new_tokens is .*; expected printable texts, each once"):
            parse_config(config_parser("t", ""), ["--model.path=m", "--data.train=r", f"--train.new_tokens={tokens}"])
