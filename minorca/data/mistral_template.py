"""Mistral's instruction formats v1, v2 and v3, with the ids of mistral-common (tokens/tokenizers/instruct.py).

v1  `[INST] content [/INST]answer</s>` in text, the system prompt before the first user message
v2  [INST] and [/INST] are control tokens, the system prompt before the last user message; tools
v3  the same, with the ids of tool calls, and with the calls of all turns instead of those after the last user message

Messages are put in order as mistral-common does (protocol/instruct/normalize.py and validator.py): system prompts are
joined, messages in a row with the same role too, and a conversation that starts with another message than the user's
gets an empty one in front. What mistral-common rejects is an error here.
"""

import json
import re
from itertools import groupby
from typing import cast

from minorca.data.conversation import is_trained_answer
from minorca.data.rendered import Pieces
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError

# What may come after what.
FOLLOWERS = {
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "system", "user"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("assistant", "tool", "user"),
}
# Of a v3 tool call.
CALL_ID = re.compile("[a-zA-Z0-9]{9}")


def render_mistral(
    tok: Tokenizer, messages: list[dict], version: int, tools: list[dict], continue_final_message: bool
) -> Pieces:
    """The pieces of a conversation in format `version`. There is no generation prompt: a user message's end is one.

    Raises:
        UserError: messages in an order, or tools in a form, that this format does not have.
    """
    _check_order(messages)
    if version == 1 and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
        raise UserError("has tools, which mistral-v1 cannot write; set data.template to another", field="messages")
    system, turns = _normalize(messages)
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    # The turn that carries the system prompt.
    carrier = users[0] if version == 1 else users[-1]
    # `resolve_template` has checked that there are both.
    bos_id = cast(int, tok.bos_id)
    eos_id = cast(int, tok.eos_id)
    pieces: Pieces = [([bos_id], False)]
    for i, turn in enumerate(turns):
        if turn["role"] == "user":
            if tools and i == users[-1]:
                pieces.append((_enclosed(tok, "AVAILABLE_TOOLS", [_schema(tool) for tool in tools]), False))
            content = f"{system}\n\n{turn['content']}" if system and i == carrier else turn["content"]
            pieces.append((_question(tok, content, version), False))
        elif version == 2 and i < users[-1] and (turn["role"] == "tool" or turn.get("tool_calls")):
            # Only the calls of the last turn are written.
            continue
        elif version == 2 and turn["role"] == turns[i - 1]["role"] == "tool":
            raise UserError("has several tool results in a row, which mistral-v2 cannot write", field="messages")
        elif turn["role"] == "tool":
            pieces.append((_enclosed(tok, "TOOL_RESULTS", _result(turn, version)), False))
        else:
            is_continued = continue_final_message and i == len(turns) - 1
            end = [] if is_continued else [eos_id]
            pieces.append(([*_answer(tok, turn, version, i == len(turns) - 1), *end], is_trained_answer(turn)))
    return pieces


def omits_calls(messages: list[dict], version: int) -> bool:
    """Whether the format leaves out tool calls or results of these messages."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    earlier = messages[: users[-1]] if users else []
    return version == 2 and any(m["role"] == "tool" or m.get("tool_calls") for m in earlier)


def _check_order(messages: list[dict]) -> None:
    def refuse(i: int, message: str) -> None:
        raise UserError(f"{message}; join, move or drop messages", field=f"messages[{i}].role")

    unanswered = 0
    for i, message in enumerate(messages):
        role = message["role"]
        if i and role not in FOLLOWERS[messages[i - 1]["role"]]:
            expected = ", ".join(FOLLOWERS[messages[i - 1]["role"]])
            refuse(i, f"is {role!r} after {messages[i - 1]['role']!r}; Mistral's templates take {expected} there")
        if not i:
            if len(messages) == 1 and role in ("assistant", "tool"):
                refuse(i, f"is {role!r}; Mistral's templates do not take it alone")
            # mistral-common counts from the second message on.
            continue
        if role == "tool":
            unanswered -= 1
        elif role == "assistant":
            if unanswered:
                refuse(i, "follows tool calls and results that differ in number")
            unanswered = len(message.get("tool_calls") or ())


def _normalize(messages: list[dict]) -> tuple[str, list[dict]]:
    """The system prompt, and all other messages, joined where they follow each other with the same role and weight."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
    turns = []
    for (role, _), group in groupby(messages, key=lambda m: (m["role"], m.get("weight"))):
        if role == "tool":
            turns += group
        elif role != "system":
            turns.append(_join(list(group)))
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": ""})
    return system, turns


def _join(messages: list[dict]) -> dict:
    if len(messages) == 1:
        return messages[0]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    joined = {**messages[0], "content": "\n\n".join(m["content"] for m in messages if m["content"])}
    return joined | {"tool_calls": calls} if calls else joined


def _question(tok: Tokenizer, content: str, version: int) -> list[int]:
    if version == 1:
        return tok.encode(f"[INST] {content} [/INST]")
    return _enclosed(tok, "INST", content)


def _enclosed(tok: Tokenizer, name: str, value) -> list[int]:
    """`value`, as JSON unless it is text, between the control tokens [name] and [/name]."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [_control(tok, f"[{name}]"), *tok.encode(text), _control(tok, f"[/{name}]")]


def _control(tok: Tokenizer, token: str) -> int:
    if token not in tok.control_ids:
        raise UserError(f"has no control token {token}, which tools need; use a model made for tools", path=tok.path)
    return tok.control_ids[token]


def _answer(tok: Tokenizer, turn: dict, version: int, is_last: bool) -> list[int]:
    content = turn["content"]
    if calls := turn.get("tool_calls"):
        if content:
            raise UserError(
                "has content beside tool calls, which Mistral's templates cannot write; drop one of them",
                field="messages",
            )
        written = [_call(call, version, is_last) for call in calls]
        return [_control(tok, "[TOOL_CALLS]"), *tok.encode(json.dumps(written, ensure_ascii=False))]
    return tok.encode(content if version == 1 else content.rstrip(" "))


def _call(call: dict, version: int, is_last: bool) -> dict:
    function = call["function"]
    written = {"name": function["name"], "arguments": _parsed(function.get("arguments"))}
    call_id = call.get("id")
    if version == 2 or (call_id in (None, "null") and is_last):
        return written
    return written | {"id": _checked_id(call_id)}


def _result(message: dict, version: int):
    content = _parsed(message["content"])
    if version == 2:
        return [{"name": message.get("name"), "content": content}]
    return {"content": content, "call_id": _checked_id(message.get("tool_call_id"))}


def _checked_id(call_id) -> str:
    if not isinstance(call_id, str) or not CALL_ID.fullmatch(call_id):
        given = "a tool call or result without an id" if call_id is None else f"the tool call id {call_id!r:.60}"
        raise UserError(
            f"has {given}; mistral-v3 needs nine letters and digits: give each call and its result such an id",
            field="messages",
        )
    return call_id


def _parsed(value):
    """The value of JSON text, {} for none; other text and values as they are."""
    if value is None or value == "":
        return {}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _schema(tool: dict) -> dict:
    """A tool as mistral-common writes it: only these keys, in this order."""
    function = dict(tool.get("function") or {})
    name = function.pop("name", None)
    schema = {"name": name, "description": function.pop("description", None) or ""}
    schema["parameters"] = function.pop("parameters", None) or {}
    function.pop("strict", None)
    if not isinstance(name, str) or function:
        raise UserError(
            f"has a tool with {', '.join(map(repr, function)) or 'no name'}; Mistral's templates write name, "
            "description and parameters of a function",
            field="tools",
        )
    return {"type": "function", "function": schema}
