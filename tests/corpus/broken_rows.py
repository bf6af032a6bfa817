"""Rows that are refused, in these words, and what becomes of them where they are dropped."""

import gzip
import json

from tests.corpus import files
from tests.corpus.case import MESSAGES, Case, Chat, assistant, refused, system, tool, user

TURN = [user("Hi"), assistant("Hello")]
GOOD = {"messages": TURN}
ALPACA = {"format": "alpaca"}
ROLES = "system, developer, user, human, assistant, gpt, chatgpt, tool, function, observation, tool_response"
EXPECTED_ROLES = f"{ROLES}, function_call, tool_call, or name it in data.roles"


def turn(message, *more, name: str, says: str, place: str = "messages[0]", **options) -> Case:
    """A row whose messages are refused."""
    content = files.jsonl({"messages": [message, *more]})
    return refused(name, content, f", line 1: {place}{says}", **options)


CONVERSATIONS = [
    turn(
        {"role": "narrator", "content": "a"},
        name="a role that is unknown",
        says=f".role is 'narrator'; expected one of {EXPECTED_ROLES}",
    ),
    turn(
        {"role": 1, "content": "a"},
        name="a role that is a number",
        says=f".role is 1; expected one of {EXPECTED_ROLES}",
    ),
    turn(
        user("a"),
        {"role": "assistant", "content": True},
        name="an answer that is a boolean",
        place="messages[1]",
        says=".content is bool; expected text",
    ),
    turn({"text": "a"}, name="keys that are unknown", says=" has text; expected {role, content} or {from, value}"),
    turn("Hi", name="a message of text", says=" is text; expected {role, content} or {from, value}"),
    turn({"role": "user", "content": None}, name="a question that is null", says=".content is null; expected text"),
    turn(
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        name="an image",
        says='.content is a list; expected a string or a list of {"type": "text", "text": ...}',
    ),
    turn(
        assistant("a", weight=0, train=True),
        name="weights that contradict each other",
        says="; keep one",
        place="weight and train contradict each other in messages[0]",
    ),
    turn(assistant("a", weight=0.5), name="a weight between 0 and 1", says=".weight is 0.5; expected 0 or 1"),
    turn(assistant("a", train="yes"), name="a weight of text", says=".train is 'yes'; expected true or false"),
    turn(
        assistant("a", mask=1),
        name="a mask in numbers",
        says=".mask is a number, which excludes an answer in some tools and trains it in others; expected true "
        "(excluded) or false",
    ),
    turn(
        user("a"),
        assistant("", {"name": "add"}),
        name="a call that is none",
        place="messages[1].tool_calls[0]",
        says=""" is {'name': 'add'}; expected {"type": "function", "function": {"name": ..., "arguments": ...}}""",
    ),
    refused(
        "two system prompts that differ",
        files.jsonl({"messages": [system("a"), *TURN], "system": "b"}),
        ", line 1: system differs from the system message in messages; remove one",
    ),
    refused(
        "tools that are none",
        files.jsonl(GOOD | {"tools": ["add"]}),
        """, line 1: tools[0] is 'add'; expected {"type": "function", "function": {"name": ...}}""",
    ),
    refused(
        "a list of messages that is an object",
        files.jsonl({"messages": {"role": "user"}}),
        ", line 1: messages is dict; expected a list of {role, content}, or its JSON",
    ),
    refused(
        "no answer in any row",
        files.jsonl({"messages": [user("a")]}, {"messages": [system("b")]}),
        ": no row is left to use (2 read, 2 dropped: nothing to train on (21 tokens))",
    ),
    refused(
        "no messages",
        files.jsonl({"messages": []}),
        ", line 1: messages is empty; expected at least one message",
    ),
    turn(
        *TURN,
        system("a"),
        user("b"),
        assistant("c"),
        name="a system message after an answer, which mistral-common rejects too",
        place="messages[2].role",
        says=" is 'system' after 'assistant'; Mistral's templates take assistant, user, tool there; join, move or drop "
        "messages",
        model="mistral-v3",
    ),
    turn(
        user("a"),
        assistant("", {"id": "a1B2c3D4e", "type": "function", "function": {"name": "add", "arguments": "{}"}}),
        name="calls under a template without any",
        place="messages",
        says=" has tools, which mistral-v1 cannot write; set data.template to another",
        model="mistral-v1",
    ),
    turn(
        user("a"),
        tool("b"),
        name="a result under ChatML",
        place="messages",
        says=" has tools, which chatml cannot write; choose jinja or mistral-v3",
        model="openorca",
    ),
    turn(
        user("a"),
        assistant("b"),
        user("c"),
        assistant("d"),
        name="a conversation without a template",
        place="messages",
        says=" has user, assistant, user, assistant; template none writes a prompt and its completion only",
        model="v3",
    ),
]

CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
NINE = "mistral-v3 needs nine letters and digits: give each call and its result such an id"
DEEP = "has tools, calls or results that are nested too deeply; fix or remove the row"
SURROGATE = "which is not valid Unicode; fix the text"


def called(arguments: str) -> str:
    """The line of a call with such arguments, which are written in JSON."""
    call = {"id": "a1B2c3D4e", "function": {"name": "add", "arguments": "ARGUMENTS"}}
    return json.dumps({"messages": [user("a"), assistant("", call)]}).replace('"ARGUMENTS"', arguments)


