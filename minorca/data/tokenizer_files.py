"""What a model's directory says about its tokenizer beside the vocabulary: settings, added tokens, chat templates.

Where several files say something, the one that transformers reads counts.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from minorca.data import sandbox
from minorca.errors import UserError
from minorca.files.safe_io import find_directory, find_file, quote, read_optional_json, read_small

# Limits for untrusted files, each several times the largest in use: Gemma's tokenizer.json has 33 million bytes and its
# tokenizer.model 4 million; a chat template 20 thousand characters, and a model ships two or three.
MAX_TOKENIZER_BYTES = 40 * 10**6
MAX_TEMPLATE_CHARACTERS = 10**6
MAX_TEMPLATES = 100

# A surrogate code point: in a Python string always half of a pair. JSON can spell it, UTF-8 cannot encode it.
SURROGATE = re.compile("[\ud800-\udfff]")
# the keys that name one special token each, in the order in which transformers adds those that the vocabulary lacks
_SPECIAL_KEYS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# a tokenizer's version as Mistral's files name it
_VERSIONED = re.compile(r"tokenizer\.model\.v\d+(m\d+)?")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


class AddedToken(NamedTuple):
    """A token that a settings file adds to the vocabulary: that file, the token's id and its properties."""

    source: Path
    id: int
    token: tokenizers.AddedToken


def tokenizer_names(directory: Path) -> list[str]:
    """The names that a tokenizer's own file may have, in the order in which they are looked for."""
    found = (file.name for file in directory.glob("tokenizer.model.v*"))
    versions = sorted(filter(_VERSIONED.fullmatch, found), reverse=True)
    return ["tokenizer.json", "tokenizer.model", *versions, "tekken.json"]


def tokenizer_paths(directory: Path) -> dict[str, Path]:
    """The files in a directory from which ids and rendered conversations follow, by their path within it.

    What lies beside them under other names, as tokenizer.model.old, is not looked at.

    Raises:
        UserError: a file that `find_file` refuses.
    """
    names = (*tokenizer_names(directory), *_SETTINGS, *_TEMPLATES)
    found = {name: find_file(directory, name) for name in names}
    return {name: path for name, path in found.items() if path} | _additional_templates(directory)


def _additional_templates(directory: Path) -> dict[str, Path]:
    folder = find_directory(directory, "additional_chat_templates")
    if folder is None:
        return {}
    names = sorted(file.name for file in folder.glob("*.jinja"))
    if len(names) > MAX_TEMPLATES:
        raise UserError(f"holds {len(names)} templates; expected at most {MAX_TEMPLATES}", path=folder)
    found = {f"{folder.name}/{name}": find_file(folder, name) for name in names}
    return {name: path for name, path in found.items() if path}


def read_settings(directory: Path) -> dict:
    """tokenizer_config.json over special_tokens_map.json.

    Raises:
        UserError: a file that cannot be read, or a special token that is not text.
    """
    settings = {
        **read_optional_json(directory / "special_tokens_map.json"),
        **read_optional_json(directory / "tokenizer_config.json"),
    }
    for key in ("bos_token", "eos_token", *_SPECIAL_KEYS):
        token = content(settings.get(key))
        if not isinstance(token, str | None) or SURROGATE.search(token or ""):
            raise UserError(
                f"is {quote(settings[key])} in tokenizer_config.json or special_tokens_map.json; "
                f"expected text, or an object with content",
                path=directory,
                field=key,
            )
    return settings


def special_names(settings: dict) -> list[str]:
    """The special tokens beside bos and eos that the settings name, which may be missing in the vocabulary."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    names = [content(token) for token in [*map(settings.get, _SPECIAL_KEYS), *more]]
    return [name for name in names if isinstance(name, str) and name and not SURROGATE.search(name)]


def added_tokens(directory: Path, settings: dict) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder` in tokenizer_config.json, else of its predecessor added_tokens.json, by id.

    Raises:
        UserError: an entry that is not a token and an id.
    """
    old = directory / "added_tokens.json"
    new = directory / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(
            f"is {quote(decoder)}; expected an object from ids to tokens", path=new, field="added_tokens_decoder"
        )
    if decoder:
        entries = [(new, int(i) if i.isdecimal() and len(i) < 10 else i, token) for i, token in decoder.items()]
    else:
        special = {content(settings.get(key)) for key in ("bos_token", "eos_token")} | set(special_names(settings))
        entries = [
            (old, i, {"content": token, "special": token in special, "normalized": token not in special})
            for token, i in read_optional_json(old).items()
        ]
    return sorted((_added_token(*entry) for entry in entries), key=lambda added: added.id)


