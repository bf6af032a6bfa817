"""Rows as data sets and tools write them: their keys and roles."""

import json

from tests.corpus import files
from tests.corpus.case import Case, Chat, assistant, at, system, tool, user

LINE = "rows.jsonl, line"
TURN = [user("Hi"), assistant("Hello")]


def orca(id: str | None, system_prompt: str | None, question: str, response: str) -> dict:
    return {"id": id, "system_prompt": system_prompt, "question": question, "response": response}


def sharegpt(*turns: tuple[str, object], **columns) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]} | columns


OPENORCA = [
    Case(
        "OpenOrca: curly apostrophes in system prompts, and only there",
        {"1M-GPT4-Augmented.parquet": files.parquet(orca("flan.1", "You’re brief.", "What’s 2?", "It’s 2."))},
        rows=at(
            "1M-GPT4-Augmented.parquet, row", Chat([system("You're brief."), user("What’s 2?"), assistant("It’s 2.")])
        ),
        counts={"system prompts with ’ read as '": 1},
    ),
    Case(
        "OpenOrca: a system prompt that is null or empty",
        {"rows.jsonl": files.jsonl(orca("1", None, "Hi", "Hello"), orca("2", "", "Hi", "Hello"))},
        rows=at(LINE, Chat(TURN), Chat(TURN)),
    ),
    Case(
        "OpenOrca: rows that are there twice, and an id that two rows have",
        {
            "rows.jsonl": files.jsonl(
                orca("1", None, "Hi", "Hello"), orca("1", None, "Hi", "Hello"), orca("1", None, "Bye", "See you")
            )
        },
        rows=[
            ("rows.jsonl, line 1", Chat(TURN)),
            ("rows.jsonl, line 3", Chat([user("Bye"), assistant("See you")])),
        ],
        counts={"dropped: repeated": 1, "with the id of another row": 1},
    ),
    Case(
        "OpenOrca: the index that pandas saves",
        {"rows.parquet": files.parquet(orca("1", None, "Hi", "Hello") | {"__index_level_0__": 7})},
        rows=at("rows.parquet, row", Chat(TURN)),
        counts={"with the unused column __index_level_0__": 1},
    ),
    Case(
        "OpenOrca: no ids",
        {"rows.csv": b"system_prompt,question,response\n,Hi,Hello\n,Hi,Hello\n"},
        rows=at("rows.csv, line", Chat(TURN), Chat(TURN), first=2),
    ),
]

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
OTHER = {"type": "function", "function": {"name": "add", "arguments": {"b": [3]}}}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}

SHAREGPT = [
    Case(
        "SlimOrca: weights, one of them null",
        {
            "oo-labeled_correct.gpt4.sharegpt.jsonl": files.jsonl(
                {
                    "conversations": [
                        {"from": "system", "value": "You’re brief.", "weight": None},
                        {"from": "human", "value": "Hi", "weight": 0},
                        {"from": "gpt", "value": "Hello", "weight": 1},
                    ]
                }
            )
        },
        {"format": "sharegpt"},
        at("oo-labeled_correct.gpt4.sharegpt.jsonl, line", Chat([system("You're brief."), *TURN])),
        {"system prompts with ’ read as '": 1},
    ),
    Case(
        "ShareGPT: a system column",
        {"rows.jsonl": files.jsonl(sharegpt(("human", "Hi"), ("gpt", "Hello"), system="Be brief."))},
        {"format": "sharegpt"},
        at(LINE, Chat([system("Be brief."), *TURN])),
    ),
    Case(
        "ShareGPT: a system column that is in the messages too, or empty",
        {
            "rows.jsonl": files.jsonl(
                sharegpt(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), system="Be brief."),
                sharegpt(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), system=""),
            )
        },
        {"format": "sharegpt"},
        at(LINE, *[Chat([system("Be brief."), *TURN])] * 2),
    ),
    Case(
        "ShareGPT: tools, calls and observations, as LLaMA-Factory has them",
        {
            "rows.json": files.array(
                sharegpt(
                    ("human", "2 + 2?"),
                    ("function_call", '{"name": "add", "arguments": {"a": 2}}'),
                    ("observation", "4"),
                    ("gpt", "It is 4."),
                    tools=json.dumps([ADD["function"]]),
                ),
                sharegpt(("human", "Hi"), ("gpt", "Hello"), tools=""),
            )
        },
        {"format": "sharegpt"},
        at(
            "rows.json, line",
            Chat([user("2 + 2?"), assistant("", CALL), tool("4"), assistant("It is 4.")], [ADD]),
            Chat(TURN),
            first=2,
        ),
    ),
    Case(
        "ShareGPT: other names of roles and keys, and an id",
        {
            "rows.jsonl": files.jsonl(
                {
                    "id": "a",
                    "conversations": [{"role": "user", "content": "Hi"}, {"role": "chatgpt", "content": "Hello"}],
                }
            )
        },
        {"format": "sharegpt"},
        at(LINE, Chat(TURN)),
        {"with the unused column id": 1},
    ),
    Case(
        "ShareGPT: conversations as JSON text",
        {
            "rows.jsonl": files.jsonl(
                {"conversations": json.dumps(sharegpt(("human", "Hi"), ("gpt", "Hello"))["conversations"])}
            )
        },
        {"format": "sharegpt"},
        at(LINE, Chat(TURN)),
    ),
    Case(
        "ShareGPT: tool_call and tool_response, two calls at once",
        {
            "rows.jsonl": files.jsonl(
                sharegpt(
                    ("human", "2 + 2?"),
                    ("tool_call", json.dumps([CALL["function"], CALL["function"]])),
                    ("tool_response", "4"),
                    ("tool", "4"),
                    ("gpt", "4."),
                )
            )
        },
        {"format": "sharegpt"},
        at(LINE, Chat([user("2 + 2?"), assistant("", CALL, CALL), tool("4"), tool("4"), assistant("4.")])),
    ),
    Case(
        "ShareGPT: the assistant first",
        {"rows.jsonl": files.jsonl(sharegpt(("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello")))},
        {"format": "sharegpt"},
        at(LINE, Chat([assistant("Welcome"), *TURN])),
    ),
]

