"""Conversations to token ids and a loss mask, made together.

Messages are those of conversation.py. Training and generation call the same renderer, and an answer's ids start where
its generation prompt's ids end, so the model is asked exactly what it was taught.

chatml      `<|im_start|>role\\ncontent<|im_end|>\\n`; the answer encoded on its own, as Mistral-7B-OpenOrca was trained
            (axolotl, prompt_strategies/alpaca_w_system.py)
mistral-v1, mistral-v2, mistral-v3
            `[INST] content [/INST]answer</s>`, as in mistral-common (mistral_template.py)
jinja       the template that the model ships (jinja_template.py)
none        no template: a prompt and its completion, as they are, and the end of sequence
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import inf
from typing import cast

from minorca.data.conversation import is_trained_answer
from minorca.data.jinja_template import ids_by_span, render_prompt, render_training
from minorca.data.mistral_template import omits_calls, render_mistral
from minorca.data.rendered import NOTHING_ENDS, Pieces, Rendered, join
from minorca.data.shipped_template import write_text, writes_tools
from minorca.data.spans import encode_spans
from minorca.data.tokenizer import SURROGATE, Tokenizer
from minorca.data.visible_text import visible_text
from minorca.errors import UserError

# In the order in which `auto` tries them.
BUILT_IN = ("chatml", "mistral-v3", "mistral-v2", "mistral-v1")
TEMPLATES = ("auto", *sorted(BUILT_IN), "jinja", "none")
REQUIRED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral-v2": ("[INST]", "[/INST]"),
    "mistral-v3": ("[INST]", "[/INST]"),
}
ROLES = ("system", "user", "assistant", "tool")

_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_USER = {"role": "user", "content": "What is 2 + 2?\n"}
_ANSWER = {"role": "assistant", "content": "<think>Two twos</think>It is 4."}
_AGAIN = {"role": "user", "content": "And 3 + 3?"}
# Conversations by which templates are compared, and whether they ask for an answer. They contain what templates are
# known to drop: system prompts, white space at an end, and the thoughts of earlier answers.
PROBES = [
    ([_USER], True),
    ([_SYSTEM, _USER], True),
    ([_USER, _ANSWER, _AGAIN], True),
    ([_USER, _ANSWER], False),
    ([_SYSTEM, _USER, _ANSWER, _AGAIN], True),
    ([_SYSTEM, _USER, _ANSWER, _AGAIN, _ANSWER], False),
]


def render_chat(
    tok: Tokenizer,
    messages: list[dict],
    add_generation_prompt: bool = True,
    template: str = "auto",
    max_ids: float = inf,
    tools: list[dict] | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """The ids of a conversation, by default with the header that asks for an answer.

    Args:
        tok: of the model that is asked.
        messages: dictionaries with "role" (system, user, assistant or tool) and "content"; an assistant's may have
            "tool_calls", as in OpenAI's API.
        add_generation_prompt: end in the header after which the model writes its answer.
        template: one of `TEMPLATES`; "auto" is the first that writes what the model's own template does.
        max_ids: the number of ids above which the caller rejects the conversation. A longer one may have other ids
            where answers start.
        tools: the schemas of the tools that the answer may call, as in OpenAI's API.
        continue_final_message: end in the last message, which is an answer's beginning, instead of after it.

    Returns:
        Token ids, with the BOS that the template begins with.

    Raises:
        UserError: an invalid message (`field` gives its index), a template that this tokenizer cannot write or that
            fails; an answer at the end without `continue_final_message`, where a generation prompt is wanted.
    """
    template = resolve_template(tok, template)
    _check_messages(messages)
    is_answer = messages[-1]["role"] == "assistant"
    if continue_final_message:
        if not is_answer:
            raise UserError("is no answer that could be continued", field=f"messages[{len(messages) - 1}]")
        if not messages[-1]["content"] and len(messages) > 1:
            return render_chat(tok, messages[:-1], True, template, max_ids, tools)
        add_generation_prompt = False
    elif add_generation_prompt and is_answer:
        raise UserError(
            "is an answer already: set continue_final_message to continue it, or add a message",
            field=f"messages[{len(messages) - 1}]",
        )
    if template == "jinja":
        with _advising(tok, messages, tools):
            return render_prompt(tok, messages, tools or [], add_generation_prompt, continue_final_message, max_ids)
    if template == "none":
        return _plain(tok, messages, True, ended=False).ids
    return join(_pieces(tok, messages, template, tools, add_generation_prompt, continue_final_message)).ids


def render(
    tok: Tokenizer,
    messages: list[dict],
    template: str = "auto",
    masked: bool = True,
    tools: list[dict] | None = None,
    parse_control: bool = True,
) -> Rendered:
    """A conversation as it is trained: its ids and its loss mask.

    Args:
        masked: False if the mask will not be used; a Jinja template that allows no mask is then accepted.
        tools: as for `render_chat`.
        parse_control: of template none, whether control strings in the text become control tokens.

    Raises:
        UserError: as `render_chat`; a shipped template under which an answer cannot be found.
    """
    template = resolve_template(tok, template)
    _check_messages(messages)
    if template == "jinja":
        with _advising(tok, messages, tools):
            return render_training(tok, messages, tools or [], masked)
    if template == "none":
        return _plain(tok, messages, parse_control, ended=True)
    rendered = join(_pieces(tok, messages, template, tools))
    if template.startswith("mistral") and omits_calls(messages, int(template[-1])):
        rendered.notes.append(f"with tool calls that {template} does not write")
    return rendered


def _pieces(
    tok: Tokenizer,
    messages: list[dict],
    template: str,
    tools: list[dict] | None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> Pieces:
    if template.startswith("mistral"):
        return render_mistral(tok, messages, int(template[-1]), tools or [], continue_final_message)
    _check_without_tools(messages, tools, template)
    return _chatml(tok, messages, add_generation_prompt, continue_final_message)


@contextmanager
def _advising(tok: Tokenizer, messages: list[dict], tools: list[dict] | None) -> Iterator[None]:
    """Names a built-in template of the shipped one's family that can write what the shipped one cannot."""
    try:
        yield
    except UserError as error:
        shipped = tok.chat_template or ""
        for name in BUILT_IN:
            marker = REQUIRED_TOKENS.get(name, ("[INST]",))[0]
            # Later formats of Mistral's have that too, and this.
            if marker in shipped and "[SYSTEM_PROMPT]" not in shipped and not _missing(tok, name):
                with suppress(UserError):
                    _pieces(tok, messages, name, tools)
                    error.advice = f"{name} can write it: data.template, or --template"
                    break
        raise


