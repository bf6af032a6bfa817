"""Which answers are trained: weights in many spellings, empty answers, and orders that only some templates have."""

import json

from tests.corpus import files
from tests.corpus.case import MESSAGES, Case, Chat, assistant, at, system, tool, user

LINE = "rows.jsonl, line"
CHAT = [user("1?"), assistant("a"), user("2?"), assistant("b")]
EVERY = Chat(CHAT)
SECOND = Chat(CHAT, excluded=(1,))


def marked(first: dict, second: dict) -> dict:
    """CHAT, with keys added to each answer."""
    return {"messages": [CHAT[0], CHAT[1] | first, CHAT[2], CHAT[3] | second]}


def excluding(key: str, excluded, trained) -> Case:
    records = [marked({key: excluded}, {key: trained}), marked({key: excluded}, {}), marked({}, {key: trained})]
    return Case(f"weights: {key}", {"rows.jsonl": files.jsonl(*records)}, MESSAGES, at(LINE, SECOND, SECOND, EVERY))


WEIGHTS = [
    excluding("weight", 0, 1),
    excluding("loss_weight", 0.0, 1.0),
    excluding("train", False, True),
    excluding("training", 0, 1),
    excluding("loss", False, True),
    excluding("masked", True, False),
    excluding("mask", True, False),
    Case(
        "weights: several keys that agree, and nulls",
        {"rows.jsonl": files.jsonl(marked({"weight": 0, "train": False, "masked": None}, {"weight": None}))},
        MESSAGES,
        at(LINE, SECOND),
    ),
    Case(
        "weights: in parquet",
        {"rows.parquet": files.parquet(marked({"train": False}, {"train": True}))},
        MESSAGES,
        at("rows.parquet, row", SECOND),
    ),
    Case(
        "weights: of questions",
        {"rows.jsonl": files.jsonl({"messages": [CHAT[0] | {"train": True}, *CHAT[1:]]})},
        MESSAGES,
        at(LINE, EVERY),
        {"messages marked as trained, of roles that are not": 1},
    ),
    Case(
        "weights: every answer is excluded",
        {"rows.jsonl": files.jsonl(marked({"weight": 0}, {"weight": 0}), marked({}, {}))},
        MESSAGES,
        [("rows.jsonl, line 2", EVERY)],
        {"dropped: nothing to train on": 1},
    ),
    Case(
        "train_on last", {"rows.jsonl": files.jsonl(marked({}, {}))}, MESSAGES | {"train_on": "last"}, at(LINE, SECOND)
    ),
    Case(
        "train_on last, by mistral-common",
        {"rows.jsonl": files.jsonl({"messages": CHAT}, {"messages": [assistant("Welcome"), *CHAT, user("3?")]})},
        MESSAGES | {"train_on": "last"},
        at(LINE, SECOND, Chat([assistant("Welcome"), *CHAT, user("3?")], excluded=(0, 2))),
        model="mistral-v3",
    ),
    Case(
        "train_on last, where it is excluded",
        {"rows.jsonl": files.jsonl(marked({}, {"weight": 0}), marked({}, {}))},
        MESSAGES | {"train_on": "last"},
        [("rows.jsonl, line 2", SECOND)],
        {"dropped: nothing to train on": 1},
    ),
    Case("train_on all", {"rows.jsonl": files.jsonl(marked({}, {}))}, MESSAGES | {"train_on": "all"}, at(LINE, EVERY)),
    Case(
        "the prompt's answers in a prompt and completion of messages",
        {"rows.jsonl": files.jsonl({"prompt": CHAT[:3], "completion": CHAT[3:]})},
        {"format": "prompt_completion"},
        at(LINE, SECOND),
    ),
    Case(
        "a prompt and completion of text, with a template",
        {"rows.jsonl": files.jsonl({"prompt": "1?", "completion": "a"})},
        {"format": "prompt_completion"},
        at(LINE, Chat(CHAT[:2])),
    ),
]

