"""The files that make a directory of weights speak for itself: tokenizer, chat template, stop ids, and for adapters a
record of their training, minorca.json.
"""

import copy
import json
import logging
from pathlib import Path

from minorca.data.chat_template import TEMPLATES
from minorca.data.new_tokens import name_new_tokens
from minorca.data.portable_template import portable_template
from minorca.data.shipped_template import special_tokens
from minorca.data.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, check_vocabulary, load_tokenizer
from minorca.data.tokenizer_files import (
    chat_templates,
    embedding_rows,
    read_settings,
    token_ids,
    tokenizer_names,
    tokenizer_paths,
)
from minorca.errors import UserError
from minorca.files.adapters import RECORD
from minorca.files.hub import local_directory
from minorca.files.safe_io import find_file, quote, read_json, read_optional_json, read_small
from minorca.model.quantization import Quantization

log = logging.getLogger(__name__)

# Tells tokenizers with equal vocabularies apart that split text in other ways.
SAMPLE = "  Two spaces, naïve 日本語 🦜\n\n\tdef f(x):\n    return x ** 2 + 1234567890  # it's"


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory, its settings and templates, by name."""
    return {name: read_small(path, MAX_TOKENIZER_BYTES) for name, path in tokenizer_paths(directory).items()}


def has_tokenizer(directory: Path) -> bool:
    return any(find_file(directory, name) for name in tokenizer_names(directory))


def portable_files(tok: Tokenizer, template: str | None, model: Path) -> dict[str, bytes]:
    """What lies beside weights that were trained with `template`, a resolved name or None, by file name.

    The tokenizer's files under the names that other engines look for, a Jinja template that writes the same, and
    generation_config.json of the directory `model` with every stop id.
    """
    files = tokenizer_files(tok.path)
    versions = sorted(name for name in files if name.startswith("tokenizer.model.v"))
    if versions:
        files.setdefault("tokenizer.model", files[versions[-1]])
    config = _tokenizer_config(tok)
    name_new_tokens(tok, files, config)
    source = portable_template(tok, template)
    # An adapter may have replaced that of the directory.
    if source != chat_templates(tok.path, read_settings(tok.path)).get("default"):
        files = {name: content for name, content in files.items() if not _is_template(name)}
        config.pop("chat_template", None)
    if source is not None and not config.get("chat_template"):
        files["chat_template.jinja"] = source.encode()
    files["tokenizer_config.json"] = _to_json(config)
    files["generation_config.json"] = _to_json(_generation_config(tok, model))
    return files


def adapter_files(tok: Tokenizer, template: str, quantization: Quantization | None = None) -> dict[str, bytes]:
    """What lies beside an adapter that was trained with `template` on a base that was quantized so: `portable_files`,
    and a record of both.
    """
    record: dict[str, object] = {"template": template}
    if tok.new_tokens:
        record["base_vocab_size"] = embedding_rows(tok.path)
    if quantization:
        record |= {"quantize": "nf4", "double_quant": quantization.double_quant}
    return portable_files(tok, template, tok.path) | {RECORD: _to_json(record)}


def load_chat(base: Tokenizer, rows: int, adapter: str | Path | None) -> tuple[Tokenizer, str | None]:
    """The tokenizer to use with an adapter, and the name of the template of its training, None if it records none.

    Args:
        base: the model's tokenizer, which is used where the adapter brings none.
        rows: of the model's embedding.
        adapter: its directory; None: the model alone.

    Raises:
        UserError: a file of the adapter that is invalid, or a tokenizer with more ids than the model.
    """
    if adapter is None:
        return base, None
    directory = local_directory(adapter)
    return _adapter_tokenizer(directory, base, rows), recorded_template(directory)


def recorded_template(adapter: Path) -> str | None:
    """The name of the template with which an adapter was trained; None if it has no record.

    Raises:
        UserError: an invalid record.
    """
    path = find_file(adapter, RECORD)
    if path is None:
        return None
    template = read_json(path).get("template")
    if template not in TEMPLATES:
        raise UserError(
            f"is {quote(template)}; expected one of {', '.join(TEMPLATES)}: it is the template of training",
            path=path,
            field="template",
        )
    return template


def _adapter_tokenizer(directory: Path, base: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer that an adapter brings; `base` itself where they are the same, or the adapter brings none."""
    if not has_tokenizer(directory):
        return _with_templates(base, chat_templates(directory, read_settings(directory)))
    tok = load_tokenizer(directory)
    _complete(tok, base)
    check_vocabulary(tok, rows, directory)
    # Only vocabularies of one kind can be compared.
    alike = type(tok) is type(base)
    rowless = {*base.without_row.values(), *tok.without_row.values()}
    around = "".join(f"{token} a " for token in base.control_ids if token not in rowless)
    differences = [
        what
        for what, ours, theirs in (
            ("control tokens", base.control_ids, tok.control_ids),
            ("bos", (base.bos_id, base.adds_bos), (tok.bos_id, tok.adds_bos)),
            ("eos", base.eos_id, tok.eos_id),
            ("number of ids", base.vocab_size, tok.vocab_size),
            ("text", base.encode(SAMPLE), tok.encode(SAMPLE)),
            ("text around control tokens", *(each.encode_template(around) for each in (base, tok))),
            ("vocabulary", *((base.vocabulary(), tok.vocabulary()) if alike else (None, None))),
        )
        if ours != theirs
    ]
    if differences:
        log.warning(
            "%s: its tokenizer gives other ids than the model's (%s) and is used with this adapter",
            directory,
            ", ".join(differences),
        )
    same = (tok.chat_template, tok.stop_ids, tok.without_row) == (base.chat_template, base.stop_ids, base.without_row)
    return base if same and alike and not differences else tok


