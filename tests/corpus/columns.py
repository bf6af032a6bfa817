"""Alpaca's columns, and those of data sets that `columns` and `roles` map."""

from tests.corpus import files
from tests.corpus.case import Case, Chat, assistant, at, system, user

LINE = "rows.jsonl, line"
TURN = [user("Hi"), assistant("Hello")]

ALPACA = [
    Case(
        "alpaca: input null, missing and empty",
        {
            "rows.jsonl": files.jsonl(
                {"instruction": "Hi", "input": None, "output": "Hello"},
                {"instruction": "Hi", "output": "Hello"},
                {"instruction": "Hi", "input": "", "output": "Hello"},
            )
        },
        {"format": "alpaca"},
        at(LINE, *[Chat(TURN)] * 3),
    ),
    Case(
        "alpaca: <noinput> is text",
        {"rows.jsonl": files.jsonl({"instruction": "Hi", "input": "<noinput>", "output": "Hello"})},
        {"format": "alpaca"},
        at(LINE, Chat([user("Hi\n\n<noinput>"), assistant("Hello")])),
        {"with the input <noinput>, read as text": 1},
    ),
    Case(
        "alpaca: history and system",
        {
            "rows.json": files.array(
                {
                    "instruction": "3?",
                    "input": "",
                    "output": "c",
                    "system": "Be brief.",
                    "history": [["1?", "a"], ["2?", "b"]],
                },
                {"instruction": "Hi", "output": "Hello", "system": "", "history": []},
            )
        },
        {"format": "alpaca"},
        at(
            "rows.json, line",
            Chat(
                [
                    system("Be brief."),
                    user("1?"),
                    assistant("a"),
                    user("2?"),
                    assistant("b"),
                    user("3?"),
                    assistant("c"),
                ]
            ),
            Chat(TURN),
            first=2,
        ),
    ),
    Case(
        "alpaca: history in a cell",
        {
            "rows.csv": files.table(
                {"instruction": "2?", "output": "b", "history": [["1?", "a"]]},
                {"instruction": "Hi", "output": "Hello", "history": None},
            )
        },
        {"format": "alpaca"},
        at("rows.csv, line", Chat([user("1?"), assistant("a"), user("2?"), assistant("b")]), Chat(TURN), first=2),
    ),
    Case(
        "alpaca: the text that its authors rendered",
        {"rows.jsonl": files.jsonl({"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is ..."})},
        {"format": "alpaca"},
        at(LINE, Chat(TURN)),
        {"with the unused column text": 1},
    ),
]

NAMES = [
    Case(
        "Dolly",
        {
            "rows.jsonl": files.jsonl(
                {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"}
            )
        },
        {"format": "alpaca", "columns": {"input": "context", "output": "response"}},
        at(LINE, Chat([user("Who?\n\nAnn came."), assistant("Ann")])),
        {"with the unused column category": 1},
    ),
    Case(
        "MetaMath",
        {
            "rows.json": files.array(
                {"type": "GSM_Rephrased", "query": "2 + 2?", "original_question": "2?", "response": "4"}
            )
        },
        {"format": "alpaca", "columns": {"instruction": "query", "output": "response"}},
        at("rows.json, line", Chat([user("2 + 2?"), assistant("4")]), first=2),
        {"with the unused column type": 1, "with the unused column original_question": 1},
    ),
    Case(
        "question and answer",
        {"rows.parquet": files.parquet({"question": "2 + 2?", "answer": "4"})},
        {"format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        at("rows.parquet, row", Chat([user("2 + 2?"), assistant("4")])),
    ),
    Case(
        "a chat in a column of another name, with other roles",
        {
            "rows.jsonl": files.jsonl(
                {
                    "dialog": [
                        {"role": "narrator", "content": "Night."},
                        {"role": "Human", "content": "Hi"},
                        {"role": "bot", "content": "Hello"},
                    ]
                }
            )
        },
        {
            "format": "messages",
            "columns": {"messages": "dialog"},
            "roles": {"narrator": "system", "Human": "user", "bot": "assistant"},
        },
        at(LINE, Chat([system("Night."), *TURN])),
    ),
    Case(
        "OpenOrca under other names",
        {"rows.jsonl": files.jsonl({"sys": "", "q": "Hi", "a": "Hello"})},
        {"columns": {"system_prompt": "sys", "question": "q", "response": "a"}},
        at(LINE, Chat(TURN)),
    ),
]

CASES = [*ALPACA, *NAMES]
