"""Text to token ids and back, from the files that a model ships.

Two formats: `tokenizer.json` (Hugging Face's tokenizers library) and SentencePiece's `tokenizer.model` (Mistral's own).
Text that people wrote is never read as control tokens: "<|im_end|>" typed by a user is a handful of ordinary tokens.
Only text that a chat template wrote goes through `encode_template`, where control strings become their ids, and text
that its author rendered for the model through `encode_rendered`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json, read_small
from minorca.model.architecture import model_directory

# Limits for untrusted files, each several times the largest in use: Gemma's tokenizer.json has 33 million bytes and its
# tokenizer.model 4 million; a chat template 20 thousand characters; all control strings, which are compiled into one
# regular expression, 100 thousand.
MAX_TOKENIZER_BYTES = 100 * 10**6
MAX_TEMPLATE_CHARACTERS = 10**6
MAX_CONTROL_CHARACTERS = 10**6
# By which factor the normalizer or decoder of a tokenizer.json may lengthen a text; Llama's and Mistral's come to 4.
MAX_GROWTH = 1000

# A surrogate code point: in a Python string always half of a pair. JSON can spell it, UTF-8 cannot encode it.
SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A model's tokenizer. `load_tokenizer` creates it; each subclass wraps one library.

    Attributes:
        path: the model's directory, for messages.
        file: the tokenizer's file in it.
        bos_id, eos_id: the ids that start and end a sequence, or None.
        adds_bos: whether a sequence of this model starts with `bos_id`.
        stop_ids: every id that ends a generation.
        vocab_size: the highest id + 1.
        control_ids: control strings and their ids.
        chat_template: the source of the Jinja template that the model ships, or None.
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
        self.path = file.parent
        self.file = file
        self.control_ids = control_ids
        self.vocab_size = vocab_size
        configs = [_read_json(self.path / name) for name in ("generation_config.json", "config.json")]
        config_bos = [i for config in configs for i in _ids(config.get("bos_token_id"))]
        config_eos = [i for config in configs for i in _ids(config.get("eos_token_id"))]
        if bos_id is None:
            bos_id = next(iter(config_bos), None)
        if eos_id is None:
            eos_id = next(iter(config_eos), None)
        self.bos_id = self._special_id(settings, "bos_token", bos_id)
        self.eos_id = self._special_id(settings, "eos_token", eos_id)
        adds_bos = settings.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (self._format_adds_bos() if adds_bos is None else bool(adds_bos))
        # The files disagree (SlimOrca's config.json still says 2 where its tokenizer says 32000): any of them stops.
        self.stop_ids = {i for i in (self.eos_id, *config_eos, control_ids.get("<|im_end|>")) if i is not None}
        self.chat_template = _chat_template(self.path, settings)
        if sum(map(len, control_ids)) > MAX_CONTROL_CHARACTERS:
            raise UserError(f"its control tokens have more than {MAX_CONTROL_CHARACTERS} characters", path=file)
        for key, i in (("bos_token_id", self.bos_id), ("eos_token_id", self.eos_id)):
            if i is not None and not 0 <= i < vocab_size:
                raise UserError(
                    f"is {quote(i)}; expected an id of the tokenizer, below {vocab_size}", path=self.path, field=key
                )
        longest_first = sorted(control_ids, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def _special_id(self, settings: dict, key: str, default: int | None) -> int | None:
        """The id of the token that the settings name; `default` if they name none."""
        token = _content(settings.get(key))
        if token is not None and token not in self.control_ids:
            raise UserError(
                f"is {quote(token)} in tokenizer_config.json or special_tokens_map.json, which is not in the "
                f"vocabulary; fix the name, or add the token to added_tokens.json",
                path=self.path,
                field=key,
            )
        return default if token is None else self.control_ids[token]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, all of it ordinary text; `bos` and `eos` add those ids where the tokenizer has them.

        Raises:
            UserError: an unpaired surrogate in `text`, which JSON can spell and no tokenizer can read.
        """
        self._check_unicode(text)
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return front + self._encode_text(text) + ([self.eos_id] if eos and self.eos_id is not None else [])

    def encode_rendered(self, text: str, parse_control: bool = True, eos: bool = False) -> list[int]:
        """The ids of a whole sequence that its author rendered, such as `<s>[INST] q [/INST] a </s>`.

        A bos is put in front where the tokenizer adds one, and with `eos` one is appended, each unless the text has it.

        Args:
            parse_control: whether control strings become control tokens; else all of it is ordinary text.

        Raises:
            UserError: as `encode`.
        """
        if not parse_control:
            return self.encode(text, bos=self.adds_bos, eos=eos)
        self._check_unicode(text)
        ids = self.encode_template(text)
        if self.bos_id is not None and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.eos_id is not None and eos and not (ids and ids[-1] in self.stop_ids):
            ids = [*ids, self.eos_id]
        return ids

    def encode_template(self, text: str) -> list[int]:
        """The ids of text that a chat template wrote: control strings become control tokens, and nothing is added."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without control tokens."""
        raise NotImplementedError

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def _format_adds_bos(self) -> bool:
        """Whether sequences start with bos in this file format, where no setting says so."""
        raise NotImplementedError

    def split_control(self, text: str) -> list[str]:
        """`text` split at its control strings: ordinary text at even indices, control strings at odd ones."""
        return self._control.split(text)

    def replace_control(self, text: str, replace: Callable[[re.Match], str]) -> str:
        """`text` with each control string replaced by `replace(match)`."""
        return self._control.sub(replace, text)

    @staticmethod
    def _check_unicode(text: str) -> None:
        if surrogate := SURROGATE.search(text):
            raise UserError(
                f"has an unpaired surrogate at character {surrogate.start()}, which is not valid Unicode; fix the text",
                field="text",
            )


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, read by the tokenizers library."""

    def __init__(self, file: Path, settings: dict):
        # Two copies: whether control strings are parsed is a property of the object, which threads share.
        with _library_errors(file):
            self._parsing = self._read(file, settings)
            self._text_only = self._read(file, settings)
            self._text_only.encode_special_tokens = True
            added = self._parsing.get_added_tokens_decoder()
            control_ids = {token.content: i for i, token in added.items() if token.special}
            highest = max(self._parsing.get_vocab().values(), default=-1)
        super().__init__(file, settings, control_ids, highest + 1)

    @staticmethod
    def _read(file: Path, settings: dict) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(_read_text(file, MAX_TOKENIZER_BYTES))
        for part in filter(None, (tokenizer.normalizer, tokenizer.decoder)):
            if _max_growth(json.loads(part.__getstate__())) > MAX_GROWTH:
                raise UserError(
                    f"its replacements, one after another, could make a text more than {MAX_GROWTH} times as long",
                    path=file,
                )
        # Both are saved in the file by whoever used it last.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # transformers saves what it took from added_tokens.json as not special, <|im_start|> among it, and text could
        # forge a token that is not special.
        added = tokenizer.get_added_tokens_decoder()
        names = (_content(settings.get("bos_token")), _content(settings.get("eos_token")), "<|im_start|>", "<|im_end|>")
        for name in filter(None, names):
            if (i := tokenizer.token_to_id(name)) is not None:
                tokenizer.add_special_tokens([added.get(i, tokenizers.AddedToken(name, normalized=False))])
        return tokenizer

    def _encode_text(self, text: str) -> list[int]:
        with _library_errors(self.file):
            return self._text_only.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        with _library_errors(self.file):
            return self._parsing.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _library_errors(self.file):
            return self._parsing.decode(ids, skip_special_tokens=True)

    def _format_adds_bos(self) -> bool:
        with _library_errors(self.file):
            # The post-processor adds it.
            return self._parsing.encode("").ids[:1] == [self.bos_id]


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's `tokenizer.model`, with `added_tokens.json` beside it (Mistral-7B-OpenOrca's ChatML tokens)."""

    def __init__(self, file: Path, settings: dict):
        with _library_errors(file):
            model = sentencepiece.SentencePieceProcessor(model_proto=read_small(file, MAX_TOKENIZER_BYTES))
            size = model.vocab_size()
            if size == 0:
                # The library reads an empty file as a model without pieces.
                raise RuntimeError("no pieces")
            control_ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
            for name in filter(None, (_content(settings.get("bos_token")), _content(settings.get("eos_token")))):
                # A user-defined piece may serve as bos or eos.
                if (i := model.piece_to_id(name)) != model.unk_id():
                    control_ids[name] = i
            for source, token, i in _added_tokens(file.parent, settings):
                # A control piece may be renamed (v2 and v3 reserve hundreds), an ordinary piece stands for its text.
                if i < size and model.id_to_piece(i) != token and not model.is_control(i):
                    raise UserError(
                        f"{quote(token)} has id {i}, which is {model.id_to_piece(i)!r} in {file.name}; "
                        f"give added tokens ids from {size} on",
                        path=source,
                    )
                control_ids[token] = i
        self._model = model
        self._not_decoded = set(control_ids.values())
        # SentencePiece gives -1 where the model has no such piece.
        bos_id, eos_id = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        super().__init__(file, settings, control_ids, max([size - 1, *self._not_decoded]) + 1, bos_id, eos_id)

    def _encode_text(self, text: str) -> list[int]:
        with _library_errors(self.file):
            return self._model.encode(text)

    def encode_template(self, text: str) -> list[int]:
        pieces = enumerate(self.split_control(text))
        return [i for n, piece in pieces for i in ([self.control_ids[piece]] if n % 2 else self._encode_text(piece))]

    def decode(self, ids: list[int]) -> str:
        # Ids beyond the vocabulary are rows that pad the embedding, which an untrained model may well choose.
        with _library_errors(self.file):
            return self._model.decode([i for i in ids if i not in self._not_decoded and i < self._model.vocab_size()])

    def _format_adds_bos(self) -> bool:
        # Every Llama and Mistral model was trained that way.
        return True


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of model directory `path`.

    `tokenizer.json` takes precedence where both formats exist: it contains the added tokens too, and it is what
    transformers and its servers read, so the ids are the same as theirs.

    Raises:
        UserError: no tokenizer file, one that cannot be read, or settings beside it that contradict it.
    """
    directory = model_directory(path)
    versions = sorted((file.name for file in directory.glob("tokenizer.model.v*")), reverse=True)
    candidates = (find_file(directory, name) for name in ("tokenizer.json", "tokenizer.model", *versions))
    file = next(filter(None, candidates), None)
    if file is None:
        raise UserError(
            "no tokenizer found; expected tokenizer.json, tokenizer.model or tokenizer.model.v*: "
            "copy it from where the weights came from",
            path=directory,
        )
    settings = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    for key in ("bos_token", "eos_token"):
        token = _content(settings.get(key))
        if not isinstance(token, str | None) or SURROGATE.search(token or ""):
            raise UserError(
                f"is {quote(settings[key])} in tokenizer_config.json or special_tokens_map.json; "
                f"expected text, or an object with content",
                path=directory,
                field=key,
            )
    if file.suffix == ".json":
        return JsonTokenizer(file, settings)
    return SentencePieceTokenizer(file, settings)


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: str | Path) -> None:
    """Checks that an embedding of `rows` rows has one for every id of the tokenizer; more rows are padding.

    Raises:
        UserError: the tokenizer has more ids.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {rows}; "
            f"use the tokenizer that belongs to these weights",
            path=path,
        )


