"""The formats of a data set's rows: which columns each needs, and how a record becomes a conversation or plain text.

openorca            id (optional), system_prompt, question, response; other columns are counted and not used
sharegpt            conversations: [{from: system | human | user | gpt | assistant | chatgpt, value, weight (optional)}]
messages            messages: [{role: system | user | assistant, content, weight (optional)}]
alpaca              instruction, input (optional; after the instruction and a blank line), output, system (optional)
prompt_completion   prompt, completion: both text, or both lists of messages, of which the prompt's are not trained
text                text, which is written as it is, without a template

A message's weight is 0 or 1; an answer of weight 0 is excluded from the loss. On other messages it has no effect: under
`data.train_on: response` only answers are trained, and under `all` everything is.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from minorca.data.conversation import Conversation
from minorca.errors import UserError

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


class RowFormat(NamedTuple):
    """A format: the function that converts a record and counts what it changed or ignored, and the columns it reads.

    `convert` raises a UserError whose `field` is the column, and the place in it, that is invalid.
    """

    convert: Callable[[dict, Counter], Conversation | str]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


def convert_record(record: dict, format: str, counts: Counter) -> Conversation | str:
    """A record (a row's values by column) as a conversation or plain text; `counts` gets what is ignored or changed.

    Raises:
        UserError: a missing column or an invalid value; `field` names it.
    """
    row_format = FORMATS[format]
    for column in row_format.needed:
        if column not in record:
            raise UserError(
                f"is missing; format {format} needs the columns {', '.join(row_format.needed)}, "
                f"got {', '.join(map(str, record))}; fix the row or data.format",
                field=f"column {column}",
            )
    used = (*row_format.needed, *row_format.optional)
    counts.update(f"with the unused column {column}" for column in record if column not in used)
    return row_format.convert(record, counts)


def _openorca(record: dict, counts: Counter) -> Conversation:
    system = _straighten_apostrophes(_text(record, "system_prompt"), counts)
    return _conversation(system, _text(record, "question"), _text(record, "response"))


def _sharegpt(record: dict, counts: Counter) -> Conversation:
    messages = _messages(record, "conversations", "from", "value", SHAREGPT_ROLES, counts)
    for message in messages:
        if message["role"] == "system":
            message["content"] = _straighten_apostrophes(message["content"], counts)
    return Conversation(messages)


def _chat(record: dict, counts: Counter) -> Conversation:
    return Conversation(_messages(record, "messages", "role", "content", ROLES, counts))


def _alpaca(record: dict, counts: Counter) -> Conversation:
    question = "\n\n".join(filter(None, [_text(record, "instruction"), _text(record, "input")]))
    return _conversation(_text(record, "system"), question, _text(record, "output"))


def _prompt_completion(record: dict, counts: Counter) -> Conversation:
    columns = ("prompt", "completion")
    are_lists = [isinstance(record[column], list) for column in columns]
    if not any(are_lists):
        return _conversation("", _text(record, "prompt"), _text(record, "completion"))
    if not all(are_lists):
        types = " and ".join(type_name(record[column]) for column in columns)
        raise UserError(f"are {types}; expected both text or both lists of messages", field="prompt and completion")
    prompt, completion = (_messages(record, column, "role", "content", ROLES, counts) for column in columns)
    excluded = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    return Conversation(excluded + completion)


def _plain_text(record: dict, counts: Counter) -> str:
    return _text(record, "text")


FORMATS = {
    "openorca": RowFormat(_openorca, ("system_prompt", "question", "response"), ("id",)),
    "sharegpt": RowFormat(_sharegpt, ("conversations",)),
    "messages": RowFormat(_chat, ("messages",)),
    "alpaca": RowFormat(_alpaca, ("instruction", "output"), ("input", "system")),
    "prompt_completion": RowFormat(_prompt_completion, ("prompt", "completion")),
    "text": RowFormat(_plain_text, ("text",)),
}


def _conversation(system: str, question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


def _messages(
    record: dict, column: str, role_key: str, text_key: str, roles: dict[str, str], counts: Counter
) -> list[dict]:
    """The messages in a column. `roles` maps the names that the format knows to ours."""
    turns = record[column]
    expected = f"{{{role_key}, {text_key}}}"
    if not isinstance(turns, list):
        hint = "; a CSV cell cannot hold a list: use JSONL or parquet" if isinstance(turns, str) else ""
        raise UserError(f"is {type_name(turns)}; expected a list of {expected}{hint}", field=column)
    messages = []
    for i, turn in enumerate(turns):
        place = f"{column}[{i}]"
        if not isinstance(turn, dict):
            raise UserError(f"is {type_name(turn)}; expected {expected}", field=place)
        if not {role_key, text_key} <= turn.keys():
            raise UserError(f"has {', '.join(map(str, turn)) or 'no keys'}; expected {expected}", field=place)
        role = turn[role_key]
        weight = turn.get("weight")
        if not isinstance(role, str) or role not in roles:
            raise UserError(f"is {role!r:.60}; expected one of {', '.join(roles)}", field=f"{place}.{role_key}")
        if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
            raise UserError(f"is {weight!r:.60}; expected 0 or 1", field=f"{place}.weight")
        message: dict = {"role": roles[role], "content": _check_text(turn[text_key], f"{place}.{text_key}")}
        if weight == 0 and message["role"] == "assistant":
            message["weight"] = 0
        messages.append(message)
        unused = [key for key, value in turn.items() if key not in (role_key, text_key, "weight") and value is not None]
        counts.update(f"messages with the unused key {key}" for key in unused)
    return messages


def _text(record: dict, column: str) -> str:
    """A column's text; empty where the column is missing or null."""
    value = record.get(column)
    return "" if value is None else _check_text(value, column)


def _check_text(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"is {type_name(text)}; expected text", field=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Readers pass invalid bytes on as surrogates, and JSON can spell one.
        raise UserError("is not valid UTF-8 or has an unpaired surrogate; fix or remove the row", field=field) from None
    return text


def _straighten_apostrophes(system: str, counts: Counter) -> str:
    """OpenOrca and data sets derived from it have their sixteen system prompts in both spellings."""
    counts["system prompts with ’ read as '"] += "’" in system
    return system.replace("’", "'")


def type_name(value: Any) -> str:
    """A value's type for a message: `null` and `text` as JSON calls them, else Python's name."""
    if value is None:
        return "null"
    return "text" if isinstance(value, str) else type(value).__name__
