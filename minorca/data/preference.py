"""The columns of format preference to answers and their scores. What a record is, its columns say:

chosen, rejected    a pair of answers to `prompt`, `question` or `instruction`; or a pair of whole conversations, which
                    answer where they first differ, with a prompt or without. Beside them may be the scores of both
                    (SCORES) or a `status`; equal scores, or the status tie, make a tie
completions         scored answers to `prompt`, `question` or `instruction`: a list of {response, text or content;
                    overall_score, score or rating}
completion, label   an answer to `prompt`, `question` or `instruction` that is desirable (true, 1) or not (false, 0)

A prompt and an answer is text, a message, or a list of messages or its JSON; `system` and `tools` belong to the prompt.
"""

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minorca.data.conversation import Conversation, Preference
from minorca.data.messages import (
    add_system,
    check_text,
    messages_in,
    read_list,
    read_messages,
    read_tools,
    straighten_apostrophes,
    type_name,
)
from minorca.errors import UserError
from minorca.files.safe_io import quote

PROMPTS = ("prompt", "question", "instruction")
PAIR = ("chosen", "rejected")
LIST = ("completions",)
LABELLED = ("completion", "label")
SCORES = tuple(
    (name.format("chosen"), name.format("rejected")) for name in ("{}_score", "score_{}", "{}_rating", "{}-rating")
)
# All that the format reads besides PAIR.
OPTIONAL = (
    *PROMPTS,
    *LIST,
    *LABELLED,
    "system",
    "tools",
    "status",
    *(name for names in SCORES for name in names),
)
# The keys of an answer in a list, of which one has its text and one its score.
TEXT_KEYS = ("response", "text", "content")
SCORE_KEYS = ("overall_score", "score", "rating")
COMPLETION = "{response, text or content; overall_score, score or rating}"
# Within fp32.
LARGEST_SCORE = 3e38


def read_preference(record: dict, roles: Mapping[str, str], counts: Counter) -> Preference:
    """A record's answers, each after its prompt, in which nothing is trained.

    Raises:
        UserError: an invalid value, or columns that contradict each other.
    """
    prompt = _read_prompt(record, roles, counts)
    kind = _kind(record, counts)
    if kind == PAIR:
        prompt, answers = _read_pair(record, prompt, roles, counts)
        names, scores = PAIR, [0.0, 0.0] if _is_tie(record) else [1.0, 0.0]
    elif kind == LIST:
        names, answers, scores = _read_completions(record, roles, counts)
    else:
        names, scores = LABELLED[:1], [_read_label(record["label"])]
        answers = [_read(record["completion"], "completion", "assistant", roles, counts)]
    if not prompt:
        message = f"is missing; expected one of {', '.join(PROMPTS)}, or whole conversations in chosen and rejected"
        raise UserError(message, field="column prompt")
    for name, answer in zip(names, answers, strict=True):
        _check_answer(answer, name)
    prompt = add_system(record, [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt], "the prompt")
    if {"system", "question"} <= record.keys():
        # orca_dpo_pairs, whose system prompts are OpenOrca's
        for message in prompt:
            if message["role"] == "system":
                message["content"] = straighten_apostrophes(message["content"], counts)
    tools = read_tools(record)
    return Preference([Conversation([*prompt, *answer], tools) for answer in answers], scores)


def _kind(record: dict, counts: Counter) -> tuple[str, ...]:
    """The columns that have the answers: PAIR, LIST or LABELLED. In a table of several kinds, others are null."""
    present = [columns for columns in (PAIR, LIST, LABELLED) if set(columns) <= record.keys()]
    filled = [columns for columns in present if all(record[name] is not None for name in columns)]
    for columns in filled[1:]:
        counts[f"with {' and '.join(columns)} beside {' and '.join(filled[0])}, not used"] += 1
    return (filled or present)[0]


def _read(value: Any, place: str, role: str, roles: Mapping[str, str], counts: Counter) -> list[dict]:
    """Messages, or the one of this role that a text is."""
    # LLaMA-Factory has answers as single messages.
    messages = [value] if isinstance(value, dict) else messages_in(value)
    if messages is None and value is not None and not isinstance(value, str):
        raise UserError(f"is {type_name(value)}; expected text or a list of messages", field=place)
    if messages is None:
        return [{"role": role, "content": "" if value is None else check_text(value, place)}]
    read = read_messages({place: messages}, place, roles, counts)
    if not read:
        raise UserError("is empty; expected at least one message", field=place)
    return read


def _read_prompt(record: dict, roles: Mapping[str, str], counts: Counter) -> list[dict]:
    """The prompt's messages; none where no column has a prompt."""
    given = [name for name in PROMPTS if record.get(name) is not None]
    if not given:
        return []
    if any(record[name] != record[given[0]] for name in given):
        message = (
            "differ, and each may be the prompt; say which in data.columns, as {" + f"{given[1]}: {given[0]}" + "}"
        )
        raise UserError(message, field=" and ".join(given))
    return _read(record[given[0]], given[0], "user", roles, counts)


