"""The messages in a column of a row, whichever keys and role names its tool gave them.

A message is {role, content} or {from, value}. Its content is text or a list of text parts; an answer's may be null or
missing, which are the same as empty. `function_call` turns (LLaMA-Factory) become answers with tool calls.

Answers are excluded from the loss by these keys, which have no effect on other messages: under
`data.train_on: response` only answers are trained, and under `all` everything is.

weight          0 or 1 (OpenAI, mistral-finetune)
loss_weight     0 or 1 (LLaMA-Factory)
train, training true or false, or 1 or 0 (axolotl)
loss            the same (ms-swift)
masked          the opposite (torchtune)
mask            true or false, the opposite; a number is an error, since tools mean either by it
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from minorca.data.conversation import join_text_parts
from minorca.errors import UserError
from minorca.files.safe_io import parse_json, quote

KEYS = (("role", "content"), ("from", "value"))
EXPECTED = "expected {role, content} or {from, value}"
# The names of roles, and ours. A call's content is JSON, and its role becomes assistant.
CALL = "call"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
OUR_ROLES = ("system", "user", "assistant", "tool")
# The keys that say whether an answer is trained, and the values that exclude it; a boolean equals 0 or 1.
EXCLUDED_BY = {"weight": 0, "loss_weight": 0, "train": 0, "training": 0, "loss": 0, "masked": 1, "mask": 1}
# Those whose values are numbers alone.
NUMBERS = ("weight", "loss_weight")


def read_messages(record: dict, column: str, roles: Mapping[str, str], counts: Counter) -> list[dict]:
    """The messages in a column, as a Conversation has them.

    Args:
        roles: further names of roles, and ours.
        counts: gets the keys that are not used.

    Raises:
        UserError: a value that is invalid; `field` is its place in the column.
    """
    known = ROLES | dict(roles) if roles else ROLES
    turns = read_list(record[column], column, "a list of {role, content}")
    return [_read_message(turn, f"{column}[{i}]", known, counts) for i, turn in enumerate(turns)]


def _read_message(turn: Any, place: str, roles: dict[str, str], counts: Counter) -> dict:
    if not isinstance(turn, dict):
        raise UserError(f"is {type_name(turn)}; {EXPECTED}", field=place)
    role_key, text_key = next((keys for keys in KEYS if keys[0] in turn), KEYS[0])
    if role_key not in turn:
        raise _other_keys(turn, place)
    name = turn[role_key]
    if not isinstance(name, str) or name not in roles:
        known = ", ".join(roles)
        raise UserError(
            f"is {quote(name)}; expected one of {known}, or name it in data.roles", field=f"{place}.{role_key}"
        )
    role = roles[name]
    # An answer's may be missing: Arrow's readers leave null values out.
    if text_key not in turn and (role != "assistant" or any(key in turn for _, key in KEYS)):
        raise _other_keys(turn, place)
    calls = _read_calls(turn, place)
    used = {role_key, text_key, *EXCLUDED_BY}
    content = turn.get(text_key)
    if role == CALL:
        calls = _parse_calls(content, f"{place}.{text_key}")
        role, content = "assistant", None
    message: dict = {"role": role, "content": _read_content(content, role, f"{place}.{text_key}")}
    if role == "assistant":
        used |= {"tool_calls", "function_call"}
        if calls:
            message["tool_calls"] = calls
        if _is_excluded(turn, place):
            message["weight"] = 0
    elif any(turn.get(key) in (1, True) for key in ("train", "training", "loss")):
        counts["messages marked as trained, of roles that are not"] += 1
    if role == "tool":
        used |= {"tool_call_id", "name"}
        message |= {key: read_text(turn, key, place) for key in ("tool_call_id", "name") if turn.get(key) is not None}
    unused = [key for key, value in turn.items() if key not in used and value not in (None, [])]
    counts.update(f"messages with the unused key {key}" for key in unused)
    return message


def add_system(record: dict, messages: list[dict], place: str) -> list[dict]:
    """The messages after the system prompt in the column `system`, if there is one that they lack.

    Raises:
        UserError: they have another.
    """
    system = {"role": "system", "content": read_text(record, "system")}
    if not system["content"] or system in messages:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise UserError(f"differs from the system message in {place}; remove one", field="system")
    return [system, *messages]


def straighten_apostrophes(system: str, counts: Counter) -> str:
    """OpenOrca and data sets derived from it have their sixteen system prompts in both spellings."""
    counts["system prompts with ’ read as '"] += "’" in system
    return system.replace("’", "'")


def messages_in(value: Any) -> list | None:
    """A list, or the list of messages that a text is the JSON of; other text only looks like one and stays text."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else None
    if not value.lstrip().startswith("["):
        return None
    try:
        messages = parse_json(value)
    except (ValueError, RecursionError):
        return None
    return messages if messages and all(map(_has_message_keys, messages)) else None


def _has_message_keys(value: Any) -> bool:
    """Whether a value has a message's role and its content or calls."""
    return isinstance(value, dict) and any(keys <= value.keys() for keys in (*map(set, KEYS), {"role", "tool_calls"}))


