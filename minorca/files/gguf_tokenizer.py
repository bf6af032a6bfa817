"""The tokenizer that a GGUF file holds, as the files of a model's directory, and the table of pre-tokenizers.

llama.cpp has two kinds for Llama and Mistral models (llama-vocab.cpp): "llama", SentencePiece's pieces and scores, and
"gpt2", byte-level BPE, whose pre-tokenizer has a name.
"""

import json
import re
import struct
from collections.abc import Iterable
from typing import Any, NoReturn

from minorca.errors import UserError
from minorca.files.gguf import GGUF
from minorca.files.safe_io import quote

# kinds of tokens (llama.h, llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# what SentencePiece writes for a space
SPACE = "\u2581"

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(expression: str) -> list[dict]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTES, "use_regex": False}]


# llama.cpp's name: the steps of tokenizer.json's pre_tokenizer, and whether whole words are looked up before merging
PRE_TOKENIZERS: dict[str, tuple[list[dict], bool]] = {
    "gpt-2": ([{**_BYTES, "use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}], False),
    "llama-bpe": (_split(_LLAMA_3), True),
    "tekken": (_split(_TEKKEN), True),
}
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def tokenizer_files(gguf: GGUF) -> dict[str, bytes]:
    """tokenizer.json or tokenizer.model, with the settings and the chat template, by file name.

    Raises:
        UserError: a tokenizer of another kind, or one that contradicts itself.
    """
    vocabulary = _Vocabulary(gguf)
    model = vocabulary.value("model", str)
    if model not in ("llama", "gpt2"):
        raise UserError(
            f"is {quote(model)}; expected llama (SentencePiece) or gpt2 (byte-level BPE), as Llama and Mistral models "
            "have",
            path=gguf.path,
            field="tokenizer.ggml.model",
        )
    config: dict[str, Any] = {f"{name}_token": token for name, token in vocabulary.special_tokens().items()}
    files = {}
    if model == "gpt2":
        pre = vocabulary.pre_tokenizer()
        files["tokenizer.json"] = json.dumps(_byte_level(vocabulary, pre), ensure_ascii=False).encode()
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": PRE_TOKENIZERS[pre][1]}
    else:
        prefixed = vocabulary.value("add_space_prefix", bool, True)
        files["tokenizer.model"] = _sentencepiece(vocabulary, prefixed)
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        config |= {} if prefixed else {"add_prefix_space": False}
    for key in ("add_bos_token", "add_eos_token"):
        if (adds := vocabulary.value(key, bool, None)) is not None:
            config[key] = adds
    files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    return files | _templates(gguf)


class _Vocabulary:
    """The tokenizer's metadata, its types checked."""

    def __init__(self, gguf: GGUF):
        self.gguf = gguf
        self.tokens: list[str] = self.entries("tokens", str)
        self.kinds: list[int] = self.entries("token_type", int, [NORMAL] * len(self.tokens))
        if not self.tokens or len(self.kinds) != len(self.tokens):
            self.refuse("token_type", f"has {len(self.kinds)} entries; tokens has {len(self.tokens)}")
        # llama.cpp calls a token without text so
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        if len(set(self.tokens)) < len(self.tokens):
            self.refuse("tokens", "has a token twice")

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise UserError(f"{problem}; export the file again", path=self.gguf.path, field=f"tokenizer.ggml.{key}")

    def value(self, key: str, kind: type, *default: Any) -> Any:
        value = self.gguf.metadata.get(f"tokenizer.ggml.{key}", *default)
        if not isinstance(value, kind) and value not in default:
            self.refuse(key, f"is {quote(value)}; expected {kind.__name__}")
        return value

    def entries(self, key: str, kind: type, *default: list) -> list:
        values = self.value(key, list, *default)
        if not all(type(value) is kind for value in values):
            self.refuse(key, f"has other entries than {kind.__name__}")
        return values

    def pre_tokenizer(self) -> str:
        named: str = self.value("pre", str, "default")
        pre = _OTHER_NAMES.get(named, named)
        if pre not in PRE_TOKENIZERS:
            self.refuse(
                "pre",
                f"is {quote(pre)}, a pre-tokenizer that is not known here (known: {', '.join(PRE_TOKENIZERS)}); give "
                "the model's own directory, or one with its tokenizer.json",
            )
        return pre

    def special_tokens(self) -> dict[str, str]:
        found = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            i = self.value(f"{key}_token_id", int, None)
            if i is not None:
                if not 0 <= i < len(self.tokens):
                    self.refuse(f"{key}_token_id", f"is {i}; expected an id below {len(self.tokens)}")
                found[name] = self.tokens[i]
        return found


def _byte_level(vocabulary: _Vocabulary, pre: str) -> dict:
    """tokenizer.json. Control tokens are in the vocabulary too: the library would give others new ids."""
    added = [
        {"id": i, "content": token, "special": kind == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds))
        if kind in (CONTROL, USER_DEFINED)
    ]
    merges = [merge.split(" ") for merge in vocabulary.entries("merges", str, [])]
    if any(len(pair) != 2 for pair in merges):
        vocabulary.refuse("merges", "has an entry that is not two tokens with a space between them")
    steps, ignore_merges = PRE_TOKENIZERS[pre]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": model,
    }


def _sentencepiece(vocabulary: _Vocabulary, prefixed: bool) -> bytes:
    """tokenizer.model, a ModelProto of sentencepiece_model.proto in protocol buffers' encoding."""
    scores = vocabulary.entries("scores", float)
    kinds = vocabulary.kinds
    normal = {score for score, kind in zip(scores, kinds) if kind == NORMAL}
    if len(scores) != len(kinds) or len(normal) < 2 <= kinds.count(NORMAL):
        vocabulary.refuse("scores", "does not order the tokens, which converting tokenizer.json may have lost")
    pieces = (
        _field(1, token.replace(" ", SPACE) if kind == USER_DEFINED else token)
        + _field(2, score)
        + _field(3, kind if kind in range(NORMAL, BYTE + 1) else UNUSED)
        for token, score, kind in zip(vocabulary.tokens, scores, kinds)
    )
    special = vocabulary.special_tokens()
    # trainer_spec: model_type BPE, byte_fallback, and the pieces of special tokens
    trainer = _field(3, 2) + _field(35, int(BYTE in kinds)) + _field(4, len(kinds))
    names = {"unk": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
    trainer += b"".join(_field(number, special.get(name, default)) for name, (number, default) in names.items())
    # normalizer_spec: add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    removes = vocabulary.value("remove_extra_whitespaces", bool, False)
    normalizer = _field(1, "identity") + _field(3, int(prefixed)) + _field(4, int(removes)) + _field(5, 1)
    return _repeated(1, pieces) + _field(2, trainer) + _field(3, normalizer)


def _repeated(number: int, messages: Iterable[bytes]) -> bytes:
    return b"".join(_field(number, message) for message in messages)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a message of protocol buffers: its number and the kind of its value, and that."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _templates(gguf: GGUF) -> dict[str, bytes]:
    """The chat templates by the names that files of their own have."""
    files = {}
    for key, template in gguf.metadata.items():
        match = re.fullmatch(r"tokenizer\.chat_template(?:\.(\w{1,50}))?", key)
        if match and isinstance(template, str):
            name = f"additional_chat_templates/{match[1]}.jinja" if match[1] else "chat_template.jinja"
            files[name] = template.encode()
    return files
