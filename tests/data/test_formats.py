"""Records of every format to conversations, what is counted on the way, and invalid values."""

import json
from collections import Counter

import pytest

from minorca import UserError
from tests.data.samples import (
    COLUMNS,
    FORMATS,
    MESSAGES,
    RECORDS,
    conversation,
    message,
    messages_in,
    messages_of,
    rows_in,
    write,
)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, suffix, tmp_path):
    """To the same conversations from every kind of file that can hold them."""
    records, expected = FORMATS[name]
    if suffix != "csv" or not any(isinstance(value, list) for value in records[0].values()):
        rows = rows_in(write(tmp_path / f"rows.{suffix}", records), name.split(",")[0])
        contents = [row.content if isinstance(row.content, str) else messages_of(row) for row in rows]
        assert contents == expected


@pytest.mark.parametrize("format", ["sharegpt", "messages"])
def test_a_csv_cell_holds_json(format, tmp_path):
    """Of a list; what pandas writes of one is Python."""
    records, expected = FORMATS[format]
    path = write(tmp_path / "rows.csv", records)
    with pytest.raises(
        UserError, match=f"^{path}, line 2: .* is text that is not JSON .*expected a list of .role, con"
    ):
        rows_in(path, format)
    written = [{column: json.dumps(value) for column, value in record.items()} for record in records]
    for name in ("rows.csv", "rows.jsonl", "rows.parquet"):
        assert messages_in(write(tmp_path / name, written), format) == expected


def test_alpaca_without_its_optional_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "Add 2 and 2.", "output": "4"}])
    assert messages_in(path, "alpaca") == [conversation("", "Add 2 and 2.", "4")]


def test_apostrophes_of_system_prompts(tmp_path):
    """They come in two spellings; nothing else is touched, and it is counted."""
    curly = {"system_prompt": "users don’t", "question": "don’t?", "response": "don’t"}
    counts = Counter()
    rows = messages_in(write(tmp_path / "rows.jsonl", [curly, RECORDS[0]]), counts=counts)
    assert rows == [conversation("users don't", "don’t?", "don’t"), MESSAGES[0]]
    assert counts["read"] == 2 and counts["system prompts with ’ read as '"] == 1
    turns = [{"from": "system", "value": "don’t"}, {"from": "human", "value": "don’t"}]
    assert messages_in(write(tmp_path / "turns.jsonl", [{"conversations": turns}]), "sharegpt") == [
        conversation("don't", "don’t")
    ]


def test_what_is_ignored_is_counted(tmp_path):
    """Columns and keys that a format does not use, and repeated rows of OpenOrca."""
    first, second = dict(zip(COLUMNS, ("1", "s", "q", "r"))), dict(zip(COLUMNS, ("1", "s", "q", "another")))
    records = [first, second, first, second, first | {"id": "2"}, first | {"id": None}, first | {"id": None}]
    counts = Counter()
    rows = rows_in(write(tmp_path / "rows.jsonl", [record | {"target": 0} for record in records]), counts=counts)
    assert [row.number for row in rows if not row.dropped] == [1, 2, 5, 6, 7]
    assert [row.dropped for row in rows[2:4]] == ["repeated"] * 2
    expected = {"read": 7, "with the unused column target": 7, "with the id of another row": 1}
    assert +counts == expected
    turns = [message("user", "q", name="Ada"), message("assistant", "a", tool_calls=None)]
    counts = Counter()
    rows_in(write(tmp_path / "turns.jsonl", [{"messages": turns, "source": "x"}]), "messages", counts=counts)
    assert counts == {"read": 1, "with the unused column source": 1, "messages with the unused key name": 1}


CHAT = [message("user", "q"), message("assistant", "a")]
# Format, record, the column that is wrong and what is said of it.
HOSTILE = {
    "not a list": ("messages", {"messages": {"role": "user"}}, "messages is dict; expected a list"),
    "null": ("messages", {"messages": None}, "messages is null; expected a list"),
    "null inside": ("messages", {"messages": [None]}, r"messages\[0\] is null; expected"),
    "lists in lists": ("sharegpt", {"conversations": [[1]]}, r"conversations\[0\] is list; expected"),
    "text inside": ("sharegpt", {"conversations": ["hi"]}, r"conversations\[0\] is text; expected"),
    "other keys": (
        "messages",
        {"messages": [{"speaker": "human", "text": "x"}]},
        r"messages\[0\] has speaker, text; expected {role, content} or {from, value}",
    ),
    "mixed keys": (
        "sharegpt",
        {"conversations": [{"from": "human", "content": "x"}]},
        r"conversations\[0\] has from, content; expected",
    ),
    "another format's column": (
        "messages",
        {"conversations": CHAT},
        "column messages is missing; format messages needs the columns messages, got conversations",
    ),
    "another role": (
        "messages",
        {"messages": [*CHAT, message("narrator", "x")]},
        r"messages\[2\].role is 'narrator'; expected one of system, .*, or name it in data.roles",
    ),
    "a role that is a list": (
        "sharegpt",
        {"conversations": [{"from": ["human"], "value": ""}]},
        r"conversations\[0\].from is \['human'\]",
    ),
    "parts": (
        "messages",
        {"messages": [message("user", [{"type": "text"}])]},
        r"messages\[0\].content is a list; expected a string or a list of {\"type\": \"text\"",
    ),
    "no content": ("messages", {"messages": [message("user", None)]}, r"messages\[0\].content is null; expected text"),
    "unpaired surrogate": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "\ud83e"}]},
        r"conversations\[0\].value is not valid UTF-8 or has an unpaired surrogate",
    ),
    "weight": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]},
        r"messages\[1\].weight is 0.5; expected 0 or 1",
    ),
    "boolean weight": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"weight": True}]},
        r"messages\[1\].weight is True",
    ),
    "text weight": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "", "weight": "1"}]},
        r"conversations\[0\].weight is '1'",
    ),
    "number": ("alpaca", {"instruction": 1, "output": "x"}, "instruction is int; expected text"),
    "no output": ("alpaca", {"instruction": "x"}, "column output is missing"),
    "half in messages": (
        "prompt_completion",
        {"prompt": CHAT, "completion": "x"},
        "prompt and completion are list and text; expected both",
    ),
    "text's": ("text", {"text": ["x"]}, "text is list; expected text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_named_with_the_row(name, tmp_path):
    format, record, complaint = HOSTILE[name]
    (path := tmp_path / "rows.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"^{path}, line 1: {complaint}"):
        rows_in(path, format)
