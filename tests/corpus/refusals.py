"""What is refused, in these words, and what becomes of invalid rows that are dropped."""

import gzip
import json

from tests.corpus import files
from tests.corpus.case import Case, Chat, assistant, system, tool, user

TURN = [user("Hi"), assistant("Hello")]
GOOD = {"messages": TURN}
MESSAGES = {"format": "messages"}
ALPACA = {"format": "alpaca"}
ROLES = "system, developer, user, human, assistant, gpt, chatgpt, tool, function, observation, tool_response"
EXPECTED_ROLES = f"{ROLES}, function_call, tool_call, or name it in data.roles"


def refused(name: str, content, *lines: str, file: str = "rows.jsonl", data: dict = MESSAGES, model="jinja") -> Case:
    """A file and the lines of its refusal, which start with the file and the place in it."""
    return Case(name, {file: content}, data, refusal=tuple(f"{{dir}}/{file}{line}" for line in lines), model=model)


def turn(message, *more, name: str, says: str, place: str = "messages[0]", **options) -> Case:
    """A row whose messages are refused."""
    content = files.jsonl({"messages": [message, *more]})
    return refused(name, content, f", line 1: {place}{says}", **options)


JSON = [
    refused(
        "JSON that is cut",
        files.jsonl(GOOD, json.dumps(GOOD)[:-9]),
        ", line 2: not valid JSON (Unterminated string starting at, column 83)",
    ),
    refused(
        "several lines that are not JSON",
        files.jsonl("{", GOOD, "", "[]", "null", "{'a': 1}"),
        ", line 1: not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        ", line 6: not valid JSON (Expecting property name enclosed in double quotes, column 2)",
        ", line 4: expected an object with columns, got list",
        ", line 5: expected an object with columns, got null",
    ),
    refused(
        "NaN",
        files.jsonl('{"messages": NaN}'),
        ", line 1: cannot be read (NaN is not a valid JSON number)",
    ),
    refused(
        "a number that is too large",
        files.jsonl('{"messages": 1e999}'),
        ", line 1: cannot be read (1e999 is not a valid JSON number)",
    ),
    refused(
        "a key that is there twice",
        files.jsonl('{"instruction": "a", "output": "b", "output": "c"}'),
        ", line 1: cannot be read (duplicate key 'output')",
        data=ALPACA,
    ),
    refused(
        "an array that is not closed",
        files.array(GOOD)[:-3],
        ", line 2: not valid JSON (the array is not closed)",
        file="rows.json",
    ),
    refused(
        "an array with a comma at its end",
        files.array(GOOD)[:-3] + b",\n]",
        ", line 3: not valid JSON (Expecting value)",
        file="rows.json",
    ),
    refused(
        "an unpaired surrogate",
        files.jsonl('{"instruction": "a\\ud83e", "output": "b"}'),
        ", line 1: instruction is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
        data=ALPACA,
    ),
    refused(
        "a number of too many digits",
        files.jsonl('{"messages": ' + "9" * 5000 + "}"),
        ", line 1: cannot be read (...)",
    ),
    refused(
        "brackets nested too deeply",
        files.jsonl('{"messages": ' + "[" * 100_000 + "}"),
        ", line 1: cannot be read (...)",
    ),
    refused(
        "an unpaired surrogate in a chat",
        files.jsonl('{"messages": [{"role": "user", "content": "\\udc00"}]}'),
        ", line 1: messages[0].content is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
    ),
    refused(
        "another encoding",
        files.jsonl({"instruction": "é", "output": "b"}).decode().encode("latin-1"),
        ", line 1: instruction is not valid UTF-8 or has an unpaired surrogate; fix or remove the row",
        data=ALPACA,
    ),
]

