"""Streamed text against the whole decode by each tokenizer's library: random bytes, random ids, random stop strings."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer as JsonModel
from tokenizers import decoders, models
from transformers import AutoTokenizer

from minorca import load_tokenizer
from minorca.data.tokenizer import SentencePieceTokenizer
from minorca.generate.text_stream import TextStream
from tests.data.test_tokenizer import V1, V3, byte_level, orca, sentencepiece_directory
from tests.helpers import save_tokenizer

PIECES = ["😀", "日", "é", " ", "  ", "a", "\n", "\ufffd", "hello", " world", "👩‍🚀"]
# Tokenizers whose decoded bytes never depend on bytes after a whole character.
STABLE = ["bytes", "merges", "v1", "v3", "orca"]


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    """{name: (tokenizer, the ids of the 256 bytes)}: byte-level, SentencePiece, tokenizer.json with byte fallback."""
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "bytes").mkdir()
    save_tokenizer(place / "bytes")
    byte_level(place / "merges")
    orca(place / "orca", tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": True})
    AutoTokenizer.from_pretrained(place / "orca").save_pretrained(place / "fallback")
    for name, source in (("v1", V1), ("v3", V3)):
        sentencepiece_directory(place / name, source)
    found = {name: load_tokenizer(place / name) for name in (*STABLE, "fallback")}
    return {name: (tok, byte_ids(tok)) for name, tok in found.items()}


def byte_ids(tok) -> list[int]:
    """By byte. The byte-level alphabet is printable Latin-1, and for the other bytes the characters from U+0100."""
    if isinstance(tok, SentencePieceTokenizer):
        return [tok._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = sorted(set(range(256)) - seen)
    letters = [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
    return [
        tok._parsing.token_to_id(f"<0x{byte:02X}>") or tok._parsing.token_to_id(letter)
        for byte, letter in enumerate(letters)
    ]


def streamed(tok, ids, stop=()):
    stream = TextStream(tok, stop)
    shown = "".join([*map(stream.push, ids), stream.finish()])
    assert stream.text == shown
    return shown, stream.stopped


def draw_ids(draw, tok, one_byte) -> list[int]:
    """Bytes, any ids (control tokens, and ids past the vocabulary), both in turn, or text."""
    kinds = [one_byte, range(tok.vocab_size + 20), [0, 1, 2]]
    kind = draw.randrange(4)
    if kind == 3:
        return tok.encode("".join(draw.choices(PIECES, k=draw.randint(0, 40))))
    return [draw.choice(kinds[kind] if kind < 2 else draw.choice(kinds)) for _ in range(draw.randint(0, 120))]


@pytest.mark.parametrize("name", STABLE)
def test_the_pieces_make_the_whole_decode(name, toks):
    tok, one_byte = toks[name]
    draw = random.Random(name)
    for _ in range(1000):
        ids = draw_ids(draw, tok, one_byte)
        assert streamed(tok, ids) == (tok.decode(ids), False), ids


@pytest.mark.parametrize("name", STABLE)
def test_a_text_that_continues_another_keeps_its_space(name, toks):
    """What a message and its continuation make together is what their ids decode to."""
    tok, _ = toks[name]
    begun = tok.encode("The answer is")
    for ids in (tok.encode("The answer is 4.")[len(begun) :], tok.encode("The answer is<br>")[len(begun) :]):
        stream = TextStream(tok, continues=True)
        text = "".join(map(stream.push, ids)) + stream.finish()
        assert "The answer is" + text == tok.decode(begun + ids)


def test_byte_fallback_of_tokenizer_json(toks):
    """There one invalid byte turns its neighbours to U+FFFD when all is decoded at once, but not in a stream."""
    tok, one_byte = toks["fallback"]
    draw = random.Random(0)
    for _ in range(500):
        ids = tok.encode("".join(draw.choices(PIECES, k=draw.randint(0, 40))))
        assert streamed(tok, ids)[0] == tok.decode(ids)
    smile = [one_byte[byte] for byte in "😀".encode()]
    assert tok.decode(smile * 2 + one_byte[255:]) == "\ufffd" * 9
    assert streamed(tok, smile * 2 + one_byte[255:])[0] == "😀😀\ufffd"


@pytest.mark.parametrize("name", STABLE)
def test_text_ends_before_the_stop_string_that_starts_first(name, toks):
    """Stop strings over few letters, so that they overlap, contain one another and come in parts."""
    tok, one_byte = toks[name]
    draw = random.Random(name)
    found = 0
    within = 0
    for _ in range(1000):
        letters = ["a", "b", "é", "😀", " ", "\ufffd"][: draw.randint(2, 6)]
        stop = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(draw.randint(0, 4))]
        ids = [i for _ in range(draw.randint(0, 30)) for i in tok.encode(draw.choice(letters))]
        ids = [draw.choice(one_byte) if draw.random() < 0.02 else i for i in ids]
        whole = tok.decode(ids)
        starts = [whole.find(string) for string in stop if string in whole]
        assert streamed(tok, ids, stop) == (whole[: min(starts, default=None)], bool(starts)), (ids, stop)
        found += bool(starts)
        within += any(one in other[1:-1] for one in stop for other in stop)
    assert 300 < found < 900 and within > 100


def test_no_more_is_withheld_than_necessary(toks):
    """After each byte: all whole characters, except for the longest suffix that may become a stop string."""
    tok, one_byte = toks["bytes"]
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("abé😀", k=12))
        stop = ["".join(draw.choices("abé😀", k=draw.randint(2, 4))) for _ in range(2)]
        if any(string in text for string in stop):
            continue
        stream = TextStream(tok, stop)
        ids = tok.encode(text)
        for n, token in enumerate(ids):
            stream.push(token)
            whole = text.encode()[: n + 1].decode(errors="ignore")
            ends = (
                len(whole) - k
                for k in range(4)
                if any(whole.endswith(string[:k]) and k < len(string) for string in stop)
            )
            assert stream.text == whole[: min(ends)]


@pytest.mark.parametrize("name", STABLE)
def test_at_most_three_replacement_characters_wait(name, toks):
    """Invalid bytes do not stop the stream."""
    tok, one_byte = toks[name]
    wrong = next(i for i in one_byte if tok.decode([i]) == "\ufffd")
    stream = TextStream(tok)
    for n in range(1, 200):
        stream.push(wrong)
        assert stream.text == "\ufffd" * (n - 3)
    assert stream.finish() == "\ufffd" * 3


def test_nothing_comes_after_a_stop_string(toks):
    tok, _ = toks["v1"]
    stream = TextStream(tok, ["STOP"])
    ids = tok.encode("Go on. ST or STOP, and on")
    assert "".join(map(stream.push, ids)) == stream.text == "Go on. ST or " and stream.stopped
    assert stream.push(ids[0]) == stream.finish() == ""


class Counting:
    """A tokenizer that records the number of ids of each decode."""

    def __init__(self, tok):
        self._tok = tok
        self.lengths = []

    def __getattr__(self, name):
        return getattr(self._tok, name)

    def decode(self, ids):
        self.lengths.append(len(ids))
        return self._tok.decode(ids)


@pytest.mark.parametrize("name", [*STABLE, "fallback"])
@pytest.mark.parametrize("of", ["text", "wrong bytes", "any bytes", "lead bytes", "ids without text"])
def test_few_ids_are_decoded_however_long_the_text(of, name, toks):
    tok, one_byte = toks[name]
    draw = random.Random(0)
    tok = Counting(tok)
    lead = [i for i in one_byte if tok.decode([i, i]) == "\ufffd\ufffd"]
    ids = {
        "text": lambda: tok.encode("".join(draw.choices(PIECES, k=1000))),
        "wrong bytes": lambda: lead[-1:] * 2000,
        "any bytes": lambda: draw.choices(one_byte, k=2000),
        "lead bytes": lambda: draw.choices(lead, k=2000),
        "ids without text": lambda: lead[:1] + [*tok.stop_ids, tok.vocab_size + 5] * 1000,
    }[of]()
    tok.lengths.clear()
    streamed(tok, ids)
    assert max(tok.lengths) <= 40 and sum(tok.lengths) <= 50 * len(ids)


def test_tokens_that_end_within_the_next_character(toks, tmp_path):
    """Merges across characters: no token ends where a character does, and the ids must be cut all the same."""
    first, *others = [toks["bytes"][0]._parsing.id_to_token(i) for i in toks["bytes"][0].encode("日")]
    model = JsonModel(models.BPE({piece: i for i, piece in enumerate(["a", first, "".join(others) + first])}, []))
    model.decoder = decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    tok: Any = Counting(load_tokenizer(tmp_path))
    stream = TextStream(tok)
    for n, token in enumerate([1, *[2] * 500]):
        stream.push(token)
        assert stream.text == "日" * n
    assert stream.finish() == "\ufffd" and max(tok.lengths) <= 40


def test_ids_between_those_of_the_vocabulary(tmp_path):
    """They decode to nothing, and change neither a space at the start nor what is withheld."""
    model = JsonModel(models.BPE({"a": 0, "▁a": 1, "<0xF0>": 2, "b": 50}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.save(str(tmp_path / "tokenizer.json"))
    assert streamed(load_tokenizer(tmp_path), [7, 8, 1, 9, 1, 2, *[7] * 100, 1]) == ("a a\ufffd a", False)
