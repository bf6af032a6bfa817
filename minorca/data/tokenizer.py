"""Text to token ids and back, from the files that a model ships.

Two formats: `tokenizer.json` (Hugging Face's tokenizers library) and SentencePiece's `tokenizer.model` (Mistral's own).
Text that people wrote is never read as control tokens: "<|im_end|>" typed by a user is a handful of ordinary tokens.
Only text that a chat template wrote goes through `encode_template`, where control strings become their ids, and text
that its author rendered for the model through `encode_rendered`.
"""

import base64
import logging
import os
import re
from collections.abc import Callable
from copy import copy
from pathlib import Path

import sentencepiece
import tokenizers

from minorca.data.tokenizer_files import (
    MAX_TOKENIZER_BYTES,
    SURROGATE,
    added_tokens,
    chat_templates,
    check_tokenizer,
    content,
    embedding_rows,
    library_errors,
    read_settings,
    read_text,
    special_names,
    token_ids,
    tokenizer_names,
)
from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_small
from minorca.model.architecture import model_directory

log = logging.getLogger(__name__)

# One text is encoded at a time. With threads of its own the library would warn of every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A limit for untrusted files, several times what is in use: all control strings, which are compiled into one regular
# expression, have 100 thousand characters.
MAX_CONTROL_CHARACTERS = 10**6
# A private-use character, of which no vocabulary has a piece.
ANCHOR = "\ue000"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class Tokenizer:
    """A model's tokenizer. `load_tokenizer` creates it; each subclass wraps one library.

    Attributes:
        path: the model's directory, for messages.
        file: the tokenizer's file in it.
        bos_id, eos_id: the ids that start and end a sequence, or None.
        adds_bos: whether a sequence of this model starts with `bos_id`.
        stop_ids: every id that ends a generation.
        vocab_size: the highest id + 1.
        longest: the number of characters of the longest token: no text that is longer than so many for each of a number
            of ids has as few ids, unless the tokenizer drops or joins characters of it.
        new_tokens: what a run adds to the model's tokens: control tokens, with the highest ids.
        control_ids: control strings and their ids.
        without_row: the control tokens, by id, of which the model's embedding has no row, and that nothing produces.
        chat_templates: the sources of the Jinja templates that the model ships, by name.
        chat_template: the one named "default", or None.
    """

    def __init__(
        self,
        file: Path,
        settings: dict,
        control_ids: dict[str, int],
        vocab_size: int,
        longest: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
        new_tokens: tuple[str, ...] = (),
    ):
        self.path = file.parent
        self.file = file
        self.control_ids = control_ids
        self.vocab_size = vocab_size
        self.longest = longest
        self.new_tokens = new_tokens
        self._splits_templates = False
        config_bos = token_ids(self.path, "bos_token_id")
        config_eos = token_ids(self.path, "eos_token_id")
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
        self.chat_templates = chat_templates(self.path, settings)
        self.chat_template = self.chat_templates.get("default")
        if sum(map(len, control_ids)) > MAX_CONTROL_CHARACTERS:
            raise UserError(f"its control tokens have more than {MAX_CONTROL_CHARACTERS} characters", path=file)
        for key, i in (("bos_token_id", self.bos_id), ("eos_token_id", self.eos_id)):
            if i is not None and not 0 <= i < vocab_size:
                raise UserError(
                    f"is {quote(i)}; expected an id of the tokenizer, below {vocab_size}", path=self.path, field=key
                )
        longest_first = sorted(control_ids, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.without_row = self.control_beyond(rows) if (rows := embedding_rows(self.path)) else {}

    def _special_id(self, settings: dict, key: str, default: int | None) -> int | None:
        """The id of the token that the settings name; `default` if they name none."""
        token = content(settings.get(key))
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
            UserError: as `encode_template`.
        """
        if not parse_control:
            return self.encode(text, bos=self.adds_bos, eos=eos)
        ids = self.encode_template(text)
        if self.bos_id is not None and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.eos_id is not None and eos and not (ids and ids[-1] in self.stop_ids):
            ids = [*ids, self.eos_id]
        return ids

    def encode_template(self, text: str) -> list[int]:
        """The ids of text that a chat template wrote: control strings become control tokens, and nothing is added.

        Raises:
            UserError: as `encode`; a control token of which the model's embedding has no row.
        """
        self._check_unicode(text)
        ids = self._encode_pieces(text) if self._splits_templates else self._encode_template(text)
        for i in self.without_row.keys() & set(ids):
            raise UserError(
                f"has the token {self.without_row[i]}, id {i}, which is beyond the model's vocab_size; leave it out",
                field="text",
            )
        return ids

    def as_in_llama_cpp(self) -> "Tokenizer":
        """The same, with templates' text encoded as llama.cpp does: what is between control tokens as texts of their
        own.
        """
        tok = copy(self)
        tok._splits_templates = True
        return tok

    def _encode_pieces(self, text: str) -> list[int]:
        pieces = enumerate(self.split_control(text))
        return [i for n, piece in pieces for i in ([self.control_ids[piece]] if n % 2 else self._encode_text(piece))]

    def vocabulary(self) -> object:
        """What decides the ids of text beside the settings; to be compared between tokenizers of one class."""
        return read_small(self.file, MAX_TOKENIZER_BYTES)

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Whether the ids of both are those of the same vocabulary."""
        is_alike = type(self) is type(other) and self.control_ids == other.control_ids
        return is_alike and self.vocabulary() == other.vocabulary()

    def token_id(self, token: str) -> int | None:
        """The id of a token of any kind; None where the vocabulary has no such token."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without control tokens."""
        raise NotImplementedError

    def _encode_text(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_template(self, text: str) -> list[int]:
        raise NotImplementedError

    def _format_adds_bos(self) -> bool:
        """Whether sequences start with bos in this file format, where no setting says so."""
        raise NotImplementedError

    def control_beyond(self, rows: int) -> dict[int, str]:
        """The control tokens, by id, that an embedding of `rows` rows leaves out, and that nothing produces: they start
        or end no text, and no template contains them. Padding tokens are often added like that.
        """
        templates = "".join(self.chat_templates.values())
        produced = (*CHATML_TOKENS, *self.new_tokens)
        used = {self.bos_id, self.eos_id, *self.stop_ids, *map(self.control_ids.get, produced)}
        return {
            i: token for token, i in self.control_ids.items() if i >= rows and i not in used and token not in templates
        }

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

    def __init__(self, file: Path, settings: dict, new_tokens: tuple[str, ...] = ()):
        # Two copies: whether control strings are parsed is a property of the object, which threads share.
        with library_errors(file):
            self._parsing = self._read(file, settings, new_tokens)
            self._text_only = self._read(file, settings, new_tokens)
            self._text_only.encode_special_tokens = True
            if getattr(self._parsing.model, "dropout", None):
                log.warning("%s: its dropout, which gives a text other ids each time, is switched off", file)
                self._parsing.model.dropout = self._text_only.model.dropout = None
            added = self._parsing.get_added_tokens_decoder()
            control_ids = {token.content: i for i, token in added.items() if token.special}
            vocabulary = self._parsing.get_vocab()
        vocab_size, longest = max(vocabulary.values(), default=-1) + 1, max(map(len, vocabulary), default=1)
        super().__init__(file, settings, control_ids, vocab_size, longest, new_tokens=new_tokens)

    @staticmethod
    def _read(file: Path, settings: dict, new_tokens: tuple[str, ...]) -> tokenizers.Tokenizer:
        text = read_text(file, MAX_TOKENIZER_BYTES)
        check_tokenizer(file, "json", text)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        # Both are saved in the file by whoever used it last.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, file, settings)
        first = max(tokenizer.get_vocab().values(), default=-1) + 1
        tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in new_tokens])
        if any(tokenizer.token_to_id(token) != i for i, token in enumerate(new_tokens, first)):
            raise UserError("its ids have gaps, so that new tokens would not come last; number them anew", path=file)
        return tokenizer

    def vocabulary(self) -> object:
        """Not the file's content, which whoever saves it writes in another form."""
        added = self._parsing.get_added_tokens_decoder().values()
        # These are found before the text is split, even those that the vocabulary has anyway.
        return self._parsing.get_vocab(with_added_tokens=True), {token.content for token in added if not token.special}

    def _encode_text(self, text: str) -> list[int]:
        with library_errors(self.file, text):
            return _encode_unlocked(self._text_only, text)

    def _encode_template(self, text: str) -> list[int]:
        with library_errors(self.file, text):
            return _encode_unlocked(self._parsing, text)

    def token_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that are found before the text is split, by id."""
        return self._parsing.get_added_tokens_decoder()

    def decode(self, ids: list[int]) -> str:
        with library_errors(self.file):
            return self._parsing.decode(ids, skip_special_tokens=True)

    def _format_adds_bos(self) -> bool:
        with library_errors(self.file):
            # The post-processor adds it.
            return self._parsing.encode("").ids[:1] == [self.bos_id]


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's `tokenizer.model`, with `added_tokens.json` beside it (Mistral-7B-OpenOrca's ChatML tokens).

    Attributes:
        pieces: the number of ids that the file itself has.
    """

    def __init__(self, file: Path, settings: dict, new_tokens: tuple[str, ...] = ()):
        with library_errors(file):
            content_bytes = read_small(file, MAX_TOKENIZER_BYTES)
            check_tokenizer(file, "sentencepiece", base64.b64encode(content_bytes).decode())
            model = sentencepiece.SentencePieceProcessor(model_proto=content_bytes)
            size = model.vocab_size()
            if size == 0:
                # The library reads an empty file as a model without pieces.
                raise RuntimeError("no pieces")
            control_ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
            for name in filter(None, (content(settings.get("bos_token")), content(settings.get("eos_token")))):
                # A user-defined piece may serve as bos or eos.
                if (i := model.piece_to_id(name)) != model.unk_id():
                    control_ids[name] = i
            for source, i, added in added_tokens(file.parent, settings):
                token = added.content
                # A control piece may be renamed (v2 and v3 reserve hundreds), an ordinary piece stands for its text.
                if i < size and model.id_to_piece(i) != token and not model.is_control(i):
                    raise UserError(
                        f"{quote(token)} has id {i}, which is {model.id_to_piece(i)!r} in {file.name}; "
                        f"give added tokens ids from {size} on",
                        path=source,
                    )
                control_ids[token] = i
            for name in special_names(settings):
                if name not in control_ids and model.piece_to_id(name) == model.unk_id():
                    control_ids[name] = max(size - 1, *control_ids.values()) + 1
            first = max([size - 1, *control_ids.values()]) + 1
            control_ids |= {token: i for i, token in enumerate(new_tokens, first)}
        self._model = model
        self.pieces = size
        # None of the text after a private-use character is merged with it: what precedes that text, with the space that
        # SentencePiece puts before a text.
        self._anchor = model.encode(ANCHOR)
        self._prefixes_text = settings.get("add_prefix_space") is not False
        self._prefixes_pieces = self._prefixes_text and settings.get("legacy") is not False
        self._not_decoded = set(control_ids.values())
        # SentencePiece gives -1 where the model has no such piece.
        bos_id, eos_id = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        vocab_size = max([size - 1, *self._not_decoded]) + 1
        longest = max(map(len, [*control_ids, *map(model.id_to_piece, range(size))]))
        super().__init__(file, settings, control_ids, vocab_size, longest, bos_id, eos_id, new_tokens)

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_piece(text, self._prefixes_text)

    def _encode_piece(self, text: str, prefixed: bool) -> list[int]:
        with library_errors(self.file, text):
            return self._model.encode(text) if prefixed else self._model.encode(ANCHOR + text)[len(self._anchor) :]

    def _encode_template(self, text: str) -> list[int]:
        """With `legacy: false`, transformers puts a space before the start of the text alone."""
        first, *pieces = self.split_control(text)
        ids = self._encode_text(first)
        for n, piece in enumerate(pieces):
            ids += self._encode_piece(piece, self._prefixes_pieces) if n % 2 else [self.control_ids[piece]]
        return ids

    def token_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return self.control_ids.get(token, i if i != self._model.unk_id() else None)

    def decode(self, ids: list[int]) -> str:
        # Ids beyond the vocabulary are rows that pad the embedding, which an untrained model may well choose.
        with library_errors(self.file):
            return self._model.decode([i for i in ids if i not in self._not_decoded and i < self._model.vocab_size()])

    def _format_adds_bos(self) -> bool:
        # Every Llama and Mistral model was trained that way.
        return True