FILES = [
    refused("an empty file", b"", ": no row is left to use (the source is empty)"),
    refused("an empty array", b"[]", ": no row is left to use (the source is empty)", file="rows.json"),
    refused("a table of a header", b"messages\n", ": no row is left to use (the source is empty)", file="rows.csv"),
    refused(
        "gzip that is cut",
        gzip.compress(files.jsonl(GOOD))[:-12],
        ": cannot be read (...)",
        file="rows.jsonl.gz",
    ),
    refused(
        "gzip that is none",
        files.jsonl(GOOD),
        ": cannot be read (...)",
        file="rows.jsonl.gz",
    ),
    refused("parquet that is none", b"PAR1", ": cannot be read as parquet (...)", file="rows.parquet"),
    refused("Arrow that is none", b"x" * 50, ": cannot be read as Arrow (...)", file="rows.arrow"),
    refused(
        "another kind of file",
        b"",
        ": expected a name ending in .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, or all but the last two with "
        ".gz or .zst",
        file="rows.xlsx",
    ),
    Case(
        "a directory without rows",
        {"rows/README.md": b"", "rows/notes.txt": b"a"},
        MESSAGES | {"train": "rows"},
        refusal=("{dir}/rows: has no file whose name ends in .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow",),
    ),
    Case(
        "a file that is not there",
        {"rows.jsonl": b""},
        MESSAGES | {"train": "row.jsonl"},
        refusal=(
            "{dir}/row.jsonl: no such file; data.train and data.eval take a file, a directory, a glob or a hub id",
        ),
    ),
    Case(
        "a glob that matches nothing",
        {"rows.jsonl": b""},
        MESSAGES | {"train": "*.parquet"},
        refusal=("{dir}/*.parquet: matches no file",),
    ),
    refused(
        "a document as a conversation",
        b"Once",
        ": is plain text, one document, which format messages cannot read; set the format to text",
        file="a.txt",
    ),
    Case(
        "a split of a file",
        {"rows.jsonl": files.jsonl(GOOD)},
        MESSAGES | {"train": [{"path": "rows.jsonl", "split": "train"}]},
        refusal=("{dir}/rows.jsonl: split is train, but a file has none; leave it out",),
    ),
]

TABLES = [
    refused(
        "a cell too many and one too few",
        b"instruction,output\na,b,c\nd\n",
        ", line 2: expected 2 cells as in the header, got 3",
        ", line 3: expected 2 cells as in the header, got 1",
        file="rows.csv",
        data=ALPACA,
    ),
    refused(
        "a quote that is not closed",
        b'instruction,output\na,b\nc,"d\ne,f\n',
        ", line 3: not valid CSV (unexpected end of data) in the row that starts here",
        file="rows.csv",
        data=ALPACA,
    ),
    refused(
        "a column that is there twice",
        b"instruction\toutput\toutput\na\tb\tc\n",
        ", line 1: column output appears twice; rename or remove one",
        file="rows.tsv",
        data=ALPACA,
    ),
    refused(
        "a column that is missing in a table",
        files.parquet({"instruction": "a", "response": "b"}, {"instruction": "a", "response": "b"}),
        ": column output is missing; format alpaca needs the columns instruction, output, got instruction, response; "
        "fix the row, data.format or data.columns",
        file="rows.parquet",
        data=ALPACA,
    ),
    refused(
        "a column that is missing in some lines",
        files.jsonl({"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}),
        ", line 2: column output is missing; format alpaca needs the columns instruction, output, got instruction, "
        "response; fix the row, data.format or data.columns",
        data=ALPACA,
    ),
    refused(
        "a name in columns that no row has",
        files.jsonl({"q": "a", "a": "b"}),
        ": data.columns names sys, which no row has; fix the name",
        data=ALPACA | {"columns": {"instruction": "q", "output": "a", "system": "sys"}},
    ),
    refused(
        "JSON text in a cell that is none",
        b"messages\n[{]\n",
        ", line 2: messages is text that is not JSON (Expecting property name enclosed in double quotes: line 1 column "
        "3 (char 2)); expected a list of {role, content}",
        file="rows.csv",
    ),
    refused(
        "values of other types",
        files.jsonl(
            {"instruction": 7, "output": "b"}, {"instruction": "a", "output": ["b"]}, {"instruction": 8, "output": ""}
        ),
        ", line 1: instruction is int; expected text",
        ", line 3: instruction is int; expected text",
        ", line 2: output is list; expected text",
        data=ALPACA,
    ),
    refused(
        "a history that is none",
        files.jsonl({"instruction": "a", "output": "b", "history": [["q"]]}),
        ", line 1: history[0] is not a list of two; expected a list of [question, answer]",
        data=ALPACA,
    ),
    refused(
        "a prompt of text and a completion of messages",
        files.jsonl({"prompt": "a", "completion": [assistant("b")]}),
        ", line 1: prompt and completion are text and list; expected both text or both lists of messages",
        data={"format": "prompt_completion"},
    ),
]

CONVERSATIONS = [
    turn(
        {"role": "narrator", "content": "a"},
        name="a role that is unknown",
        says=f".role is 'narrator'; expected one of {EXPECTED_ROLES}",
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
        name="a mask, whose meaning differs",
        says=".mask excludes an answer in some tools and trains it in others; write weight: 0 (excluded) or 1 "
        "(trained)",
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
        "no messages",
        files.jsonl({"messages": []}),
        ', line 1: messages is empty or not a list; expected at least one {"role": ..., "content": ...}',
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

CASES = [*JSON, *FILES, *TABLES, *CONVERSATIONS, *TOOLS, *DROPPED]