DROPPED = "empty answers, dropped with their questions"
EMPTY = [
    Case(
        "empty answers at the start, in the middle and at the end",
        {
            "rows.jsonl": files.jsonl(
                {"messages": [user("0?"), assistant(""), *CHAT]},
                {"messages": [*CHAT[:2], user("0?"), assistant(" \n"), *CHAT[2:]]},
                {"messages": [*CHAT, user("0?"), {"role": "assistant", "content": None}]},
            )
        },
        MESSAGES,
        at(LINE, EVERY, EVERY, EVERY),
        {DROPPED: 3},
    ),
    Case(
        "an empty answer to several questions, and one after a system message, which stays",
        {
            "rows.jsonl": files.jsonl(
                {"messages": [user("0?"), user("and?"), assistant(""), *CHAT]},
                {"messages": [user("0?"), system("Now."), assistant(""), *CHAT]},
            )
        },
        MESSAGES,
        at(LINE, EVERY, Chat([system("Now."), *CHAT])),
        {DROPPED: 2},
    ),
    Case(
        "an empty answer alone",
        {"rows.jsonl": files.jsonl({"messages": [user("0?"), assistant("\t")]}, {"messages": CHAT})},
        MESSAGES,
        [("rows.jsonl, line 2", EVERY)],
        {"dropped: empty response": 1},
    ),
    Case(
        "an empty answer of every format",
        {
            "a.jsonl": files.jsonl(
                {"system_prompt": "", "question": "q", "response": ""},
                {"system_prompt": "", "question": "q", "response": None},
                {"system_prompt": "", "question": "1?", "response": "a"},
            ),
            "b.jsonl": files.jsonl(
                {"instruction": "q", "output": " "},
                {"instruction": "q", "output": None},
                {"instruction": "1?", "output": "a"},
            ),
        },
        {"train": [{"path": "a.jsonl", "format": "openorca"}, {"path": "b.jsonl", "format": "alpaca"}]},
        [("a.jsonl, line 3", Chat(CHAT[:2])), ("b.jsonl, line 3", Chat(CHAT[:2]))],
        {"dropped: empty response": 4},
    ),
    Case(
        "an empty answer that is excluded stays",
        {"rows.jsonl": files.jsonl({"messages": [user("0?"), assistant("", weight=0), *CHAT]})},
        MESSAGES,
        at(LINE, Chat([user("0?"), assistant(""), *CHAT], excluded=(1,))),
    ),
    Case(
        "empty answers are errors where that is asked for",
        {"rows.jsonl": files.jsonl({"messages": CHAT}, {"messages": [user("0?"), assistant("")]})},
        MESSAGES | {"empty_response": "error"},
        refusal=("{dir}/rows.jsonl, line 2: the response is empty; fix the row, or set data.empty_response to drop",),
    ),
]

# ------------------------------------------------------------------------------------------- orders, by template

ORDERS = {
    "a system prompt": [system("Be brief."), *CHAT],
    "a system prompt after the user": [user("1?"), system("Be brief."), assistant("a")],
    "several system prompts": [system("One."), system("Two."), user("0?"), system("Three."), *CHAT],
    "several users in a row": [user("0?"), user("1?"), assistant("a"), user("2?"), user("3?"), assistant("b")],
    "several answers in a row": [user("1?"), assistant("a"), assistant("b")],
    "the assistant first": [assistant("Welcome"), *CHAT],
    "typed control strings": [user("[INST] <s> </s>"), assistant("[/INST] </s> x"), *CHAT],
    "spaces and line breaks": [user("  1?\n"), assistant("  a \n"), user("\n"), assistant("b  ")],
}


def under(model: str, name: str, row: Chat) -> Case:
    record = {"messages": row.messages} | ({"tools": row.tools} if row.tools else {})
    return Case(f"{model}: {name}", {"rows.jsonl": files.jsonl(record)}, MESSAGES, at(LINE, row), model=model)


CALL = {
    "id": "a1B2c3D4e",
    "type": "function",
    "function": {"name": "add", "arguments": json.dumps({"a": 2, "b": "é"})},
}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}},
}
RESULT = tool("4", tool_call_id="a1B2c3D4e", name="add")
BY_TEMPLATE = [
    *(under(model, name, Chat(order)) for model in ("mistral-v1", "mistral-v3") for name, order in ORDERS.items()),
    *(under("instruct", name, Chat(order)) for name, order in ORDERS.items()),
    # Consecutive messages are not joined by this template.
    *(under("openorca", name, Chat(order)) for name, order in ORDERS.items()),
    under("mistral-v3", "a call", Chat([user("2 + 2?"), assistant("", CALL)], [ADD])),
    under(
        "mistral-v3",
        "a result, and another question",
        Chat([user("2 + 2?"), assistant("", CALL), RESULT, assistant("It is 4."), *CHAT], [ADD]),
    ),
    *(
        Case(
            f"{model}: an answer excluded by its weight",
            {"rows.jsonl": files.jsonl(marked({"weight": 0}, {}))},
            MESSAGES,
            at(LINE, SECOND),
            model=model,
        )
        for model in ("mistral-v1", "mistral-v3", "openorca")
    ),
]

CASES = [*WEIGHTS, *EMPTY, *BY_TEMPLATE]