def _added_token(source: Path, i: Any, token: Any) -> AddedToken:
    text = content(token)
    valid_token = isinstance(text, str) and text and not SURROGATE.search(text)
    if not (valid_token and type(i) is int and 0 <= i < 10**9):
        raise UserError(
            f"expected tokens and their ids (integers from 0), got {quote(text)} and {quote(i)}; fix the entry",
            path=source,
        )
    flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token} if isinstance(token, dict) else {}
    return AddedToken(source, i, tokenizers.AddedToken(text, **flags))


def chat_templates(directory: Path, settings: dict) -> dict[str, str]:
    """The sources of the chat templates that a model ships, by name: "default", "tool_use" and others.

    Files of their own take precedence over tokenizer_config.json, and that over chat_template.json, which transformers'
    processors alone write and read.

    Raises:
        UserError: a template that is not text, or too long.
    """
    templates = {}
    if file := find_file(directory, "chat_template.jinja"):
        templates["default"] = read_text(file, MAX_TEMPLATE_CHARACTERS)
    for file in _additional_templates(directory).values():
        templates[file.stem] = read_text(file, MAX_TEMPLATE_CHARACTERS)
    if "default" in templates:
        return templates
    for name, values in (("tokenizer_config.json", settings), ("chat_template.json", None)):
        values = read_optional_json(directory / name) if values is None else values
        if values.get("chat_template") is not None:
            return _named_templates(values["chat_template"], directory / name) | templates
    return templates


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """Templates by name, of one template's text, an object of names, or a list of objects with name and template."""
    named = {"default": value} if isinstance(value, str) else value
    if isinstance(named, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in named
    ):
        named = {entry["name"]: entry["template"] for entry in named if isinstance(entry["name"], str)}
    if not isinstance(named, dict) or not all(isinstance(template, str) for template in named.values()):
        raise UserError(
            f'is {type(value).__name__}; expected text, an object from names to texts, or a list of {{"name", '
            f'"template"}}',
            path=path,
            field="chat_template",
        )
    for template in named.values():
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise UserError(
                f"has {len(template)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}",
                path=path,
                field="chat_template",
            )
    return named


def token_ids(directory: Path, key: str) -> list[int]:
    """The token ids that generation_config.json and config.json give as `key`, each None, an id or a list of ids."""
    values = [read_optional_json(directory / name).get(key) for name in ("generation_config.json", "config.json")]
    return [i for value in values for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def embedding_rows(directory: Path) -> int | None:
    """The number of rows of the model's embedding; None where no configuration lies beside the tokenizer."""
    sizes = [read_optional_json(directory / name).get("vocab_size") for name in ("config.json", "params.json")]
    return next((size for size in sizes if type(size) is int), None)


def content(token: Any) -> Any:
    """A token's string, which the settings give as text or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def read_text(file: Path, max_bytes: int) -> str:
    try:
        return read_small(file, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise _corrupt(file, error) from error


def check_tokenizer(file: Path, kind: str, content: str) -> None:
    """Tries a tokenizer's file in the sandbox's process; arguments as `tokenizer_probe.find_problem`.

    Raises:
        UserError: a file that cannot be read, or that takes much time, memory or many ids for little text.
    """
    try:
        problem = sandbox.try_tokenizer(kind, content)
    except sandbox.NoReply as failed:
        problem = f"cannot be tried, because {failed}"
    except sandbox.TemplateFailed as failed:
        raise _corrupt(file, failed) from None
    if problem:
        raise UserError(f"{problem}; use the tokenizer that the model was published with", path=file)


@contextmanager
def library_errors(file: Path, text: str | None = None) -> Iterator[None]:
    """Turns whatever a tokenizer library raises into a UserError about its file.

    Some faults of a file show only when text is encoded, and some as a panic in Rust, which does not derive from
    Exception.

    Args:
        text: what is encoded; None: the file is read.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _corrupt(file, error) if text is None else _unable(file, error, text) from None
        raise


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _unable(file: Path, error: BaseException, text: str) -> UserError:
    return UserError(
        f"cannot encode {quote(text)} ({_reason(error)}); use the tokenizer that the model was published with",
        path=file,
    )


def _corrupt(file: Path, error: BaseException) -> UserError:
    return UserError(
        f"cannot be read as a tokenizer ({_reason(error)}); download it again (a file of a few hundred bytes is a Git "
        f"LFS pointer, not the tokenizer)",
        path=file,
    )
