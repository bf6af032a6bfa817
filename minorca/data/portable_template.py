"""The built-in chat templates in Jinja, for other engines: transformers, vLLM and llama.cpp read chat_template.jinja.

Those engines encode the whole text at once, where chat_template.py encodes its parts on their own. SentencePiece begins
each part with a space, and whether a text needs that space written out depends on the tokenizer. So each template has
two parameters, AFTER and INSIDE, whose values are tried until the ids are the same.
"""

import logging
from itertools import product

from minorca.data import sandbox
from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NO_TOOLS = """\
{%- if tools %}{{- raise_exception('this chat template has no form for tools') }}{%- endif %}
{%- for message in messages if message['tool_calls'] %}
{{- raise_exception('this chat template has no form for tool calls') }}
{%- endfor %}
"""

_CHATML = """\
{{- BOS }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('expected the role system, user or assistant') }}
{%- elif message['role'] == 'assistant' %}
{{- '<|im_start|>AFTERassistant\\nINSIDE' + message['content'] + '<|im_end|>AFTER\\n' }}
{%- elif message['role'] == 'user' or message['content'] %}
{{- '<|im_start|>AFTER' + message['role'] + '\\n' + message['content'] + '<|im_end|>AFTER\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>AFTERassistant\\n' }}{%- endif %}
"""

# CARRIES: whether a user message carries the system prompt; USER and ASSISTANT: how a message is written.
_MISTRAL = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- bos_token }}
{%- for message in turns %}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}
{{- raise_exception('expected user and assistant messages in turn, after an optional system message') }}
{%- elif message['role'] == 'user' %}
{%- set content = system + '\\n\\n' + message['content'] if system and CARRIES else message['content'] %}
{{- USER }}
{%- else %}
{{- ASSISTANT + eos_token }}
{%- endif %}
{%- endfor %}
"""
_FIRST = {
    "CARRIES": "loop.first",
    "USER": "'AFTER[INST] ' + content + ' [/INST]'",
    "ASSISTANT": "'INSIDE' + message['content']",
}
_LAST = {
    # The last user message is the last or the last but one of all.
    "CARRIES": "loop.revindex <= 2",
    "USER": "'[INST]AFTER' + content + '[/INST]'",
    "ASSISTANT": "'AFTER' + message['content'].rstrip(' ')",
}


def _fill(source: str, parts: dict[str, str]) -> str:
    for name, part in parts.items():
        source = source.replace(name, part)
    return source


SOURCES = {
    "chatml": _NO_TOOLS + _CHATML,
    "mistral-v1": _NO_TOOLS + _fill(_MISTRAL, _FIRST),
    "mistral-v2": _NO_TOOLS + _fill(_MISTRAL, _LAST),
    "mistral-v3": _NO_TOOLS + _fill(_MISTRAL, _LAST),
}

_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_USER = {"role": "user", "content": "What is 2 + 2?\n"}
_ANSWER = {"role": "assistant", "content": "<think>Two twos</think>It is 4."}
_AGAIN = {"role": "user", "content": "And 3 + 3?"}
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
# Conversations that ask for an answer, which is what other engines use a template for. They contain what templates are
# known to drop: system prompts, white space at an end, the thoughts of earlier answers.
_PROBES = [
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ANSWER, _AGAIN],
    [_SYSTEM, _USER, _ANSWER, _AGAIN],
]


def portable_template(tok: Tokenizer, template: str | None) -> str | None:
    """The Jinja template that others need to write what `template`, a resolved name, writes.

    It is the one that the model ships, if there is one, where that writes the same or `template` is not built in.
    """
    if template not in SOURCES or (tok.chat_template is not None and _writes_same(tok, tok.chat_template, template)):
        return tok.chat_template
    if tok.chat_template is not None and _writes_tools(tok, tok.chat_template):
        log.warning(
            "%s: its chat template writes tools; the one that is written in its place, of %s, has no form for them",
            tok.path,
            template,
        )
    source = SOURCES[template].replace("BOS", "bos_token" if tok.adds_bos else "''")
    candidates = [_fill(source, {"AFTER": after, "INSIDE": inside}) for after, inside in product(("", " "), repeat=2)]
    for candidate in candidates:
        if _writes_same(tok, candidate, template):
            return candidate
    log.warning(
        "%s: with this tokenizer no Jinja template gives the ids of %s: prompts in other engines will differ",
        tok.path,
        template,
    )
    return candidates[0]


def special_tokens(tok: Tokenizer) -> dict[str, str]:
    """The strings of bos and eos under the names by which templates and tokenizer_config.json know them."""
    names = {i: name for name, i in tok.control_ids.items()}
    ids = (("bos_token", tok.bos_id), ("eos_token", tok.eos_id))
    return {key: names[i] for key, i in ids if i is not None and i in names}


def _writes_same(tok: Tokenizer, source: str, template: str) -> bool:
    """Whether a Jinja template, its text encoded at once, gives the ids of a built-in one for all probes."""
    for messages in _PROBES:
        try:
            ids = tok.encode_template(_write(tok, source, messages))
        except sandbox.TemplateFailed:
            return False
        if ids != render_chat(tok, messages, template=template):
            return False
    return True


def _writes_tools(tok: Tokenizer, source: str) -> bool:
    try:
        return _write(tok, source, [_USER], [_TOOL]) != _write(tok, source, [_USER])
    except sandbox.TemplateFailed:
        return False


def _write(tok: Tokenizer, source: str, messages: list[dict], tools: list[dict] | None = None) -> str:
    variables = {"messages": messages, "add_generation_prompt": True, "tools": tools}
    return sandbox.render(source, special_tokens(tok) | variables, limit=2**20)
