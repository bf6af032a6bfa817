"""Tokenizers that llama.cpp has not, in GGUF files."""

import io
from typing import Any

import pytest
import sentencepiece

from minorca.export.gguf import export_gguf

pytestmark = pytest.mark.usefixtures("own_cache")
# with words of the sample that is compared
SENTENCE = "the quick brown fox jumps over two spaces, def and return, while unhappy animals unwillingly rethink"
MISTRALS: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}


DIFFERING = {"Mistral's": {}, "kind": {"model_type": "unigram"}, "normalizer": {"normalization_rule_name": "nmt_nfkc"}}


@pytest.mark.parametrize("differing", DIFFERING.values(), ids=DIFFERING)
def test_what_llama_cpp_encodes_otherwise_is_said(differing, save_mistral, tmp_path, caplog):
    """Of SentencePiece it has byte-pair encoding alone, and no normalizer."""
    content = io.BytesIO()
    sizes = {"vocab_size": 320, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    lines = iter([SENTENCE] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=content, **sizes, **MISTRALS | differing
    )
    directory, _ = save_mistral(vocab_size=320)
    (directory / "tokenizer.model").write_bytes(content.getvalue())
    export_gguf(directory, None, tmp_path / "out")
    assert ("llama.cpp gives other ids to some texts" in caplog.text) == bool(differing)
