"""Text to token ids and back, from the files that a model ships.

Two formats: `tokenizer.json` (Hugging Face's tokenizers library) and SentencePiece's `tokenizer.model` (Mistral's own).
Text that people wrote is never read as control tokens: "<|im_end|>" typed by a user is a handful of ordinary tokens.
Only text that a chat template wrote goes through `encode_template`, where control strings become their ids.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json, read_small
from minorca.model.architecture import model_directory

# What is read of a stranger's files, each several times the largest in use: Gemma's tokenizer.json has 33 million bytes and
# its tokenizer.model 4; a chat template 20 thousand; control strings, that all go into one regular expression, 100 thousand.
TOKENIZER_BYTES, TEMPLATE_LENGTH, CONTROL_LENGTH = 100 * 10**6, 10**6, 10**6
GROWTH = 1000  # of a text in tokenizer.json's normalizer or decoder; Llama's and Mistral's come to 4

HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


class Tokenizer:
    """One model's tokenizer; `load_tokenizer` makes it, a subclass below speaks to each library.

    path: the model's directory, for messages           chat_template: the Jinja source that the model ships, or None
    bos_id, eos_id: int, or None where there is none     adds_bos: whether a sequence of this model starts with bos_id
    stop_ids: every id that ends a generation            vocab_size: the highest id + 1
    control_ids: control strings and their ids           auto_template: what `chat.resolve_template` found, kept here
    """

    def __init__(
        self,
        file: Path,
        settings: dict,
        control_ids: dict[str, int],
        vocab_size: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ):
        self.path, self.file, self.control_ids, self.vocab_size = file.parent, file, control_ids, vocab_size
        configs = [_read_json(self.path / name) for name in ("generation_config.json", "config.json")]
        config_bos, config_eos = (
            [i for config in configs for i in _ids(config.get(key))] for key in ("bos_token_id", "eos_token_id")
        )
        self.bos_id = self._named(settings, "bos_token", next(iter(config_bos), None) if bos_id is None else bos_id)
        self.eos_id = self._named(settings, "eos_token", next(iter(config_eos), None) if eos_id is None else eos_id)
        told = settings.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (self._adds_bos() if told is None else bool(told))
        # The files disagree (SlimOrca's config.json still says 2 where its tokenizer says 32000): any of them stops.
        self.stop_ids = {self.eos_id, *config_eos, control_ids.get("<|im_end|>")} - {None}
        self.chat_template = _chat_template(self.path, settings)
        self.auto_template: str | None = None
        if sum(map(len, control_ids)) > CONTROL_LENGTH:
            raise UserError(f"more than {CONTROL_LENGTH} characters in control tokens' names", path=file)
        for name, i in (("bos", self.bos_id), ("eos", self.eos_id)):
            if i is not None and not 0 <= i < vocab_size:
                raise UserError(
                    f"{name}_token_id is {quote(i)}; expected an id of the tokenizer, below {vocab_size}",
                    path=self.path,
                )
        longest_first = sorted(control_ids, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def _named(self, settings: dict, key: str, default: int | None) -> int | None:
        token = _content(settings.get(key))
        if token is not None and token not in self.control_ids:
            raise UserError(
                f"{key} is {quote(token)} in tokenizer_config.json or special_tokens_map.json, but "
                f"the vocabulary has no such token; mend the name, or add the token to added_tokens.json",
                path=self.path,
            )
        return default if token is None else self.control_ids[token]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, all of it ordinary text; `bos` and `eos` add those ids where the tokenizer has them.

        Raises UserError: half of a surrogate pair in `text`, which JSON can spell and no tokenizer can read.
        """
        if half := HALF.search(text):
            raise UserError(f"text: character {half.start()} is half of a surrogate pair, no character; mend the text")
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return front + self._plain(text) + ([self.eos_id] if eos and self.eos_id is not None else [])

    def encode_template(self, text: str) -> list[int]:
        """Ids of text that a chat template rendered: control strings become control tokens, and nothing is added."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens left out."""
        raise NotImplementedError

    def _plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def _adds_bos(self) -> bool:
        """The format's own habit, where no settings tell."""
        raise NotImplementedError

    def split_control(self, text: str) -> list[str]:
        """`text` cut at its control strings: ordinary text at even places, control strings at odd ones."""
        return self._control.split(text)

    def hide_control(self, text: str, replace) -> str:
        """`text` with `replace(match)` in the place of each control string."""
        return self._control.sub(replace, text)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by the tokenizers library."""

    def __init__(self, file: Path, settings: dict):
        # Two copies: whether control strings are parsed is a switch on the object, and threads share it.
        with _refused(file):
            self._parsing, self._blind = self._read(file, settings), self._read(file, settings)
            self._blind.encode_special_tokens = True
            added = self._parsing.get_added_tokens_decoder()
            control_ids = {token.content: i for i, token in added.items() if token.special}
            highest = max(self._parsing.get_vocab().values(), default=-1)
        super().__init__(file, settings, control_ids, highest + 1)

    @staticmethod
    def _read(file: Path, settings: dict) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(_read_text(file, TOKENIZER_BYTES))
        for part in filter(None, (tokenizer.normalizer, tokenizer.decoder)):
            if _growth(json.loads(part.__getstate__())) > GROWTH:
                raise UserError(
                    f"its replacements, one after another, could make a text more than {GROWTH} times as long",
                    path=file,
                )
        tokenizer.no_truncation()  # both are saved in the file by whoever used it last
        tokenizer.no_padding()
        # transformers saves what it took from added_tokens.json as not special, <|im_start|> among it, and text could
        # forge a token that is not special.
        added = tokenizer.get_added_tokens_decoder()
        names = (_content(settings.get("bos_token")), _content(settings.get("eos_token")), "<|im_start|>", "<|im_end|>")
        for name in filter(None, names):
            if (i := tokenizer.token_to_id(name)) is not None:
                tokenizer.add_special_tokens([added.get(i, tokenizers.AddedToken(name, normalized=False))])
        return tokenizer

    def _plain(self, text: str) -> list[int]:
        with _refused(self.file):
            return self._blind.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        with _refused(self.file):
            return self._parsing.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _refused(self.file):
            return self._parsing.decode(ids, skip_special_tokens=True)

    def _adds_bos(self) -> bool:
        with _refused(self.file):
            return self._parsing.encode("").ids[:1] == [self.bos_id]  # its post-processor's doing


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's `tokenizer.model`, with `added_tokens.json` beside it (Mistral-7B-OpenOrca's ChatML tokens)."""

    def __init__(self, file: Path, settings: dict):
        with _refused(file):
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=read_small(file, TOKENIZER_BYTES))
            if (size := model.vocab_size()) == 0:  # what the library makes of an empty file
                raise RuntimeError("no pieces")
            control_ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
            for name in filter(None, (_content(settings.get("bos_token")), _content(settings.get("eos_token")))):
                if (i := model.piece_to_id(name)) != model.unk_id():  # a user-defined piece may serve as one
                    control_ids[name] = i
            for source, token, i in _added_tokens(file.parent, settings):
                # A control piece may be renamed (v2 and v3 keep hundreds in reserve); an ordinary one is a word of its own.
                if i < size and model.id_to_piece(i) != token and not model.is_control(i):
                    raise UserError(
                        f"{quote(token)} has id {i}, which is {model.id_to_piece(i)!r} in {file.name}; "
                        f"give added tokens ids from {size} on",
                        path=source,
                    )
                control_ids[token] = i
        self._silent = set(control_ids.values())
        bos_id, eos_id = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        super().__init__(file, settings, control_ids, max([size - 1, *self._silent]) + 1, bos_id, eos_id)

    def _plain(self, text: str) -> list[int]:
        with _refused(self.file):
            return self._model.encode(text)

    def encode_template(self, text: str) -> list[int]:
        pieces = enumerate(self.split_control(text))
        return [i for n, piece in pieces for i in ([self.control_ids[piece]] if n % 2 else self._plain(piece))]

    def decode(self, ids: list[int]) -> str:
        # Ids past the model are rows that pad the embedding: an untrained model may well choose one.
        with _refused(self.file):
            return self._model.decode([i for i in ids if i not in self._silent and i < self._model.vocab_size()])

    def _adds_bos(self) -> bool:
        return True  # as every Llama and Mistral model was trained


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in model directory `path`.

    `tokenizer.json` wins where both formats are there: it holds the added tokens too, and it is what transformers and
    its servers read, so our ids are theirs.

    Raises UserError: no tokenizer file, one that cannot be read, or settings beside it that contradict it.
    """
    directory = model_directory(path)
    versions = sorted((file.name for file in directory.glob("tokenizer.model.v*")), reverse=True)
    file = next(
        filter(None, (find_file(directory, name) for name in ("tokenizer.json", "tokenizer.model", *versions))), None
    )
    if file is None:
        raise UserError(
            "no tokenizer here; expected tokenizer.json, tokenizer.model or "
            "tokenizer.model.v*: copy it from where the weights came from",
            path=directory,
        )
    settings = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    for key in ("bos_token", "eos_token"):
        token = _content(settings.get(key))
        if not isinstance(token, str | None) or HALF.search(token or ""):
            raise UserError(
                f"{key} is {quote(settings[key])} in tokenizer_config.json or special_tokens_map.json; "
                f"expected text, or an object with content",
                path=directory,
            )
    return (JsonTokenizer if file.suffix == ".json" else SentencePieceTokenizer)(file, settings)


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: str | Path) -> None:
    """UserError where `tokenizer` has ids that an embedding of `rows` rows lacks. Spare rows are fine: padding."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {rows}; "
            f"use the tokenizer that belongs to these weights",
            path=path,
        )


