"""The built-in chat templates in Jinja, for other engines: transformers, vLLM and llama.cpp read chat_template.jinja.

Those engines encode the whole text at once, where chat_template.py encodes its parts on their own. SentencePiece begins
each part with a space, and whether a text needs that space written out depends on the tokenizer. So each template has
two parameters, AFTER and INSIDE, whose values are tried until the ids are the same.
"""

import logging
from itertools import product

from minorca.data.chat_template import PROBES, render_chat
from minorca.data.shipped_template import write_by, writes_tools
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError

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


def fill(source: str, parts: dict[str, str]) -> str:
    """A template with its parameters replaced by their values, in order."""
    for name, part in parts.items():
        source = source.replace(name, part)
    return source


SOURCES = {
    "chatml": _NO_TOOLS + _CHATML,
    "mistral-v1": _NO_TOOLS + fill(_MISTRAL, _FIRST),
    "mistral-v2": _NO_TOOLS + fill(_MISTRAL, _LAST),
    "mistral-v3": _NO_TOOLS + fill(_MISTRAL, _LAST),
}


def portable_template(tok: Tokenizer, template: str | None) -> str | None:
    """The Jinja template that others need to write what `template`, a resolved name, writes.

    It is the one that the model ships, if there is one, where that writes the same or `template` is not built in.
    """
    if template not in SOURCES or (tok.chat_template is not None and writes_same(tok, tok.chat_template, template)):
        return tok.chat_template
    if tok.chat_template is not None and writes_tools(tok):
        log.warning(
            "%s: its chat template writes tools; the one that is written in its place, of %s, has no form for them",
            tok.path,
            template,
        )
    spaces = spaces_that_match(tok, template)
    if spaces is None:
        log.warning(
            "%s: with this tokenizer no Jinja template gives the ids of %s: prompts in other engines will differ",
            tok.path,
            template,
        )
    return _source(tok, template, *(spaces or ("", "")))


def spaces_that_match(tok: Tokenizer, template: str) -> tuple[str, str] | None:
    """The values of AFTER and INSIDE with which a built-in template, its text encoded at once, gives its ids; None
    where no values do.
    """
    pairs = product(("", " "), ("", " "))
    return next((pair for pair in pairs if writes_same(tok, _source(tok, template, *pair), template)), None)


def _source(tok: Tokenizer, template: str, after: str, inside: str) -> str:
    bos = "bos_token" if tok.adds_bos else "''"
    return fill(SOURCES[template], {"BOS": bos, "AFTER": after, "INSIDE": inside})


def writes_same(tok: Tokenizer, source: str, template: str) -> bool:
    """Whether a Jinja template, its text encoded at once, gives the ids of `template` wherever an answer is asked for,
    which is what other engines use a template for.
    """
    for messages in (messages for messages, is_prompt in PROBES if is_prompt):
        try:
            expected = render_chat(tok, messages, template=template)
        except UserError:
            # a model's own template may take other conversations only
            continue
        try:
            text = write_by(source, tok, messages, [], True)
        except UserError:
            return False
        if tok.encode_template(text) != expected:
            return False
    return True