def resolve_template(tok: Tokenizer, template: str = "auto") -> str:
    """The template's name, with `auto` resolved.

    `auto` is the built-in template that writes what the model's own template or, in the case of Mistral's, their
    reference writes, else jinja. For a model without a template, it is the built-in one whose control tokens the
    tokenizer has.

    Raises:
        UserError: an unknown name, or a template that `tok` cannot write.
    """
    if template == "auto":
        return _auto(tok)
    if template not in TEMPLATES:
        raise UserError(f"is {template!r}; expected one of {', '.join(TEMPLATES)}", field="template")
    if missing := _missing(tok, template):
        possible = [name for name in (*BUILT_IN, "jinja") if not _missing(tok, name)]
        raise UserError(
            f"template {template} needs {missing}, which this model lacks; "
            f"choose {' or '.join(possible) or 'a model that has it'}",
            path=tok.path,
        )
    return template


# Every row asks.
@lru_cache(maxsize=64)
def _missing(tok: Tokenizer, template: str) -> str:
    """What `template` needs and `tok` lacks, in words; empty if nothing."""
    required = REQUIRED_TOKENS.get(template, ())
    missing = [f"the control token {token}" for token in required if token not in tok.control_ids]
    if template.startswith("mistral"):
        missing += [name for name, i in (("a bos token", tok.bos_id), ("an eos token", tok.eos_id)) if i is None]
    if template == "jinja" and tok.chat_template is None:
        missing.append("a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)")
    return " and ".join(missing)


# Servers resolve it for every request, and it renders a dozen probes.
@lru_cache(maxsize=8)
def _auto(tok: Tokenizer) -> str:
    possible = [name for name in BUILT_IN if not _missing(tok, name)]
    if "[TOOL_CALLS]" not in tok.control_ids and "mistral-v2" in possible:
        # The two differ in tools alone, which came with that token.
        possible.remove("mistral-v3")
    if tok.chat_template is not None:
        return next((name for name in possible if _reproduces(tok, name)), "jinja")
    if not possible:
        raise UserError(
            "the model ships no chat template, and its tokenizer lacks the control tokens of every built-in one; "
            "add a chat_template.jinja",
            path=tok.path,
        )
    return possible[0]


def _reproduces(tok: Tokenizer, template: str) -> bool:
    """Whether the built-in `template` writes what the shipped one does.

    It must do so for every probe that the shipped template accepts (some reject a system message), and at least one
    must be accepted.
    """
    if template == "chatml" and writes_tools(tok):
        # Our own renderer writes none.
        return False
    agrees = _writes_the_text if template.startswith("mistral") else _writes_the_ids
    accepted = False
    for messages, prompt in PROBES:
        try:
            if not agrees(tok, template, messages, prompt):
                return False
        except UserError:
            continue
        accepted = True
    return accepted


