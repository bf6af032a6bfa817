"""The formats of a data set's rows: which columns each needs, and how a record becomes a conversation or plain text.

openorca            id (optional), system_prompt, question, response
sharegpt            conversations: messages; system, tools (both optional)
messages            messages; system, tools (both optional)
alpaca              instruction, input (optional; after the instruction and a blank line), output; system, history (both
                    optional; history: [question, answer] pairs, before the instruction; its answers are trained too)
prompt_completion   prompt, completion: both text, or both lists of messages or their JSON, of which the prompt's are
                    not trained
text                text, which is written as it is, without a template
preference          answers to compare (preference.py)

messages.py reads the messages. Other columns are counted and not used. `data.columns` maps a format's columns to those
of the data, `data.roles` the data's role names to ours.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from minorca.data.conversation import Content, Conversation
from minorca.data.messages import (
    add_system,
    check_text,
    messages_in,
    read_list,
    read_messages,
    read_text,
    read_tools,
    straighten_apostrophes,
    type_name,
)
from minorca.data.preference import LABELLED, LIST, OPTIONAL, PAIR, read_preference
from minorca.errors import UserError

# A record as its data set has it, further role names, counts.
Convert = Callable[[dict, Mapping[str, str], Counter], Content]
NOTHING: Mapping[str, str] = MappingProxyType({})


class RowFormat(NamedTuple):
    """A format: the function that converts a record and counts what it changed or ignored, and the columns it reads.

    `convert` raises a UserError whose `field` is the column, and the place in it, that is invalid. A record needs all
    columns of `needed`, or of one of `instead`.
    """

    convert: Convert
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    instead: tuple[tuple[str, ...], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it reads."""
        return self.needed + self.optional


def convert_record(
    record: dict,
    format: str,
    counts: Counter,
    columns: Mapping[str, str] = NOTHING,
    roles: Mapping[str, str] = NOTHING,
) -> Content:
    """A record (a row's values by column) as a conversation, answers to compare, or plain text.

    Args:
        counts: gets what is ignored or changed.
        columns: the format's names of columns, and those of the record.
        roles: the record's names of roles, and ours.

    Raises:
        UserError: a missing column or an invalid value; `field` names it.
    """
    row_format = FORMATS[format]
    check_columns(record, format, columns)
    sources = {name: columns.get(name, name) for name in row_format.columns} if columns else {}
    if unused := record.keys() - (sources.values() if columns else row_format.columns):
        counts.update(f"with the unused column {column}" for column in unused)
    if columns:
        record = {name: record[column] for name, column in sources.items() if column in record}
    try:
        return row_format.convert(record, roles, counts)
    except UserError as error:
        # A column and the place in it, or two of these.
        places = (error.field or "").split(" and ")
        error.field = " and ".join(re.sub(r"^[\w-]+", lambda name: columns.get(name[0], name[0]), at) for at in places)
        raise


def check_columns(record: dict, format: str, columns: Mapping[str, str] = NOTHING) -> None:
    """Raises UserError where a record lacks a column that its format needs."""
    row_format = FORMATS[format]
    sets = [[columns.get(name, name) for name in names] for names in (row_format.needed, *row_format.instead)]
    # Of which the record has the largest part.
    closest = min(sets, key=lambda names: sum(name not in record for name in names) / len(names))
    missing = [name for name in closest if name not in record]
    if missing:
        wanted = ", or ".join(", ".join(names) for names in sets)
        raise UserError(
            f"is missing; format {format} needs the columns {wanted}, "
            f"got {', '.join(map(str, record))}; fix the row, data.format or data.columns",
            field=f"column {missing[0]}",
        )


def _openorca(record: dict, roles: Mapping[str, str], counts: Counter) -> Conversation:
    system = straighten_apostrophes(read_text(record, "system_prompt"), counts)
    return _conversation(system, read_text(record, "question"), read_text(record, "response"))


def _sharegpt(record: dict, roles: Mapping[str, str], counts: Counter) -> Conversation:
    conversation = _chat(record, roles, counts, "conversations")
    for message in conversation.messages:
        if message["role"] == "system":
            message["content"] = straighten_apostrophes(message["content"], counts)
    return conversation


def _chat(record: dict, roles: Mapping[str, str], counts: Counter, column: str = "messages") -> Conversation:
    messages = read_messages(record, column, roles, counts)
    if not messages:
        raise UserError("is empty; expected at least one message", field=column)
    return Conversation(add_system(record, messages, column), read_tools(record))


def _alpaca(record: dict, roles: Mapping[str, str], counts: Counter) -> Conversation:
    # Some copies of Alpaca write it for an empty input.
    counts["with the input <noinput>, read as text"] += record.get("input") == "<noinput>"
    question = "\n\n".join(filter(None, [read_text(record, "instruction"), read_text(record, "input")]))
    texts = []
    expected = "a list of [question, answer]"
    history = record.get("history")
    # A CSV file has an empty cell for none.
    for i, pair in enumerate(read_list(history, "history", expected) if history not in (None, "") else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"is not a list of two; expected {expected}", field=f"history[{i}]")
        texts += [check_text("" if text is None else text, f"history[{i}]") for text in pair]
    return _conversation(read_text(record, "system"), *texts, question, read_text(record, "output"))


def _prompt_completion(record: dict, roles: Mapping[str, str], counts: Counter) -> Conversation:
    columns = ("prompt", "completion")
    lists = {column: messages for column in columns if (messages := messages_in(record[column])) is not None}
    if not lists:
        return _conversation("", read_text(record, "prompt"), read_text(record, "completion"))
    if len(lists) < 2:
        types = " and ".join(type_name(lists.get(column, record[column])) for column in columns)
        raise UserError(f"are {types}; expected both text or both lists of messages", field="prompt and completion")
    prompt, completion = (read_messages(lists, column, roles, counts) for column in columns)
    excluded = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    return Conversation(excluded + completion, read_tools(record))


def _plain_text(record: dict, roles: Mapping[str, str], counts: Counter) -> str:
    return read_text(record, "text")


FORMATS = {
    "openorca": RowFormat(_openorca, ("system_prompt", "question", "response"), ("id",)),
    "sharegpt": RowFormat(_sharegpt, ("conversations",), ("system", "tools")),
    "messages": RowFormat(_chat, ("messages",), ("system", "tools")),
    "alpaca": RowFormat(_alpaca, ("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": RowFormat(_prompt_completion, ("prompt", "completion"), ("tools",)),
    "text": RowFormat(_plain_text, ("text",)),
    "preference": RowFormat(read_preference, PAIR, OPTIONAL, (LIST, LABELLED)),
}


def _conversation(system: str, *texts: str) -> Conversation:
    """Questions and answers in turn, after the system prompt, if it is not empty."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)