def _complete(tok: Tokenizer, base: Tokenizer) -> None:
    """Gives an adapter's tokenizer what only the model's files say.

    An adapter that others wrote lacks the model's configuration, and may lack the tokenizer's and the chat template.
    """
    settings = read_settings(tok.path)
    if settings.get("bos_token") is None and not token_ids(tok.path, "bos_token_id"):
        tok.bos_id = base.bos_id
    if settings.get("eos_token") is None and not token_ids(tok.path, "eos_token_id"):
        tok.eos_id = base.eos_id
    if find_file(tok.path, "tokenizer_config.json") is None:
        tok.adds_bos = base.adds_bos and tok.bos_id is not None
    tok.stop_ids |= base.stop_ids
    if not tok.chat_templates:
        tok.chat_templates, tok.chat_template = base.chat_templates, base.chat_template


def _with_templates(base: Tokenizer, templates: dict[str, str]) -> Tokenizer:
    """The model's tokenizer with the chat templates of an adapter that brings no tokenizer; `base` without any."""
    if not templates:
        return base
    tok = copy.copy(base)
    tok.chat_templates, tok.chat_template = templates, templates.get("default")
    return tok


def _is_template(name: str) -> bool:
    return name.endswith(".jinja") or name == "chat_template.json"


def _tokenizer_config(tok: Tokenizer) -> dict:
    """tokenizer_config.json, with what AutoTokenizer needs to read the tokenizer as it is read here."""
    config = read_optional_json(tok.path / "tokenizer_config.json")
    needed = special_tokens(tok)
    if tok.file.name == "tokenizer.json":
        # Without config.json beside it, any other class takes no more than vocabulary and merges from the file.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif tok.file.name.startswith("tokenizer.model"):
        needed |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": tok.adds_bos}
    return needed | config


def stop_ids(tok: Tokenizer, model: Path) -> list[int]:
    """Every id that ends a generation, of a tokenizer that the adapter alone brings too; the tokenizer's own first: it
    is the one that is taken where no other file names one.
    """
    ids = tok.stop_ids | set(token_ids(model, "eos_token_id"))
    return list(dict.fromkeys(i for i in (tok.eos_id, *sorted(ids)) if i is not None))


def _generation_config(tok: Tokenizer, model: Path) -> dict:
    config = read_optional_json(model / "generation_config.json")
    ids = stop_ids(tok, model)
    if tok.bos_id is not None:
        config.setdefault("bos_token_id", tok.bos_id)
    if ids:
        config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return config


def _to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
