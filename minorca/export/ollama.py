"""Modelfile: what Ollama makes a model of, from a GGUF file.

Ollama does not run the Jinja template that a file holds: it looks for the most similar of those it knows, and otherwise
writes no template at all (github.com/ollama/ollama, docs/modelfile.md and template/template.go). So the templates here
are Go's, with the ids of training for the built-in ones, and for a model's own where it is ChatML.
"""

import logging

from minorca.data.chat_template import PROBES
from minorca.data.portable_files import stop_ids
from minorca.data.portable_template import fill, spaces_that_match
from minorca.data.shipped_template import name_of, special_tokens, write_by
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.export.contents import as_argument
from minorca.export.gguf_metadata import context_length
from minorca.files.weights import ModelFiles

log = logging.getLogger(__name__)

# AFTER and INSIDE are those of data/portable_template.py. Ollama puts a bos in front where the tokenizer adds one;
# Mistral's formats begin with BOS where it does not. SYSTEM: what is written where a conversation has no system prompt;
# OTHERWISE: the condition of a message that is no answer.
_CHATML = """\
{{- range $i, $_ := .Messages }}
{{- if and (eq $i 0) (ne .Role "system") }}SYSTEM{{ end }}
{{- if eq .Role "assistant" }}<|im_start|>AFTERassistant
INSIDE{{ .Content }}<|im_end|>AFTER
{{ OTHERWISE }}<|im_start|>AFTER{{ .Role }}
{{ .Content }}<|im_end|>AFTER
{{ end }}
{{- end }}<|im_start|>AFTERassistant
"""
_MISTRAL = """\
{{- $last := -1 }}{{ $first := -1 }}
{{- range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $last = $i }}{{ if eq $first -1 }}{{ $first = $i }}{{ end }}\
{{ end }}{{ end }}BOS
{{- range $i, $_ := .Messages }}
{{- if eq .Role "user" }}USER
{{- else if eq .Role "assistant" }}ASSISTANTEOS
{{- end }}
{{- end }}"""
_SYSTEM = "{{ if and $.System (eq $i $CARRIER) }}{{ $.System }}\n\n{{ end }}"
_PARTS = {
    "mistral-v1": (f"AFTER[INST] {_SYSTEM.replace('CARRIER', 'first')}{{{{ .Content }}}} [/INST]", "INSIDE"),
    "mistral-v2": (f"[INST]AFTER{_SYSTEM.replace('CARRIER', 'last')}{{{{ .Content }}}}[/INST]", "AFTER"),
}
_PARTS["mistral-v3"] = _PARTS["mistral-v2"]


def modelfile(file: str, tok: Tokenizer | None, template: str | None, source: ModelFiles, instruction: str) -> str:
    """The text of a Modelfile.

    Args:
        file: the GGUF file, as FROM or ADAPTER names it.
        instruction: FROM for a model, ADAPTER for an adapter.
    """
    lines = [f"FROM {file}"] if instruction == "FROM" else [_BASE.format(as_argument(source)), f"ADAPTER {file}"]
    if tok is not None:
        go = go_template(tok, template)
        lines.append(f'TEMPLATE """{go}"""' if go else _untranslated(tok))
        names = (name_of(tok, i) for i in stop_ids(tok, source.directory))
        lines += [f'PARAMETER stop "{name}"' for name in names if name and _is_plain(name) and '"' not in name]
    lines.append(f"PARAMETER num_ctx {context_length(source.arch)}")
    return "\n".join(lines) + "\n"


_BASE = """\
# the base model as GGUF: python -m minorca.export --model {} --output base --format gguf
FROM ./base/model-F16.gguf"""


def _is_plain(text: str) -> bool:
    """Whether a text stands for itself in a Modelfile's template."""
    return not any(mark in text for mark in ("{{", "}}", '"""', "\0"))


def _untranslated(tok: Tokenizer) -> str:
    message = "the chat template is none of those that are known in Ollama's language; add a TEMPLATE"
    log.warning("%s: Modelfile: %s", tok.path, message)
    return f"# {message}"


def go_template(tok: Tokenizer, template: str | None) -> str | None:
    """Ollama's template that writes what `template`, a resolved name, writes; None where that is not known."""
    tok = tok.as_in_llama_cpp()
    if template == "jinja":
        default = _default_system(tok)
        return None if default is None else _chatml("", "", default, "else")
    if template not in ("chatml", *_PARTS) or (spaces := spaces_that_match(tok, template)) is None:
        return None
    after, inside = spaces
    if template == "chatml":
        return _chatml(after, inside, "", 'else if or (ne .Role "system") .Content')
    user, assistant = _PARTS[template]
    answer = f"{assistant}{{{{ .Content }}}}"
    special = special_tokens(tok)
    if not all(map(_is_plain, special.values())):
        return None
    bos = "" if tok.adds_bos else special["bos_token"]
    parts = {"USER": user, "ASSISTANT": answer, "BOS": bos, "EOS": special["eos_token"]}
    return fill(_MISTRAL, parts | {"AFTER": after, "INSIDE": inside})


def _chatml(after: str, inside: str, system: str, otherwise: str) -> str:
    return fill(_CHATML, {"AFTER": after, "INSIDE": inside, "OTHERWISE": otherwise, "SYSTEM": system})


def _default_system(tok: Tokenizer) -> str | None:
    """What the shipped template writes in front where there is no system prompt, if for the rest it is ChatML; else
    None.
    """
    if tok.chat_template is None:
        return None
    question = {"role": "user", "content": "question"}
    try:
        text = write_by(tok.chat_template, tok, [question], [], True)
        system, separator, _ = text.partition("<|im_start|>user\nquestion")
        if not separator or not _is_plain(system):
            return None
        for messages, prompt in PROBES:
            written = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
            front = "" if messages[0]["role"] == "system" else system
            if prompt and write_by(tok.chat_template, tok, messages, [], True) != (
                f"{front}{written}<|im_start|>assistant\n"
            ):
                return None
    except UserError:
        return None
    return system