def _check_answer(answer: list[dict], place: str) -> None:
    if answer[0]["role"] in ("system", "user"):
        raise UserError(f"begins with a message from {answer[0]['role']}; expected an answer", field=place)
    if all(message["role"] != "assistant" for message in answer):
        raise UserError("has no message from assistant; expected an answer", field=place)


# --------------------------------------------------------------------------------------------------------------- pairs


def _read_pair(
    record: dict, prompt: list[dict], roles: Mapping[str, str], counts: Counter
) -> tuple[list[dict], list[list[dict]]]:
    """The prompt of a pair, which whole conversations contain, and the two answers."""
    chosen, rejected = (_read(record[name], name, "assistant", roles, counts) for name in PAIR)
    whole = [messages[0]["role"] in ("system", "user") for messages in (chosen, rejected)]
    if not any(whole):
        return prompt, [chosen, rejected]
    both = " and ".join(PAIR)
    if not all(whole):
        raise UserError("are a whole conversation and an answer; expected the same of both", field=both)
    start = _first_difference(chosen, rejected)
    shared = _texts(chosen[:start])
    if any(messages[start]["role"] != "assistant" for messages in (chosen, rejected)):
        message = f"differ in message {start}, which is no answer; expected two answers to one prompt"
        raise UserError(message, field=both)
    if prompt and not any(shared[i : i + len(prompt)] == _texts(prompt) for i in range(start)):
        raise UserError(f"do not begin with the prompt, {quote(prompt[-1]['content'])}", field=both)
    return chosen[:start], [chosen[start:], rejected[start:]]


def _first_difference(a: list[dict], b: list[dict]) -> int:
    """The first message in which two conversations differ, at most the last answer of either."""
    last = min(_last_answer(a, PAIR[0]), _last_answer(b, PAIR[1]))
    return next((i for i in range(last) if _without_weight(a[i]) != _without_weight(b[i])), last)


def _last_answer(messages: list[dict], place: str) -> int:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError("has no message from assistant; expected an answer", field=place)
    return answers[-1]


def _without_weight(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "weight"}


def _texts(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _is_tie(record: dict) -> bool:
    """Whether scores or a status say that neither answer is better.

    Raises:
        UserError: a score that is no number, or a rejected answer with a higher score than the chosen one.
    """
    tie = record.get("status") == "tie"
    for names in SCORES:
        if any(record.get(name) in (None, "") for name in names):
            continue
        chosen, rejected = (_read_score(record[name], name) for name in names)
        if chosen < rejected:
            message = (
                f"are {chosen:g} and {rejected:g}, so the rejected answer is the better one; fix or remove the row"
            )
            raise UserError(message, field=" and ".join(names))
        tie = tie or chosen == rejected
    return tie


# ------------------------------------------------------------------------------------------------- scores and labels


def _read_completions(
    record: dict, roles: Mapping[str, str], counts: Counter
) -> tuple[Sequence[str], list[list[dict]], list[float]]:
    """The place of each answer of a list, the answers and their scores."""
    completions = read_list(record["completions"], "completions", f"a list of {COMPLETION}")
    if len(completions) < 2:
        raise UserError(f"has {len(completions)} of them; expected at least two to compare", field="completions")
    places, answers, scores = [], [], []
    for i, completion in enumerate(completions):
        place = f"completions[{i}]"
        if not isinstance(completion, dict):
            raise UserError(f"is {type_name(completion)}; expected {COMPLETION}", field=place)
        # Arrow adds every key that any of them has.
        given = {key: value for key, value in completion.items() if value is not None}
        text, score = (next((key for key in keys if key in given), None) for keys in (TEXT_KEYS, SCORE_KEYS))
        if text is None or score is None:
            raise UserError(f"has {', '.join(map(str, given)) or 'no keys'}; expected {COMPLETION}", field=place)
        counts.update(f"completions with the unused key {key}" for key in given if key not in (text, score))
        places.append(f"{place}.{text}")
        answers.append(_read(given[text], places[-1], "assistant", roles, counts))
        scores.append(_read_score(given[score], f"{place}.{score}"))
    return places, answers, scores


def _read_score(value: Any, place: str) -> float:
    """A number that fp32 holds, or the text of one, as a CSV file has it."""
    try:
        score = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not abs(score) <= LARGEST_SCORE:
        raise UserError(f"is {quote(value)}; expected a number", field=place)
    # in fp32, as a store has it
    return struct.unpack("f", struct.pack("f", score))[0]


def _read_label(value: Any) -> float:
    text = value.strip().lower() if isinstance(value, str) else value
    for label, texts in enumerate((("false", "0", "0.0"), ("true", "1", "1.0"))):
        # a boolean equals 0 or 1
        if text in texts or (isinstance(text, (bool, int, float)) and text == label):
            return float(label)
    raise UserError(f"is {quote(value)}; expected true or false, or 1 or 0", field="label")
