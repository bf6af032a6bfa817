"""What a GGUF file says of its model: the keys that llama.cpp's converter writes for Llama and Mistral."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from minorca.data.portable_files import stop_ids
from minorca.data.portable_template import portable_template, writes_same
from minorca.data.tokenizer import Tokenizer
from minorca.data.tokenizer_files import content, read_settings, token_ids
from minorca.export.gguf_vocabulary import Vocabulary, vocabulary_of
from minorca.files.gguf_tokenizer import SPACE, UNKNOWN
from minorca.model.architecture import Architecture

# a module of this package has the library's name
if TYPE_CHECKING:
    from gguf import GGUFWriter

log = logging.getLogger(__name__)

# of a model whose files say nothing, as in config.json (huggingface.py)
_POSITIONS = 32768


def add_architecture(writer: "GGUFWriter", arch: Architecture) -> None:
    """The network's sizes and constants. llama.cpp has no window for it, so that its context ends where that does."""
    writer.add_block_count(arch.layers)
    writer.add_context_length(context_length(arch))
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_vocab_size(arch.vocab_size)


def context_length(arch: Architecture) -> int:
    positions = arch.max_positions or _POSITIONS
    return min(positions, arch.window or positions)


def add_tokenizer(
    writer: "GGUFWriter", tok: Tokenizer | None, template: str | None, arch: Architecture, model: Path
) -> None:
    """The tokenizer, and the chat templates; the first writes what `template`, a resolved name, writes.

    Args:
        model: the model's directory, which may name more ids that end a generation.

    Raises:
        UserError: as `vocabulary_of`.
    """
    if tok is None:
        writer.add_tokenizer_model("none")
        return
    vocabulary = vocabulary_of(tok, arch.vocab_size)
    if vocabulary.pre:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        is_prefixed = any(vocabulary.tokens[i].startswith(SPACE) for i in tok.encode("a")[:1] if i < arch.vocab_size)
        writer.add_add_space_prefix(is_prefixed)
        if is_prefixed and tok.encode(" a") == tok.encode("a"):
            log.warning("%s: llama.cpp begins every text with a space; this tokenizer not one that has it", tok.path)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    for name, i in _special_ids(tok, vocabulary, model).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    writer.add_add_bos_token(tok.adds_bos)
    if (source := llama_cpp_template(tok, template)) is not None:
        more = {name: text for name, text in tok.chat_templates.items() if name != "default"}
        named = [{"name": name, "template": text} for name, text in ({"default": source} | more).items()]
        writer.add_chat_template(named if more else source)


def _special_ids(tok: Tokenizer, vocabulary: Vocabulary, model: Path) -> dict[str, int]:
    """The ids by llama.cpp's names. It ends a generation at three that are given, and at some by their text."""
    settings = read_settings(tok.path)
    found = {"bos": tok.bos_id, **dict(zip(("eos", "eot", "eom"), stop_ids(tok, model)))}
    if UNKNOWN in vocabulary.kinds:
        found["unknown"] = vocabulary.kinds.index(UNKNOWN)
    for name, key in (("unknown", "unk"), ("seperator", "sep"), ("padding", "pad"), ("mask", "mask")):
        # Mistral's own files have no settings beside them, and call the tokens so
        token = content(settings.get(f"{key}_token", f"<{key}>" if f"<{key}>" in tok.control_ids else None))
        named = next(iter(token_ids(tok.path, f"{key}_token_id")), None)
        if (i := named if token is None else tok.control_ids.get(token)) is not None:
            found[name] = i
    if surplus := stop_ids(tok, model)[3:]:
        log.warning("%s: llama.cpp ends at three ids that a file names; not at %s", tok.path, surplus)
    return {name: i for name, i in found.items() if i is not None and 0 <= i < len(vocabulary.tokens)}


def llama_cpp_template(tok: Tokenizer, template: str | None) -> str | None:
    """The Jinja template from whose text llama.cpp makes the ids of `template`, which it is said not to do where no
    template does.
    """
    tok = tok.as_in_llama_cpp()
    source = portable_template(tok, template)
    if template == "jinja" and source is not None and not writes_same(tok, source, template):
        log.warning(
            "%s: llama.cpp gives other ids than training for the text of its chat template: it encodes what is between "
            "control tokens as texts of their own",
            tok.path,
        )
    return source
