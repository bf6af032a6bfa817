"""The bytes that each id of a tokenizer stands for, which a grammar is followed by."""

import json
from functools import lru_cache
from typing import cast

import sentencepiece

from minorca.data.tekken import TekkenTokenizer
from minorca.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from minorca.data.tokenizer_files import MAX_TOKENIZER_BYTES, library_errors
from minorca.errors import UserError
from minorca.files.safe_io import read_small

# What SentencePiece writes for a space.
SPACE = "\u2581"
# The steps of a tokenizer.json's decoder by which the bytes of one token do not depend on its neighbours, except at the
# start of a text.
_DECODERS = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "Sequence"}


@lru_cache(maxsize=8)
def token_bytes(tok: Tokenizer) -> list[bytes]:
    """By id; empty for control tokens, and for ids that stand for nothing.

    Raises:
        UserError: a tokenizer whose tokens have no bytes of their own, such as WordPiece's.
    """
    if isinstance(tok, JsonTokenizer):
        pieces = _json_pieces(tok)
    elif isinstance(tok, SentencePieceTokenizer):
        pieces = _sentencepiece_pieces(tok)
    else:
        pieces = _tekken_pieces(cast(TekkenTokenizer, tok))
    control = {*tok.control_ids.values(), *tok.stop_ids}
    return [b"" if i in control else pieces.get(i, b"") for i in range(tok.vocab_size)]


@lru_cache(maxsize=8)
def drops_first_space(tok: Tokenizer) -> bool:
    """Whether a space at the start of a text is left out when it is decoded, as SentencePiece puts one there."""
    i = next((i for i, piece in enumerate(token_bytes(tok)) if piece[:1] == b" " and piece[1:].isalpha()), None)
    return i is not None and not tok.decode([i]).startswith(" ")


def _json_pieces(tok: JsonTokenizer) -> dict[int, bytes]:
    names, _ = cast(tuple[dict[str, int], set[str]], tok.vocabulary())
    decoder: dict = json.loads(read_small(tok.file, MAX_TOKENIZER_BYTES)).get("decoder") or {"type": None}
    kinds = {step["type"] for step in (decoder, *(decoder.get("decoders") or ()))}
    if not kinds <= _DECODERS or not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise UserError(
            "its tokens have no bytes of their own, which structured answers need; expected byte-level BPE or "
            "SentencePiece's kind",
            path=tok.file,
        )
    added = tok.added_tokens()
    if "ByteLevel" in kinds:
        letters = byte_letters()
        return {
            i: added[i].content.encode()
            if i in added
            else b"".join(letters.get(letter, letter.encode()) for letter in name)
            for name, i in names.items()
        }
    return {i: added[i].content.encode() if i in added else _piece_bytes(name) for name, i in names.items()}


def _sentencepiece_pieces(tok: SentencePieceTokenizer) -> dict[int, bytes]:
    # The content of the file.
    content = cast(bytes, tok.vocabulary())
    with library_errors(tok.file):
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        return {i: _piece_bytes(model.id_to_piece(i)) for i in range(model.vocab_size()) if not model.is_unused(i)}


def _tekken_pieces(tok: TekkenTokenizer) -> dict[int, bytes]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    with library_errors(tok.file):
        model = Tekkenizer.from_file(tok.file)
        return {i: model.id_to_byte_piece(i) for i in range(model.num_special_tokens, model.n_words)}


def _piece_bytes(piece: str) -> bytes:
    """Of a piece of SentencePiece's, of which <0x0A> and the like stand for one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


def byte_letters() -> dict[str, bytes]:
    """The letters by which byte-level BPE writes bytes (GPT-2's encoder.py): printable Latin-1, then those from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + n): bytes([byte]) for n, byte in enumerate(others)}
