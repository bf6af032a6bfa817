"""A tokenizer as a GGUF file holds it, so that llama.cpp gives the ids that are given here.

The form is that of llama.cpp's converter (conversion/base.py), but for two things. Tokens that are control tokens here
are so there too, whatever the files call them. And SentencePiece's scores, which tokenizer.json lacks, are made of its
merges: the converter gives all pieces one score.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import sentencepiece

from minorca.data.tekken import TekkenTokenizer
from minorca.data.token_bytes import byte_letters, token_bytes
from minorca.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from minorca.data.tokenizer_files import MAX_TOKENIZER_BYTES, library_errors
from minorca.errors import UserError
from minorca.files.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from minorca.files.safe_io import quote, read_small

log = logging.getLogger(__name__)

# the scores of rows without a token, and of tokens that nothing merges into
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0


@dataclass
class Vocabulary:
    """What llama.cpp tokenizes with.

    Attributes:
        tokens, kinds, scores: by id.
        pre: the name of byte-level BPE's pre-tokenizer; None: SentencePiece.
        merges: of byte-level BPE, in place of the scores.
    """

    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    pre: str | None = None
    merges: list[str] = field(default_factory=list)

    def put(self, i: int, token: str, kind: int, score: float = _ADDED_SCORE) -> None:
        # nothing produces an id that the embedding has no row for
        if i < len(self.tokens):
            self.tokens[i], self.kinds[i], self.scores[i] = token, kind, score


def vocabulary_of(tok: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer, for an embedding of `rows` rows.

    Raises:
        UserError: a tokenizer of a kind that llama.cpp does not have.
    """
    vocabulary = Vocabulary([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [_UNUSED_SCORE] * rows)
    if isinstance(tok, SentencePieceTokenizer):
        _put_pieces(tok, vocabulary)
    elif isinstance(tok, JsonTokenizer):
        _put_json(tok, vocabulary)
    else:
        _put_tekken(cast(TekkenTokenizer, tok), vocabulary)
    for token, i in tok.control_ids.items():
        if i < rows and vocabulary.kinds[i] not in (CONTROL, UNKNOWN):
            vocabulary.put(i, token, CONTROL)
        elif i < rows:
            # a control piece may have been renamed
            vocabulary.tokens[i] = token
    return vocabulary


def _put_pieces(tok: SentencePieceTokenizer, vocabulary: Vocabulary) -> None:
    with library_errors(tok.file):
        model = sentencepiece.SentencePieceProcessor(model_proto=cast(bytes, tok.vocabulary()))
        kinds: list[tuple[Callable[[int], bool], int]] = [
            (model.is_unknown, UNKNOWN),
            (model.is_control, CONTROL),
            (model.is_unused, UNUSED),
            (model.is_byte, BYTE),
        ]
        for i in range(model.vocab_size()):
            kind = next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL)
            vocabulary.put(i, model.id_to_piece(i), kind, model.get_score(i))


def _put_json(tok: JsonTokenizer, vocabulary: Vocabulary) -> None:
    values = json.loads(read_small(tok.file, MAX_TOKENIZER_BYTES))
    model = values["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        message = (
            f"is a tokenizer of the kind {quote(model.get('type'))}; llama.cpp reads BPE of Llama and Mistral models"
        )
        raise UserError(message, path=tok.file)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    if model.get("byte_fallback"):
        # SentencePiece merges first what has the best score, tokenizers what comes first in the list
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
    else:
        vocabulary.pre = _pre_tokenizer(tok, values)
        vocabulary.merges = [" ".join(merge) for merge in merges]
    for token, i in model["vocab"].items():
        is_byte = vocabulary.pre is None and len(token) == 6 and token.startswith("<0x")
        kind = UNKNOWN if token == model.get("unk_token") else BYTE if is_byte else NORMAL
        vocabulary.put(i, token, kind, -float(ranks[token]) if token in ranks else _ADDED_SCORE)
    for i, added in tok.added_tokens().items():
        if not added.special:
            vocabulary.put(i, added.content.replace(SPACE, " "), USER_DEFINED)


def _pre_tokenizer(tok: JsonTokenizer, values: dict) -> str:
    """llama.cpp's name of what splits a text before byte-level BPE."""
    splits, ignores_merges = _splits(values.get("pre_tokenizer")), values["model"].get("ignore_merges", False)
    for name, (steps, ignored) in PRE_TOKENIZERS.items():
        if splits == _splits({"pretokenizers": steps}) and (ignored or not ignores_merges):
            if values.get("normalizer"):
                log.warning("%s: llama.cpp leaves out its normalizer, %s", tok.file, quote(values["normalizer"]))
            return name
    raise UserError(
        f"has the pre-tokenizer {quote(values.get('pre_tokenizer'))}, whose name in llama.cpp is not known "
        f"here (known: {', '.join(PRE_TOKENIZERS)}); export with --format hf, and convert that with llama.cpp's "
        "convert_hf_to_gguf.py",
        path=tok.file,
    )


# what decides where a step splits, and what it is where tokenizer.json does not say
_SPLITTING: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": True, "use_regex": True},
    "Digits": {"individual_digits": False},
    "Split": {"pattern": None, "behavior": None, "invert": False},
}


def _splits(part: Any) -> list[tuple]:
    steps = part.get("pretokenizers", [part]) if isinstance(part, dict) else []
    return [
        (step["type"], *(step.get(key, default) for key, default in _SPLITTING.get(step["type"], {}).items()))
        for step in steps
    ]


def _put_tekken(tok: TekkenTokenizer, vocabulary: Vocabulary) -> None:
    """tekken.json has ranks in place of merges, from which they follow: any two tokens that make a third, in the order
    of its rank and theirs (transformers, convert_slow_tokenizer.py).
    """
    letters = {content: letter for letter, content in byte_letters().items()}
    ids = {piece: i for i, piece in enumerate(token_bytes(tok)) if piece}
    names = {piece: "".join(letters[piece[n : n + 1]] for n in range(len(piece))) for piece in ids}
    vocabulary.pre = "tekken"
    for piece, i in ids.items():
        vocabulary.put(i, names[piece], NORMAL, 0.0)
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        vocabulary.merges += [f"{names[left]} {names[right]}" for left, right in pairs]