def _writes_the_ids(tok: Tokenizer, template: str, messages: list[dict], prompt: bool) -> bool:
    """Whether a built-in template has the ids of the shipped one, both split where answers start; the bos token may be
    left to the tokenizer.
    """
    shipped = ids_by_span(tok, messages, prompt)
    if tok.adds_bos and shipped[:1] != [tok.bos_id]:
        shipped = [cast(int, tok.bos_id), *shipped]
    return shipped == join(_pieces(tok, messages, template, None, prompt)).ids


def _writes_the_text(tok: Tokenizer, template: str, messages: list[dict], prompt: bool) -> bool:
    """Whether a built-in template has the text of the shipped one, but for spaces.

    Mistral's reference is mistral-common, which encodes messages one by one. Of the shipped templates, many differ from
    it in spaces, and most drop the system prompt of a conversation that ends in an answer.
    """
    shipped = "".join(write_text(tok, messages, [], prompt).split())
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if not prompt and "".join(system.split()) not in shipped:
        messages = messages[1:]
    ids = join(_pieces(tok, messages, template, None)).ids
    own = "".join(visible_text(tok, ids).split())
    bos, *_ = visible_text(tok, ids[:1]).split()
    return own.removeprefix(bos) == shipped.removeprefix(bos)


def _check_messages(messages: list[dict]) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError('is empty or not a list; expected at least one {"role": ..., "content": ...}', field="messages")
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError('lacks role or content; expected {"role": ..., "content": ...}', field=place)
        role = message["role"]
        content = message["content"]
        if role not in ROLES:
            raise UserError(f"is {role!r}; expected one of {', '.join(ROLES)}", field=f"{place}.role")
        if not isinstance(content, str):
            raise UserError(f"is {type(content).__name__}; expected text", field=f"{place}.content")
        if SURROGATE.search(content):
            raise UserError(
                "has an unpaired surrogate, which is not valid Unicode; fix the text", field=f"{place}.content"
            )
        for call in message.get("tool_calls") or ():
            if not isinstance(call, dict) or not isinstance((call.get("function") or {}).get("name"), str):
                expected = '{"function": {"name": ..., "arguments": ...}}'
                raise UserError(f"has {call!r:.60}; expected {expected}", field=f"{place}.tool_calls")


def _check_without_tools(messages: list[dict], tools: list[dict] | None, template: str) -> None:
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        raise UserError(f"has tools, which {template} cannot write; choose jinja or mistral-v3", field="messages")


def _chatml(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool, continue_final_message: bool) -> Pieces:
    start = tok.control_ids["<|im_start|>"]
    end = tok.control_ids["<|im_end|>"]
    prompt = [start, *tok.encode("assistant\n")]
    newline = tok.encode("\n")
    pieces: Pieces = [([cast(int, tok.bos_id)], False)] if tok.adds_bos else []
    for message in messages:
        role = message["role"]
        content = message["content"]
        if role == "assistant":
            pieces += [(prompt, False), ([*tok.encode(content), end], is_trained_answer(message)), (newline, False)]
        elif role == "user" or content:
            # An empty system prompt is not written.
            pieces.append(([start, *tok.encode(f"{role}\n{content}"), end, *newline], False))
    if add_generation_prompt:
        pieces.append((prompt, False))
    if continue_final_message:
        # Without the token that ends it and the newline.
        pieces[-2:] = [(pieces[-2][0][:-1], False)]
    return pieces


def _plain(tok: Tokenizer, messages: list[dict], parse_control: bool, ended: bool) -> Rendered:
    """A prompt and its completion, if there is one, encoded as one text; the completion is trained."""
    _check_without_tools(messages, None, "none")
    if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"has {roles}; template none writes a prompt and its completion only", field="messages")
    encode = tok.encode_template if parse_control else tok.encode
    spans = [(message["content"], is_trained_answer(message)) for message in messages]
    rendered = encode_spans(tok, encode, spans)
    if tok.adds_bos and rendered.ids[:1] != [tok.bos_id]:
        rendered = join([([cast(int, tok.bos_id)], False), *zip(([i] for i in rendered.ids), rendered.trained)])
    if ended and tok.eos_id is None:
        rendered.notes.append(NOTHING_ENDS)
    elif ended and tok.eos_id is not None and rendered.ids[-1:] and rendered.ids[-1] not in tok.stop_ids:
        rendered = Rendered([*rendered.ids, tok.eos_id], [*rendered.trained, spans[-1][1]])
    return rendered