def _encode_unlocked(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text. Other threads run meanwhile, which `encode` does not allow."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def load_tokenizer(path: str | Path, new_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """Loads the tokenizer of a model, whose directory or hub id is `path`, and adds new control tokens to it.

    `tokenizer.json` takes precedence where several formats exist: it contains the added tokens too, and it is what
    transformers and its servers read, so the ids are the same as theirs.

    Args:
        path: the directory of tokenizer.json, tokenizer.model, tokenizer.model.v* or tekken.json.
        new_tokens: control tokens that a run adds (`train.new_tokens`); they get the highest ids.

    Raises:
        UserError: no tokenizer file, one that cannot be read, or settings beside it that contradict it.
    """
    directory = model_directory(path)
    file = next(filter(None, (find_file(directory, name) for name in tokenizer_names(directory))), None)
    if file is None:
        raise UserError(
            "no tokenizer found; expected tokenizer.json, tokenizer.model, tokenizer.model.v* or tekken.json: "
            "copy it from where the weights came from",
            path=directory,
        )
    settings = read_settings(directory)
    if file.name == "tekken.json":
        from minorca.data.tekken import TekkenTokenizer

        if new_tokens:
            message = "has a fixed number of ids and takes no new tokens; copy the model's tokenizer.json beside it"
            raise UserError(message, path=file)
        return TekkenTokenizer(file, settings)
    kind = JsonTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    return kind(file, settings, new_tokens)


def check_vocabulary(tokenizer: Tokenizer, rows: int, path: str | Path) -> None:
    """Checks that an embedding of `rows` rows has one for every id that texts and templates produce; more rows are
    padding.

    Raises:
        UserError: the tokenizer has more ids.
    """
    tokenizer.without_row = beyond = tokenizer.control_beyond(rows)
    # unless every id from `rows` on is one of those
    if tokenizer.vocab_size - len(beyond) > rows:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size is {rows}; "
            f"use the tokenizer that belongs to these weights",
            path=path,
        )


def _add_tokens(tokenizer: tokenizers.Tokenizer, file: Path, settings: dict) -> None:
    """Adds the tokens that only the files beside tokenizer.json name, as transformers does."""
    for source, i, token in added_tokens(file.parent, settings):
        is_new = tokenizer.token_to_id(token.content) is None
        # added_tokens.json knows no properties, so those of a token that is not new stay
        if is_new or source.name != "added_tokens.json":
            tokenizer.add_tokens([token])
        if is_new and (found := tokenizer.token_to_id(token.content)) != i:
            raise UserError(
                f"{quote(token.content)} has id {i}, but the next free id of {file.name} is {found}; "
                f"give added tokens the ids from there on",
                path=source,
            )
    # transformers saves what it took from added_tokens.json as not special, <|im_start|> among it, and text could forge
    # a token that is not special.
    known = [content(settings.get("bos_token")), content(settings.get("eos_token")), *CHATML_TOKENS]
    names = [name for name in known if name and tokenizer.token_to_id(name) is not None] + special_names(settings)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([added.get(name, tokenizers.AddedToken(name, normalized=False)) for name in names])