TOOLS = [
    turn(
        user("a"),
        assistant("", CALL | {"id": "call_1"}),
        tool("b", tool_call_id="call_1"),
        assistant("c"),
        name="an id that Mistral's formats do not take",
        place="messages",
        says=f" has the tool call id 'call_1'; {NINE}",
        model="mistral-v3",
    ),
    refused(
        "calls and observations without ids, under a format that needs them",
        files.jsonl(
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "4."},
                ]
            }
        ),
        f", line 1: messages has a tool call or result without an id; {NINE}",
        data={"format": "sharegpt"},
        model="mistral-v3",
    ),
    turn(
        user("a"),
        assistant("b", CALL | {"id": "a1B2c3D4e"}),
        name="content beside a call, which Mistral's formats do not have",
        place="messages",
        says=" has content beside tool calls, which Mistral's templates cannot write; drop one of them",
        model="mistral-v3",
    ),
    refused(
        "a call that is not JSON",
        files.jsonl({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(2)"}]}),
        ", line 1: conversations[1].value is text that is not JSON (Expecting value: line 1 column 1 (char 0)); "
        'expected {"name": ..., "arguments": ...} in JSON, or a list of these',
        data={"format": "sharegpt"},
    ),
    refused(
        "an unpaired surrogate in a tool",
        # In what the template writes.
        files.jsonl('{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "\\ud83e"}]}'),
        f", line 1: text has an unpaired surrogate at character 65, {SURROGATE}",
    ),
    refused(
        "an unpaired surrogate in a call",
        # In its JSON.
        files.jsonl(called('"\\ud83e"')),
        f", line 1: text has an unpaired surrogate at character 31, {SURROGATE}",
        model="mistral-v3",
    ),
    refused(
        "arguments that are nested too deeply",
        files.jsonl(GOOD, called("[" * 600 + "]" * 600)),
        f", line 2: {DEEP}",
    ),
    refused(
        "arguments whose text is nested too deeply",
        files.jsonl(GOOD, called('"' + "[" * 5000 + '"')),
        f", line 2: {DEEP}",
        model="mistral-v3",
    ),
]

DROP = MESSAGES | {"bad_rows": "drop"}
DROPPED = [
    Case(
        "invalid rows that are dropped",
        {
            "rows.jsonl": files.jsonl(
                "{",
                GOOD,
                {"messages": [{"role": "x", "content": "a"}]},
                {"messages": [user("a"), {"role": "x", "content": "a"}]},
                *[{"messages": None}] * 4,
                "[]",
            )
        },
        DROP,
        [("rows.jsonl, line 2", Chat(TURN))],
        {
            "dropped: not valid JSON (Expecting property name enclosed in double quotes, column N)": 1,
            "dropped: messages[].role is 'x'": 2,
            "dropped: messages is null": 4,
            "dropped: expected an object with columns, got list": 1,
        },
        {
            "dropped: messages[].role is 'x'": "{dir}/rows.jsonl, line 3; {dir}/rows.jsonl, line 4",
            "dropped: messages is null": "; ".join(f"{{dir}}/rows.jsonl, line {n}" for n in (5, 6, 7)) + "; ...",
        },
    ),
    Case(
        "cells that are dropped",
        {"rows.csv": b"instruction,output\na,b,c\nHi,Hello\n\xe9,f\n"},
        ALPACA | {"bad_rows": "drop"},
        [("rows.csv, line 3", Chat(TURN))],
        {
            "dropped: expected N cells as in the header, got N": 1,
            "dropped: instruction is not valid UTF-8 or has an unpaired surrogate": 1,
        },
    ),
    Case(
        "orders that a template does not take are dropped",
        {"rows.jsonl": files.jsonl({"messages": [*TURN, system("a"), *TURN]}, GOOD)},
        DROP,
        [("rows.jsonl, line 2", Chat(TURN))],
        {"dropped: messages[].role is 'system' after 'assistant'": 1},
        model="mistral-v3",
    ),
    Case(
        "nothing but invalid rows",
        {"rows.jsonl": files.jsonl({"messages": 1}, {"messages": 2})},
        DROP,
        refusal=(
            "{dir}/rows.jsonl: no row is left to use (2 read, 2 dropped: messages is int "
            "({dir}/rows.jsonl, line 1; {dir}/rows.jsonl, line 2))",
        ),
    ),
    Case(
        "twenty invalid rows are listed, by reason",
        {"rows.jsonl": files.jsonl(*[{"messages": 1}, {"messages": None}] * 15)},
        MESSAGES,
        refusal=(
            *(
                f"{{dir}}/rows.jsonl, line {n}: messages is int; expected a list of {{role, content}}, or its JSON"
                for n in range(1, 20, 2)
            ),
            *(
                f"{{dir}}/rows.jsonl, line {n}: messages is null; expected a list of {{role, content}}, or its JSON"
                for n in range(2, 21, 2)
            ),
            "and 10 more rows; fix them, or set data.bad_rows to drop to leave invalid rows out",
        ),
    ),
    Case(
        "a broken file is an error, whatever becomes of rows",
        {"rows.jsonl.gz": gzip.compress(files.jsonl(GOOD))[:-12]},
        DROP,
        refusal=("{dir}/rows.jsonl.gz: cannot be read (...)",),
    ),
]

CASES = [*CONVERSATIONS, *TOOLS, *DROPPED]