def _other_keys(turn: dict, place: str) -> UserError:
    return UserError(f"has {', '.join(map(str, turn)) or 'no keys'}; {EXPECTED}", field=place)


def _read_content(content: Any, role: str, field: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list):
        # Arrow adds every key that any part has.
        parts = [
            {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in content
        ]
        try:
            content = join_text_parts(parts)
        except ValueError as error:
            raise UserError(f"is a list; {error}", field=field) from None
    return check_text(content, field)


def _is_excluded(turn: dict, place: str) -> bool:
    """Whether an answer is excluded from the loss.

    Raises:
        UserError: a value of another kind, or keys that contradict each other.
    """
    if type(turn.get("mask")) in (int, float):
        raise UserError(
            "is a number, which excludes an answer in some tools and trains it in others; expected true (excluded) or "
            "false",
            field=f"{place}.mask",
        )
    excluded: dict[str, bool] = {}
    for key, excluding in EXCLUDED_BY.items():
        value = turn.get(key)
        if value is None:
            continue
        if key in NUMBERS and (type(value) not in (int, float) or value not in (0, 1)):
            raise UserError(f"is {quote(value)}; expected 0 or 1", field=f"{place}.{key}")
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise UserError(f"is {quote(value)}; expected true or false", field=f"{place}.{key}")
        excluded[key] = value == excluding
    if len(set(excluded.values())) > 1:
        raise UserError(f"contradict each other in {place}; keep one", field=" and ".join(excluded))
    return any(excluded.values())


# --------------------------------------------------------------------------------------------------------------- tools


def read_tools(record: dict) -> list[dict]:
    """The tools' schemas in the column `tools`, a list or its JSON text; a bare function is wrapped as in OpenAI's API.

    Raises:
        UserError: something else.
    """
    tools = record.get("tools")
    # LLaMA-Factory writes an empty text where there are none.
    if tools is None or tools == "":
        return []
    schemas = []
    for i, tool in enumerate(read_list(tools, "tools", "a list of the tools' schemas")):
        if isinstance(tool, dict) and "name" in tool and "function" not in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not _has_name(tool.get("function")):
            expected = 'expected {"type": "function", "function": {"name": ...}}'
            raise UserError(f"is {quote(tool)}; {expected}", field=f"tools[{i}]")
        schemas.append(tool)
    return schemas


def _read_calls(turn: dict, place: str) -> list[dict]:
    """The calls of an answer in OpenAI's form, today's and, as `function_call`, the former."""
    calls = turn.get("tool_calls")
    former = turn.get("function_call")
    calls = [] if calls is None or calls == "" else read_list(calls, f"{place}.tool_calls", "a list of calls")
    if former and calls:
        raise UserError("are both given; keep one", field=f"{place}.tool_calls and {place}.function_call")
    if former:
        return _parse_calls(former, f"{place}.function_call")
    for i, call in enumerate(calls):
        if not isinstance(call, dict) or not _has_name(call.get("function")):
            expected = 'expected {"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise UserError(f"is {quote(call)}; {expected}", field=f"{place}.tool_calls[{i}]")
    return calls


def _parse_calls(content: Any, field: str) -> list[dict]:
    """Calls that are written as {"name": ..., "arguments": ...} or a list of these, in JSON text or not."""
    expected = '{"name": ..., "arguments": ...} in JSON, or a list of these'
    if isinstance(content, str):
        content = _parse(content, field, expected)
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(map(_has_name, calls)):
        raise UserError(f"is {quote(content)}; expected {expected}", field=field)
    return [{"type": "function", "function": call} for call in calls]


def _has_name(function: Any) -> bool:
    return isinstance(function, dict) and isinstance(function.get("name"), str)


# -------------------------------------------------------------------------------------------------------------- values


def read_list(value: Any, field: str, expected: str) -> list:
    """A list, or the list that a text is the JSON of: a cell of a CSV file holds no other."""
    if isinstance(value, str):
        value = _parse(value, field, expected)
    if not isinstance(value, list):
        raise UserError(f"is {type_name(value)}; expected {expected}, or its JSON", field=field)
    return value


def _parse(text: str, field: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is text that is not JSON ({error}); expected {expected}", field=field) from None


def read_text(record: dict, column: str, place: str = "") -> str:
    """A column's text; empty where the column is missing or null."""
    value = record.get(column)
    return "" if value is None else check_text(value, f"{place}.{column}" if place else column)


def check_text(text: Any, field: str) -> str:
    """The text, if it is valid Unicode.

    Raises:
        UserError: it is not, or is no text.
    """
    if not isinstance(text, str):
        raise UserError(f"is {type_name(text)}; expected text", field=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Readers pass invalid bytes on as surrogates, and JSON can spell one.
        raise UserError("is not valid UTF-8 or has an unpaired surrogate; fix or remove the row", field=field) from None
    return text


def type_name(value: Any) -> str:
    """A value's type for a message: `null` and `text` as JSON calls them, else Python's name."""
    if value is None:
        return "null"
    return "text" if isinstance(value, str) else type(value).__name__
