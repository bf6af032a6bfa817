"""tekken.json alone, compared with mistral-common's own reader."""

import shutil
import sys

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from minorca import UserError, load_tokenizer, render_chat
from tests.data.test_tokenizer import FORGERIES, MISTRAL, TEXTS

FILE = MISTRAL / "tekken_240911.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tekken")
    shutil.copy(FILE, path / "tekken.json")
    return path


def test_ids_are_mistral_commons(directory):
    tok, theirs = load_tokenizer(directory), Tekkenizer.from_file(FILE)
    for text in TEXTS + FORGERIES:
        assert tok.encode(text) == theirs.encode(text, bos=False, eos=False)
        assert tok.encode(text, bos=True, eos=True) == theirs.encode(text, bos=True, eos=True)
        assert tok.decode(tok.encode(text, bos=True, eos=True)) == text
        assert not set(tok.encode(text)) & set(tok.control_ids.values())
    assert (tok.bos_id, tok.eos_id, tok.stop_ids, tok.adds_bos) == (theirs.bos_id, theirs.eos_id, {2}, True)
    assert tok.vocab_size == theirs.n_words
    special = [theirs.get_special_token(token) for token in ("<s>", "[INST]", "[/INST]", "</s>")]
    text = [theirs.encode(text, bos=False, eos=False) for text in ("Hi <b>", " 日本")]
    expected = [*special[:2], *text[0], special[2], *text[1], special[3]]
    assert tok.encode_template("<s>[INST]Hi <b>[/INST] 日本</s>") == expected
    assert tok.decode([tok.vocab_size + 5, *text[0]]) == "Hi <b>"


def test_a_conversation_renders(directory):
    """By the built-in template whose control tokens it has."""
    tok = load_tokenizer(directory)
    ids = render_chat(tok, [{"role": "user", "content": "[INST] Hi"}])
    assert ids == [1, tok.control_ids["[INST]"], *tok.encode("[INST] Hi"), tok.control_ids["[/INST]"]]


def test_without_mistral_common(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.tekken", None)
    with pytest.raises(
        UserError, match="tekken.json: is read by mistral-common.*pip install mistral-common.*tokenizer.json"
    ):
        load_tokenizer(directory)


@pytest.mark.parametrize("content", ["", "{}", '{"config": {"version": "v99"}}', '{"config": {"version": "v3"}}'])
def test_a_file_that_cannot_be_read(content, tmp_path):
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(UserError, match="tekken.json: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
