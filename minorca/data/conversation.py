"""A conversation: what a row of every format but text becomes, and what the templates write."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Conversation:
    """Messages, and the tools that the assistant may call.

    Attributes:
        messages: each {"role": "system" | "user" | "assistant" | "tool", "content": text}. An answer may have
            "weight": 0, which excludes it from the loss, and "tool_calls": [{"function": {"name", "arguments"}, "id"}]
            as in OpenAI's API; a tool's message may have "tool_call_id" and "name".
        tools: the tools' schemas, as in OpenAI's API.
    """

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)


@dataclass
class Preference:
    """Answers to one prompt, and how good they are.

    Attributes:
        answers: each with the prompt before it, a whole conversation in which only the answer is trained; one, if a
            label says whether it is desirable, else several.
        scores: of each; of two, the one with the higher score is preferred. A label is 1 or 0.
    """

    answers: list[Conversation]
    scores: list[float]


# What a row has.
Content = Conversation | Preference | str


def join_text_parts(parts: list) -> str:
    """The text of a message's content that is a list of parts, one a line, as OpenAI's API has it.

    Raises:
        ValueError: a part that is not {"type": "text", "text": ...}.
    """
    if not all(map(_is_text_part, parts)):
        raise ValueError('expected a string or a list of {"type": "text", "text": ...}')
    return "\n".join(part["text"] for part in parts)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def is_trained_answer(message: dict) -> bool:
    """Whether a message is an answer that counts in the loss."""
    return message["role"] == "assistant" and message.get("weight") != 0


def only_last_answer(messages: list[dict]) -> list[dict]:
    """The messages with a weight of 0 on every answer but the last; answers in a row are one."""
    roles = [message["role"] for message in messages]
    last = len(roles) - 1
    while last > 0 and not (roles[last] == "assistant" and roles[last - 1] != "assistant"):
        last -= 1
    return [m | {"weight": 0} if m["role"] == "assistant" and i < last else m for i, m in enumerate(messages)]


def drop_empty_answers(messages: list[dict]) -> tuple[list[dict], int]:
    """Drops the turns whose answer would be trained and is empty: from the user's message to before the next one.

    An answer is empty if it has no text but white space, and no tool calls. In a turn that has an answer with text,
    only the empty one is dropped.

    Returns:
        The messages that are left, and how many answers were empty.
    """
    empty = [is_trained_answer(m) and not m["content"].strip() and not m.get("tool_calls") for m in messages]
    if not any(empty):
        return messages, 0
    roles = [message["role"] for message in messages]
    # Consecutive messages of the user are one question; system messages belong to no turn.
    starts = [i for i, role in enumerate(roles) if role == "user" and (i == 0 or roles[i - 1] != "user")]
    kept = []
    for start, end in pairwise([0, *starts, len(messages)]):
        turn = list(zip(messages[start:end], empty[start:end]))
        is_answered = any(m["role"] == "assistant" and m["content"].strip() for m, _ in turn)
        keeps_all = is_answered or not any(empty[start:end])
        kept += [m for m, is_empty in turn if m["role"] == "system" or (keeps_all and not is_empty)]
    return kept, sum(empty)