def _added_tokens(directory: Path, settings: dict) -> list[tuple[Path, str, int]]:
    """(file, token, id) of added_tokens.json and of its successor, `added_tokens_decoder` in tokenizer_config.json."""
    old = directory / "added_tokens.json"
    new = directory / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(
            f"is {quote(decoder)}; expected an object from ids to tokens", path=new, field="added_tokens_decoder"
        )
    entries = [(old, token, i) for token, i in _read_json(old).items()]
    entries += [(new, _content(token), int(i) if i.isdecimal() and len(i) < 10 else i) for i, token in decoder.items()]
    for source, token, i in entries:
        valid_token = isinstance(token, str) and token and not SURROGATE.search(token)
        if not (valid_token and type(i) is int and 0 <= i < 10**9):
            raise UserError(
                f"expected tokens and their ids (integers from 0), got {quote(token)} and {quote(i)}; fix the entry",
                path=source,
            )
    return entries


def _chat_template(directory: Path, settings: dict) -> str | None:
    if file := find_file(directory, "chat_template.jinja"):
        return _read_text(file, MAX_TEMPLATE_CHARACTERS)
    template = settings.get("chat_template")
    if isinstance(template, list):
        # several templates, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if not isinstance(template, str | None):
        raise UserError(
            f'is {type(template).__name__}; expected text or a list of {{"name", "template"}}',
            path=directory / "tokenizer_config.json",
            field="chat_template",
        )
    if template is not None and len(template) > MAX_TEMPLATE_CHARACTERS:
        raise UserError(
            f"has {len(template)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}",
            path=directory / "tokenizer_config.json",
            field="chat_template",
        )
    return template


