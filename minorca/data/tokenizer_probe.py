"""What a tokenizer's file does to text, tried in the sandbox's process (sandbox.py), which its limits may end.

Some files lengthen text: steps that each double it, a replacement of 20,000 characters for one. Every step is applied
to a text of all kinds, and to what it replaces itself; what no text shows, because only a certain one is replaced, is
read off the step: a regular expression's replacement and the longest one in a table of SentencePiece's.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sentencepiece
import tokenizers

# Ids, or characters within a step, of one character. NFKC makes 18 of U+FDFA, each of 2 bytes.
MAX_GROWTH = 100
# Of one token: a model may write it again and again. The longest in use have a few hundred.
MAX_TOKEN_CHARACTERS = 10**4
SAMPLE = (
    " The quick, brown fox  jumps: (over) 1,234.50 lazy dogs!\n\tdef f(x): return x**2 # it's 'fine' \"A\"\r\n"
    "- b_c/d\\e@f~ naïve Ünïcode İstanbul e\u0301 ½ ﬁ ﷺ ™ … “a” ‘b’ €\u00a0\u200b\u3000 日本語 中文 한국어 русский "
    "عربى हिन्दी 🦜👩\u200d👩 \x00\x7f\x85\ufeff<s></s>[INST]▁Ġ"
)
# Texts of one word, for which some take a time that grows faster.
LONG = tuple(character * 20_000 for character in "a 日")
# Matches of such expressions may be empty and still depend on what is around.
CONTEXT = re.compile(r"\(\?[=!<~]|\\[bBAzZGKyY]|(?<!\[)\^|\$")


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


def _check(what: str, length: int, given: int) -> None:
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
    pieces = _try_steps("normalizer", tokenizer.normalizer, lambda step, text: [step.normalize_str(text)])
    _try_steps(
        "pre_tokenizer",
        tokenizer.pre_tokenizer,
        lambda step, text: [piece for piece, _ in step.pre_tokenize_str(text)],
        pieces,
    )
    _try_steps("decoder", tokenizer.decoder, lambda step, text: [step.decode([text])])
    for text in ("", SAMPLE, *LONG):
        _check("its ids are", len(tokenizer.encode(text).ids), len(text))


def _try_steps(
    name: str, part: Any, apply: Callable[[Any, str], list[str]], texts: Iterable[str] = ()
) -> Iterator[str]:
    """Applies the steps of a part one by one; returns the texts after the last."""
    steps = list(_steps(json.loads(part.__getstate__()))) if part else []
    if math.prod(map(_largest_replacement, steps)) > MAX_GROWTH:
        raise _Refused(f"replacements of its {name} can make a text more than {MAX_GROWTH} times as long")
    # What became of each text, and its own length.
    tried = [([text], len(text)) for text in (SAMPLE, *texts)]
    for step in steps:
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and (replaced := pattern.get("String")):
            tried.append(([replaced], len(replaced)))
        read = _one_step(name, step)
        tried = [([new for piece in pieces for new in apply(read, piece)], given) for pieces, given in tried]
        for pieces, given in tried:
            _check(f"a step of its {name} makes a text", sum(map(len, pieces)), given)
    return ("".join(pieces) for pieces, _ in tried)


def _steps(part: dict) -> Iterator[dict]:
    """The steps of a part in the order of their work, out of sequences in sequences."""
    parts = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    if parts is None:
        yield part
    else:
        for one in parts:
            yield from _steps(one)


def _one_step(name: str, step: dict) -> Any:
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    return getattr(tokenizers.Tokenizer.from_str(json.dumps({"model": model, name: step})), name)


def _largest_replacement(step: dict) -> int:
    """How many characters a regular expression, or a table of SentencePiece's, can make of one."""
    if "precompiled_charsmap" in step:
        return _longest_of_table(base64.b64decode(step["precompiled_charsmap"] or ""))
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    written = step.get("content")
    if expression is None or not isinstance(written, str):
        return 1
    return max(1, len(written) + (written != "" and _may_match_nothing(expression)))


def _may_match_nothing(expression: str) -> bool:
    if CONTEXT.search(expression):
        return True
    around = {"type": "Replace", "pattern": {"Regex": f"\ue000(?:{expression})\ue001"}, "content": ""}
    try:
        return not _one_step("normalizer", around).normalize_str("\ue000\ue001")
    except Exception:
        # A comment until its end, say.
        return True


def _longest_of_table(charsmap: bytes) -> int:
    """The length of the longest replacement: they follow a trie, whose size comes first, each with a zero behind."""
    blob = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(len(text.decode(errors="replace")) for text in blob.split(b"\0"))


def _try_sentencepiece(content: str) -> None:
    data = base64.b64decode(content)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    # normalizer_spec and denormalizer_spec, and precompiled_charsmap of each; source: sentencepiece_model.proto
    for number in (3, 5):
        for specification in _fields(data, number):
            for charsmap in _fields(specification, 2):
                _check("a replacement of its normalizer is", _longest_of_table(charsmap), 1)
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