def _added_tokens(directory: Path, settings: dict) -> list[tuple[Path, str, int]]:
    """(file, token, id) of added_tokens.json and of its successor, `added_tokens_decoder` in tokenizer_config.json."""
    old, new = directory / "added_tokens.json", directory / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"added_tokens_decoder is {quote(decoder)}; expected an object from ids to tokens", path=new)
    entries = [(old, token, i) for token, i in _read_json(old).items()]
    entries += [(new, _content(token), int(i) if i.isdecimal() and len(i) < 10 else i) for i, token in decoder.items()]
    for source, token, i in entries:
        if not (isinstance(token, str) and token and not HALF.search(token) and type(i) is int and 0 <= i < 10**9):
            raise UserError(
                f"expected tokens and their ids (whole numbers from 0), found {quote(token)} and "
                f"{quote(i)}; mend the entry",
                path=source,
            )
    return entries


def _chat_template(directory: Path, settings: dict) -> str | None:
    if file := find_file(directory, "chat_template.jinja"):
        return _read_text(file, TEMPLATE_LENGTH)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if not isinstance(template, str | None):
        raise UserError(
            f"chat_template: expected text or a list of "
            f'{{"name", "template"}}, found {type(template).__name__}; mend it',
            path=directory / "tokenizer_config.json",
        )
    if template is not None and len(template) > TEMPLATE_LENGTH:
        raise UserError(
            f"chat_template has {len(template)} characters; expected at most {TEMPLATE_LENGTH}",
            path=directory / "tokenizer_config.json",
        )
    return template


def _growth(part: Any) -> int:
    """At most how many times longer a normalizer or decoder makes a text; forty that write two characters for one make 10^12."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    written = sum(len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str))
    return (1 + written) * math.prod(map(_growth, part.values()))


def _content(token: Any) -> str | None:
    """A token's string: the settings give it bare, or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any) -> list[int]:
    """Token ids in a configuration: absent, one, or a list."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _read_text(file: Path, most: int) -> str:
    try:
        return read_small(file, most).decode()
    except UnicodeDecodeError as error:
        raise _corrupt(file, error) from error


def _read_json(file: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file, for every settings file is optional."""
    return read_json(file) if find_file(file.parent, file.name) else {}


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Whatever a library raises in it is the file's fault. Some faults show only once text is encoded, some as a panic of Rust,
    which is no Exception."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _corrupt(file, error) from None
        raise


def _corrupt(file: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:500]
    return UserError(
        f"cannot be read as a tokenizer's file ({reason}); fetch it again (a few hundred bytes "
        f"are a Git LFS pointer, not the file)",
        path=file,
    )
