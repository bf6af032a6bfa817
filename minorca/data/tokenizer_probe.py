"""Whether a tokenizer's file makes much of little text, found in the sandbox's process (sandbox.py), which its limits
may end.

Some files lengthen text: steps that each double it, a replacement of 20,000 characters for one. What a step does is up
to the text, so the length is bounded for all texts. Each character has a weight, so that the sum of a text's weights is
never less than its length after the last step: the steps, from the last to the first, raise the weights of what they
replace to that of what they write. A character's weight before the first step is how many it can become.
"""

import base64
import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal

import sentencepiece
import tokenizers

# Characters that one may become, and ids. NFKC makes 18 of U+FDFA, each of 2 bytes.
MAX_GROWTH = 100
# Of one token: a model may write it again and again, and at each place of a text all are looked for. The longest in use
# have a few hundred.
MAX_TOKEN_CHARACTERS = 2000
# WordPiece's time grows with the square of a word's length; 100 in use.
MAX_WORD_CHARACTERS = 1000
SAMPLE = (
    " The quick, brown fox  jumps: (over) 1,234.50 lazy dogs!\n\tdef f(x): return x**2 # it's 'fine' \"A\"\r\n"
    "- b_c/d\\e@f~ naïve Ünïcode İstanbul e\u0301 ½ ﬁ ﷺ ™ … “a” ‘b’ €\u00a0\u200b\u3000 日本語 中文 한국어 русский "
    "عربى हिन्दी 🦜👩\u200d👩 \x00\x7f\x85\ufeff<s></s>[INST]▁Ġ"
)
# Texts of one word, for which some take a time that grows faster.
LONG = tuple(character * 20_000 for character in "a 日")


def find_problem(kind: str, content: str) -> str:
    """Why the content of a tokenizer.json ("json") or a tokenizer.model ("sentencepiece", in base64) is refused; empty
    if it is not.
    """
    try:
        (_try_json if kind == "json" else _try_sentencepiece)(content)
    except _Refused as error:
        return str(error)
    return ""


class _Refused(Exception):
    """What is wrong with a file that its library can read."""


def _check(what: str, length: float, given: int) -> None:
    if length > MAX_GROWTH * max(1, given):
        raise _Refused(f"{what} more than {MAX_GROWTH} times as long as the text that it reads")


def _check_tokens(tokens: Iterable[str]) -> None:
    if max(map(len, tokens), default=0) > MAX_TOKEN_CHARACTERS:
        raise _Refused(f"it has a token of more than {MAX_TOKEN_CHARACTERS} characters")