def _max_growth(part: Any) -> int:
    """An upper bound of the factor by which a normalizer or decoder lengthens a text.

    Factors multiply: forty replacements that each write two characters for one come to 10^12.
    """
    if isinstance(part, list):
        return math.prod(map(_max_growth, part))
    if not isinstance(part, dict):
        return 1
    written = sum(len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str))
    return (1 + written) * math.prod(map(_max_growth, part.values()))


def _content(token: Any) -> str | None:
    """A token's string, which the settings give as text or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any) -> list[int]:
    """The token ids in a configuration's value: None, an id, or a list of ids."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _read_text(file: Path, max_bytes: int) -> str:
    try:
        return read_small(file, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise _corrupt(file, error) from error


def _read_json(file: Path) -> dict:
    """The object in a JSON file; an empty one if the file does not exist, since every settings file is optional."""
    return read_json(file) if find_file(file.parent, file.name) else {}


@contextmanager
def _library_errors(file: Path) -> Iterator[None]:
    """Turns whatever a tokenizer library raises into a UserError about its file.

    Some faults of a file show only when text is encoded, and some as a panic in Rust, which does not derive from
    Exception.
    """
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
        f"cannot be read as a tokenizer ({reason}); download it again (a file of a few hundred bytes is a Git LFS "
        f"pointer, not the tokenizer)",
        path=file,
    )
