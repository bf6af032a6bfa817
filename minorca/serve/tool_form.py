"""How a model writes the calls of tools, learned from what its chat template writes of an answer that calls two."""

import re
from dataclasses import dataclass
from functools import lru_cache

from minorca.data.chat_template import render_chat, resolve_template
from minorca.data.tokenizer import Tokenizer
from minorca.data.visible_text import visible_text
from minorca.errors import UserError

_NAMES = ("first_tool", "second_tool")
_IDS = ("aaaaaaaa1", "aaaaaaaa2")
_TOOLS = [{"type": "function", "function": {"name": n, "description": n, "parameters": {}}} for n in _NAMES]
# What a call may begin with: <tool_call>, [TOOL_CALLS].
_TAG = re.compile(r"<[^<>/\s]+>|\[[A-Z_]+\]")


@dataclass(frozen=True)
class ToolForm:
    """The text of calls is `start` NAME `middle` ARGUMENTS (`between` NAME `middle` ARGUMENTS)* `end`, where arguments
    are JSON; control tokens are spelled out. Hermes' form, which many models share, is

        <tool_call>
        {"name": "NAME", "arguments": ARGUMENTS}
        </tool_call>

    Attributes:
        trigger: with which `start` begins: after it a call must follow.
    """

    trigger: str
    start: str
    middle: str
    between: str
    end: str


@lru_cache(maxsize=16)
def tool_form(tok: Tokenizer, template: str) -> ToolForm:
    """The form of calls under a chat template.

    Raises:
        UserError: the template writes no tools or no calls, or calls in a form that has no JSON or begins with no tag.
    """
    template = resolve_template(tok, template)
    user = [{"role": "user", "content": "question"}]
    try:
        prompt = visible_text(tok, render_chat(tok, user, template=template, tools=_TOOLS))
    except UserError:
        raise UserError(f"cannot be used: the model's template, {template}, writes no tools") from None
    if _NAMES[0] not in prompt:
        raise UserError(f"cannot be used: the model's template, {template}, writes no tools")
    # Some templates write ids where there are any, others need them.
    for ids in ((None, None), _IDS):
        try:
            written = visible_text(tok, render_chat(tok, [*user, _answer(ids)], False, template, tools=_TOOLS))
        except UserError:
            continue
        if form := _read_form(tok, written.removeprefix(prompt), ids):
            return form
    raise UserError(
        f"cannot be used: the model's template, {template}, writes calls in a form that is not supported; expected a "
        "tag or control token, and arguments in JSON"
    )


def _answer(ids: tuple[str | None, ...]) -> dict:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {f"{name}_key": 1}}} | ({"id": i} if i else {})
        for name, i in zip(_NAMES, ids)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _read_form(tok: Tokenizer, written: str, ids: tuple[str | None, ...]) -> ToolForm | None:
    for i in filter(None, ids):
        written = re.sub(rf',\s*"[a-z_]+":\s*"{i}"', "", written)
    parts = []
    at = 0
    for name in _NAMES:
        arguments = re.compile(rf'\{{\s*"{name}_key"\s*:\s*1\s*\}}').search(written, at)
        place = written.rfind(name, at, arguments.start()) if arguments else -1
        if arguments is None or place < 0:
            return None
        parts += [written[at:place], written[place + len(name) : arguments.start()]]
        at = arguments.end()
    end = written[at:]
    for stop in (name for name, i in tok.control_ids.items() if i in tok.stop_ids):
        end = end.partition(stop)[0]
    start, middle, between, middle_again = parts
    tags = [*_TAG.finditer(start)]
    if not tags or not middle or middle != middle_again or any(i and i in written for i in ids):
        return None
    return ToolForm(tags[-1][0], start[tags[-1].start() :], middle, between, end.rstrip())