MESSAGES = [
    Case(
        "messages: a developer",
        {"rows.jsonl": files.jsonl({"messages": [{"role": "developer", "content": "Be brief."}, *TURN]})},
        {"format": "messages"},
        at(LINE, Chat([system("Be brief."), *TURN])),
    ),
    Case(
        "messages: content in parts of text",
        {
            "rows.jsonl": files.jsonl(
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
                    ]
                }
            )
        },
        {"format": "messages"},
        at(LINE, Chat([user("one\ntwo"), assistant("three")])),
    ),
    Case(
        "messages: calls with null content beside them, in parquet, which gives all messages all keys",
        {
            "rows.parquet": files.parquet(
                {
                    "messages": [
                        {"role": "user", "content": "2 + 2?", "tool_calls": None, "tool_call_id": None},
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [
                                {
                                    "id": "a1",
                                    "type": "function",
                                    "function": {"name": "now", "arguments": '{"zone": "utc"}'},
                                }
                            ],
                            "tool_call_id": None,
                        },
                        {"role": "tool", "content": "noon", "tool_calls": None, "tool_call_id": "a1"},
                        {"role": "assistant", "content": "Noon.", "tool_calls": None, "tool_call_id": None},
                    ]
                }
            )
        },
        {"format": "messages"},
        at(
            "rows.parquet, row",
            Chat(
                [
                    user("2 + 2?"),
                    assistant("", {"function": {"name": "now", "arguments": '{"zone": "utc"}'}}),
                    tool("noon"),
                    assistant("Noon."),
                ]
            ),
        ),
    ),
    Case(
        "messages: arguments in parquet, which gives all calls the arguments of any",
        {
            "rows.parquet": files.parquet(
                {"messages": [user("2 + 2?"), assistant("", CALL)], "tools": [ADD]},
                {"messages": [user("3 + 3?"), assistant("", OTHER)], "tools": [ADD]},
            )
        },
        {"format": "messages"},
        at(
            "rows.parquet, row",
            Chat([user("2 + 2?"), assistant("", CALL)], [ADD]),
            Chat([user("3 + 3?"), assistant("", OTHER)], [ADD]),
        ),
    ),
    Case(
        "messages: calls and tools as JSON text in a cell",
        {
            "rows.csv": files.table(
                {
                    "messages": [
                        user("2 + 2?"),
                        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
                    ],
                    "tools": [ADD],
                },
                {"messages": TURN, "tools": None},
            )
        },
        {"format": "messages"},
        at("rows.csv, line", Chat([user("2 + 2?"), assistant("", CALL)], [ADD]), Chat(TURN), first=2),
    ),
    Case(
        "messages: OpenAI's former function_call, and a function's result",
        {
            "rows.jsonl": files.jsonl(
                {
                    "messages": [
                        user("2 + 2?"),
                        {"role": "assistant", "content": None, "function_call": CALL["function"]},
                        {"role": "function", "name": "add", "content": "4"},
                        assistant("4."),
                    ]
                }
            )
        },
        {"format": "messages"},
        at(LINE, Chat([user("2 + 2?"), assistant("", CALL), tool("4"), assistant("4.")])),
    ),
    Case(
        "messages: what no template writes is counted",
        {
            "rows.jsonl": files.jsonl(
                {
                    "messages": [user("Hi") | {"name": "Ann"}, assistant("Hello", refusal=None, audio="x")],
                    "source": "web",
                },
                {"messages": TURN, "score": 12345678901234567890123},
            )
        },
        {"format": "messages"},
        at(LINE, Chat(TURN), Chat(TURN)),
        {
            "messages with the unused key name": 1,
            "messages with the unused key audio": 1,
            "with the unused column source": 1,
            "with the unused column score": 1,
        },
    ),
    Case(
        "messages: several of the user in a row, and a system message later",
        {"rows.jsonl": files.jsonl({"messages": [user("One"), user("Two"), assistant("3"), system("Now"), *TURN]})},
        {"format": "messages"},
        at(LINE, Chat([user("One"), user("Two"), assistant("3"), system("Now"), *TURN])),
    ),
]

CASES = [*OPENORCA, *SHAREGPT, *MESSAGES]