def _try_json(content: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_tokens(tokenizer.get_vocab())
    if getattr(tokenizer.model, "max_input_chars_per_word", 0) > MAX_WORD_CHARACTERS:
        raise _Refused(f"its max_input_chars_per_word is over {MAX_WORD_CHARACTERS}")
    weights = _Weights()
    for name, part in (("pre_tokenizer", tokenizer.pre_tokenizer), ("normalizer", tokenizer.normalizer)):
        weights = _before(part, weights)
        _check(f"its {name} can make a text", weights.largest, 1)
    decoded = _before(tokenizer.decoder, _Weights(), _DECODER_STEPS)
    _check("its decoder can make a text", decoded.largest, 1)
    for text in ("", SAMPLE, *LONG):
        _check("its ids are", len(tokenizer.encode(text).ids), len(text))


class _Weights:
    """Of each character: how many characters it can become in the steps that follow.

    Attributes:
        known: of some characters.
        other: of each other one.
    """

    def __init__(self, known: dict[str, float] | None = None, other: float = 1):
        self.known = known or {}
        self.other = other

    def of(self, text: Iterable[str]) -> float:
        return sum(self.known.get(character, self.other) for character in text)

    @property
    def largest(self) -> float:
        return max(self.other, *self.known.values()) if self.known else self.other

    def raised(self, characters: str, needed: float) -> "_Weights":
        """Where a text of these characters, with any others, becomes one of the weight `needed`."""
        share = needed / self.of(characters)
        if share <= 1:
            return self
        return _Weights(self.known | {c: share * self.of(c) for c in characters}, self.other)

    def least(self, needed: float) -> "_Weights":
        """Where any character becomes one of the weight `needed`."""
        return _Weights({c: max(w, needed) for c, w in self.known.items()}, max(self.other, needed))

    def plus(self, text: str) -> "_Weights":
        """Where a text is written beside any character."""
        more = self.of(text)
        return _Weights({c: w + more for c, w in self.known.items()}, self.other + more)

    def mapped(self, images: dict[str, str]) -> "_Weights":
        """Where these characters become texts."""
        return _Weights(self.known | {c: max(self.of(c), self.of(image)) for c, image in images.items()}, self.other)


def _before(part: Any, weights: _Weights, steps: dict[str, Callable] | None = None) -> _Weights:
    """The weights before the steps of a part, of those after it."""
    for step in reversed(list(_steps(json.loads(part.__getstate__()))) if part else []):
        before = (steps or _STEPS).get(step["type"])
        if before is None:
            raise _Refused(f"it has a step of the type {step['type']}, of which it is not known what it does to a text")
        weights = before(step, weights)
        if weights.largest > 1e9:
            break
    return weights


def _steps(part: dict) -> Iterator[dict]:
    """The steps of a part in the order of their work, out of sequences in sequences."""
    parts = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if parts is None:
        yield part
    else:
        for one in parts:
            yield from _steps(one)


def _before_replacement(step: dict, weights: _Weights) -> _Weights:
    written = weights.of(step["content"])
    pattern = step["pattern"]
    if pattern.get("String"):
        return weights.raised(pattern["String"], written)
    required, length = _least_match(pattern.get("Regex", ""))
    if required:
        return weights.raised(required, written)
    return weights.least(written / length) if length else weights.plus(step["content"])


def _least_match(expression: str) -> tuple[str, int]:
    """Characters that every match of an expression has, and its least length; 0 where that is not known.

    Read as one of Python's, which Oniguruma's resemble; what the two may read in different ways is not read.
    """
    if re.search(r"\(\?[^:=!<]|\(\?<[^=!]|\}\?|\}\+|\[\[|\\[^\\sdwSDWnrt.*+?^$|(){}\[\]/-]", expression):
        return "", 0
    try:
        with warnings.catch_warnings(action="error"):
            parsed = re._parser.parse(expression)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError, Warning):
        return "", 0
    required = "".join(chr(value) for kind, value in parsed if kind is re._constants.LITERAL)  # type: ignore[attr-defined]
    return required, parsed.getwidth()[0]


def _before_bytes(step: dict, weights: _Weights) -> _Weights:
    """Of byte level: a character for each byte in UTF-8."""
    letters = _byte_letters()
    beyond = max(map(weights.of, letters[128:]))
    # Of others, the most that any can have: 4 bytes.
    exact = {*map(chr, range(0x250)), *weights.known, *"".join(_images("NFKD").values())}
    images = {c: "".join(letters[byte] for byte in c.encode(errors="replace")) for c in exact}
    new = weights.mapped(images)
    new = _Weights(new.known, max(new.other, 4 * beyond))
    return new.plus(" ") if step.get("add_prefix_space") else new


@cache
def _byte_letters() -> list[str]:
    """The character that stands for each byte (GPT-2, encoder.py)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


@cache
def _images(change: Literal["lower", "NFD", "NFKD"]) -> dict[str, str]:
    """What becomes of each character that a change of all texts changes."""

    def changed(character: str) -> str:
        return character.lower() if change == "lower" else unicodedata.normalize(change, character)

    # Of those above, none is changed.
    return {c: image for c in map(chr, range(0x30000)) if (image := changed(c)) != c}


def _before_composition(weights: _Weights, change: Literal["NFD", "NFKD"]) -> _Weights:
    for composed, parts in _images("NFD").items():
        weights = weights.raised(parts, weights.of(composed))
    return weights.mapped(_images(change))


def _before_bert(step: dict, weights: _Weights) -> _Weights:
    if step["lowercase"]:
        weights = weights.mapped(_images("lower"))
    if step["strip_accents"] or (step["strip_accents"] is None and step["lowercase"]):
        weights = weights.mapped(_images("NFD"))
    if step["handle_chinese_chars"]:
        weights = weights.plus("  ")
    return weights.least(weights.of(" ")) if step["clean_text"] else weights


def _before_table(step: dict, weights: _Weights) -> _Weights:
    """Of SentencePiece's: what it writes for any character."""
    written = _written_by_table(base64.b64decode(step["precompiled_charsmap"] or ""))
    return weights.least(max(map(weights.of, written)))


