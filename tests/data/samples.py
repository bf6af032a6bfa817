"""Rows of every format for tests, and how they are written to files and read back."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas

from minorca import load_tokenizer
from minorca.config import DataConfig, Format, Source
from minorca.data.conversation import Conversation
from minorca.data.prepare import prepare_store
from minorca.data.row_files import RowError
from minorca.data.sources import Row, open_source, read_rows
from minorca.data.store import TokenStore

COLUMNS = ["id", "system_prompt", "question", "response"]
RECORDS = [
    dict(zip(COLUMNS, row))
    for row in [
        ("flan.1", "You are brief.", "What is 2 + 2?", "4"),
        ("t0.2", None, "No system prompt", "Fine."),
        ("niv.3", "", 'Quotes " and, commas', "line one\nline two\n\nline four"),
        ("cot.4", "Ünïcode", "日本語 🦜\t\u2028tab and separator", "  spaces kept  "),
        ("cot.5", "Long", "x" * 200_000, "[INST] <|im_end|> NaN null"),
    ]
]
MESSAGES = [
    [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant"), list(record.values())[1:])
        if text
    ]
    for record in RECORDS
]


def write(path: Path, records: list[dict]) -> str:
    """Writes a file of records as pandas or the standard library does; returns its path."""
    frame = pandas.DataFrame(records)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        frame.to_json(path, orient="records", lines=True)
    else:
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rows_in(
    path: Path | str, format: Format = "openorca", limit: int | None = None, counts: Counter | None = None
) -> list[Row]:
    """All rows of a file, or at most `limit`. Raises the first error."""
    reader = open_source(Source(str(path), format), limit)
    return valid(read_rows(reader, limit, Counter() if counts is None else counts))


def valid(rows: Iterable[Row | RowError]) -> list[Row]:
    """The rows; raises the first that is invalid."""
    found = []
    for row in rows:
        if isinstance(row, RowError):
            raise row
        found.append(row)
    return found


def messages_in(
    path: Path | str, format: Format = "openorca", limit: int | None = None, counts: Counter | None = None
) -> list[list[dict]]:
    """The messages of a file's rows."""
    return [messages_of(row) for row in rows_in(path, format, limit, counts)]


def messages_of(row: Row) -> list[dict]:
    assert isinstance(row.content, Conversation)
    return row.content.messages


def message(role: str, content, **more) -> dict:
    return {"role": role, "content": content} | more


def conversation(system: str, *turns: str) -> list[dict]:
    """The messages of a conversation."""
    messages = [message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return [message("system", system), *messages] if system else messages


SHAREGPT = [
    [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4", "weight": 1.0},
    ],
    [{"from": "user", "value": "Hi", "weight": 0}, {"from": "chatgpt", "value": "Hello", "weight": 0}]
    + [{"from": "human", "value": "Bye", "weight": 1}, {"from": "assistant", "value": "See you"}],
]
TURNS = [conversation("Be brief.", "2 + 2?", "4"), conversation("", "Hi", "Hello", "Bye", "See you")]
TURNS[1][1]["weight"] = 0
# Of each format: records, and their conversations or texts.
FORMATS: dict[str, tuple[list[dict], list]] = {
    "sharegpt": ([{"conversations": turns} for turns in SHAREGPT], TURNS),
    "messages": ([{"messages": turns} for turns in TURNS], TURNS),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."},
            {"instruction": "Add 2 and 2.", "input": "", "output": "4", "system": None},
        ],
        [conversation("Be brief.", "Add.\n\n2 and 2", "4"), conversation("", "Add 2 and 2.", "4")],
    ),
    "prompt_completion": ([{"prompt": "2 + 2?", "completion": "4"}], [conversation("", "2 + 2?", "4")]),
    "prompt_completion, in messages": (
        [{"prompt": conversation("Be brief.", "Hi", "Hello", "2 + 2?"), "completion": [message("assistant", "4")]}],
        [[*conversation("Be brief.", "Hi"), message("assistant", "Hello", weight=0), *conversation("", "2 + 2?", "4")]],
    ),
    "text": (
        [{"text": "Once upon a time"}, {"text": "  there was\na mouse "}],
        ["Once upon a time", "  there was\na mouse "],
    ),
}


def records(count: int) -> list[dict]:
    """Rows of format openorca with answers of 1 to 40 words."""
    return [
        {"id": f"t0.{n}", "system_prompt": "", "question": f"Say {n}", "response": f"{n} " * (1 + n % 40)}
        for n in range(count)
    ]


def prepare(data: DataConfig, model: Path, template: str = "chatml") -> TokenStore:
    """The store of data.train, rendered for a model."""
    return prepare_store(data.sources(data.train), load_tokenizer(model), template, data)


def path_of(store: TokenStore) -> Path:
    assert store.path is not None
    return store.path


def same_rows(a: TokenStore, b: TokenStore) -> bool:
    """Whether two stores have the same rows, from the same sources, with equal arrays."""
    arrays = ("tokens", "trained", "offsets", "numbers", "files", "row_trained", "indices")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    return equal and a.sha256() == b.sha256() and a.sources == b.sources