def _before_metaspace(step: dict, weights: _Weights) -> _Weights:
    if step["prepend_scheme"] != "never":
        weights = weights.plus(step["replacement"])
    return weights.raised(" ", weights.of(step["replacement"]))


def _before_cleanup(step: dict, weights: _Weights) -> _Weights:
    """Of WordPiece and CTC, which also write a space for the end of a word."""
    if step["cleanup"]:
        weights = weights.raised(" do not", weights.of(" don't"))
    return weights.raised(step.get("word_delimiter_token") or " ", weights.of(" ")).plus(" ")


_STEPS: dict[str, Callable[[dict, _Weights], _Weights]] = {
    "Replace": _before_replacement,
    "Prepend": lambda step, weights: weights.plus(step["prepend"]),
    "ByteLevel": _before_bytes,
    "Lowercase": lambda step, weights: weights.mapped(_images("lower")),
    "NFD": lambda step, weights: weights.mapped(_images("NFD")),
    "NFKD": lambda step, weights: weights.mapped(_images("NFKD")),
    "NFC": lambda step, weights: _before_composition(weights, "NFD"),
    "NFKC": lambda step, weights: _before_composition(weights, "NFKD"),
    "Nmt": lambda step, weights: weights.least(weights.of(" ")),
    "BertNormalizer": _before_bert,
    "Precompiled": _before_table,
    "Metaspace": _before_metaspace,
    "WordPiece": _before_cleanup,
    "CTC": _before_cleanup,
    "BPEDecoder": lambda step, weights: weights.raised(step["suffix"] or " ", weights.of(" ")),
} | dict.fromkeys(
    (
        *("Strip", "StripAccents", "Fuse", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Split"),
        *("CharDelimiterSplit", "BertPreTokenizer", "UnicodeScripts", "FixedLength"),
    ),
    lambda step, weights: weights,
)
# Some do something else in a decoder.
_DECODER_STEPS = _STEPS | {
    # Bytes become any character, and a replacement character where they are not UTF-8; <0x41> becomes A.
    "ByteLevel": lambda step, weights: weights.least(weights.largest),
    "ByteFallback": lambda step, weights: weights.raised("<0x", weights.largest),
    "Metaspace": lambda step, weights: weights.raised(step["replacement"], weights.of(" ")),
}


def _written_by_table(charsmap: bytes) -> list[str]:
    """What SentencePiece's table writes: it follows a trie, whose size comes first, each text with a zero behind."""
    blob = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return [text.decode(errors="replace") for text in blob.split(b"\0")]


def _try_sentencepiece(content: str) -> None:
    data = base64.b64decode(content)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    # normalizer_spec and denormalizer_spec, and precompiled_charsmap of each; source: sentencepiece_model.proto
    for number in (3, 5):
        for specification in _fields(data, number):
            for charsmap in _fields(specification, 2):
                _check("a replacement of its normalizer is", max(map(len, _written_by_table(charsmap))), 1)
    _check_tokens(map(model.id_to_piece, range(model.vocab_size())))
    for text in (SAMPLE, *LONG):
        _check("its ids are", len(model.encode(text)), len(text))


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The values of one field of bytes in a message of protocol buffers, which the library has read before."""
    at = 0

    def read_number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        tag = read_number()
        kind = tag & 7
        if kind == 0:
            read_number()
        elif kind == 2:
            size = read_number()
            if tag >> 3 == number:
                yield message[at : at + size]
            at += size
        else:
            # Numbers of a fixed size; a group's start and end have none, its fields are as the others.
            at += {1: 8, 5: 4}.get(kind, 0)
