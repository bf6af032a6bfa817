"""Records of every format to conversations, what is counted on the way, and invalid values."""

import json
from collections import Counter
from functools import partial

import pytest

from minorca import UserError
from minorca.config import Source
from minorca.data.conversation import Conversation, join_text_parts
from minorca.data.formats import convert_record
from minorca.data.sources import open_source, read_rows
from minorca.serve.protocol import ChatRequest
from tests.data.samples import (
    COLUMNS,
    FORMATS,
    MESSAGES,
    RECORDS,
    SHAREGPT,
    TURNS,
    conversation,
    message,
    messages_in,
    messages_of,
    rows_in,
    valid,
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


# ------------------------------------------------------------------------------------------------- what tools write


def read(record: dict, format: str = "messages", counts: Counter | None = None, **names) -> Conversation:
    content = convert_record(record, format, Counter() if counts is None else counts, **names)
    assert isinstance(content, Conversation)
    return content


def test_both_formats_read_both_pairs_of_keys():
    for format, column in (("messages", "messages"), ("sharegpt", "conversations")):
        for turns in (SHAREGPT[0], TURNS[0]):
            assert read({column: turns}, format).messages == TURNS[0]


@pytest.mark.parametrize("format, column", [("messages", "messages"), ("sharegpt", "conversations")])
def test_a_system_column(format, column):
    """Becomes the system message, unless the conversation has another."""
    for empty in ("", None):
        assert read({column: CHAT, "system": empty}, format).messages == CHAT
    prompted = [message("system", "Be brief."), *CHAT]
    assert read({column: CHAT, "system": "Be brief."}, format).messages == prompted
    assert read({column: prompted, "system": "Be brief."}, format).messages == prompted
    with pytest.raises(UserError, match=f"system differs from the system message in {column}; remove one"):
        read({column: prompted, "system": "Be long."}, format)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls(as_text):
    """As lists and as JSON, in OpenAI's form; passed on as they are."""

    def stored(value):
        return json.dumps(value) if as_text else value

    asked = CALL | {"id": "call_1"}
    turns = [message("user", "1 + 1?"), {"role": "assistant", "content": None, "tool_calls": stored([asked])}]
    turns += [message("tool", "2", tool_call_id="call_1", name="add"), message("assistant", "2", tool_calls=None)]
    conversation = read({"messages": turns, "tools": stored([SCHEMA])})
    assert conversation.tools == [SCHEMA]
    assert conversation.messages == [
        message("user", "1 + 1?"),
        message("assistant", "", tool_calls=[asked]),
        message("tool", "2", tool_call_id="call_1", name="add"),
        message("assistant", "2"),
    ]
    del turns[1]["content"]
    assert read({"messages": turns, "tools": stored([SCHEMA["function"]])}) == conversation
    for none in ([], None, ""):
        assert read({"messages": CHAT, "tools": none}).tools == []


def test_calls_as_other_tools_write_them():
    """LLaMA-Factory's function_call turns, one call or a list; ms-swift's names; OpenAI's former key."""
    called = message("assistant", "", tool_calls=[CALL])
    for role, result in (("function_call", "observation"), ("tool_call", "tool_response")):
        turns = [("human", "1 + 1?"), (role, json.dumps(CALL["function"])), (result, "2"), ("gpt", "2")]
        messages = read(
            {"conversations": [{"from": role, "value": value} for role, value in turns]}, "sharegpt"
        ).messages
        assert messages == [message("user", "1 + 1?"), called, message("tool", "2"), message("assistant", "2")]
    two = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(two)}]
    calls = read({"conversations": turns}, "sharegpt").messages[1]["tool_calls"]
    assert [call["function"] for call in calls] == two
    former = [
        CHAT[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        message("function", "2"),
    ]
    assert read({"messages": former}).messages == [CHAT[0], called, message("tool", "2")]


@pytest.mark.parametrize("none", [None, [], "", "[]"])
def test_the_former_call_beside_no_others(none):
    """And none in it beside calls; both are an error."""
    former = message("assistant", None, tool_calls=none, function_call=CALL["function"])
    called = message("assistant", "", tool_calls=[CALL])
    assert read({"messages": [CHAT[0], former]}).messages == [CHAT[0], called]
    for empty in (None, "", {}):
        assert read({"messages": [CHAT[0], called | {"function_call": empty}]}).messages == [CHAT[0], called]
        assert read({"messages": [CHAT[0], CHAT[1] | {"tool_calls": none, "function_call": empty}]}).messages == CHAT
    both = r"^chat\[0\].tool_calls and chat\[0\].function_call are both given; keep one"
    with pytest.raises(UserError, match=both):
        read({"chat": [former | {"tool_calls": [CALL]}]}, columns={"messages": "chat"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize("more", [[], [message("assistant", "a", tool_calls=[CALL])]], ids=["texts", "calls"])
def test_null_answers_are_empty_in_every_kind_of_file(name, more, tmp_path):
    turns = [CHAT[0], message("assistant", None), *more, message("assistant", "a")]
    (messages,) = messages_in(write(tmp_path / name, [{"messages": turns}]), "messages")
    assert messages == [CHAT[0], message("assistant", ""), *more, message("assistant", "a")]


def test_answers_without_a_content_are_empty():
    """But not those that have it under the other pair's key, and no other role's messages."""
    assert read({"messages": [CHAT[0], {"role": "assistant"}]}).messages[1] == message("assistant", "")
    assert read({"conversations": [{"from": "gpt"}]}, "sharegpt").messages == [message("assistant", "")]
    for turn in (
        {"role": "assistant", "value": "a"},
        {"from": "gpt", "content": "a"},
        {"role": "user"},
        {"role": "tool"},
        {"role": "tool_call"},
    ):
        with pytest.raises(UserError, match=r"^messages\[0\] has .*; expected {role, content} or {from, value}"):
            read({"messages": [turn]})


@pytest.mark.parametrize(
    "key, value, is_trained",
    [
        ("weight", 0, False),
        ("weight", 1.0, True),
        ("loss_weight", 0.0, False),
        ("loss_weight", 1, True),
        ("train", False, False),
        ("train", 1, True),
        ("training", 0, False),
        ("training", True, True),
        ("loss", False, False),
        ("masked", True, False),
        ("masked", False, True),
        ("mask", True, False),
        ("mask", False, True),
        ("train", None, True),
    ],
)
def test_answers_that_are_excluded(key, value, is_trained):
    """By the keys of several tools, in both formats; on other messages they have no effect."""
    answer = CHAT[1] if is_trained else CHAT[1] | {"weight": 0}
    marked = [message_ | {key: value} for message_ in CHAT]
    assert read({"messages": marked}).messages == [CHAT[0], answer]
    turns = [{"from": m["role"], "value": m["content"], key: value} for m in CHAT]
    assert read({"conversations": turns}, "sharegpt").messages == [CHAT[0], answer]


def test_questions_that_are_marked_as_trained_are_counted():
    counts = Counter()
    read({"messages": [CHAT[0] | {"train": True}, CHAT[1] | {"train": True}]}, counts=counts)
    read({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, counts=counts)
    assert counts == {"messages marked as trained, of roles that are not": 1}


def test_parts_of_text():
    """As the server reads them; Arrow adds the keys of other kinds of parts."""
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two", "image_url": None}]
    assert read({"messages": [message("user", parts), CHAT[1]]}).messages == [message("user", "One\nTwo"), CHAT[1]]
    sent = ChatRequest.model_validate(
        {"model": "m", "messages": [message("user", [{"type": "text", "text": "a"}] * 2)]}
    )
    assert sent.messages[0].content == join_text_parts([{"type": "text", "text": "a"}] * 2)


def test_alpaca_with_a_history():
    """In any form of "none", and with what Alpaca calls no input left as it is, and counted."""
    row = {"instruction": "Third", "input": "in", "output": "3", "system": "Be brief."}
    history = [["First", "1"], ["Second", "2"]]
    expected = conversation("Be brief.", "First", "1", "Second", "2", "Third\n\nin", "3")
    for stored in (history, json.dumps(history)):
        assert read(row | {"history": stored}, "alpaca").messages == expected
    for none in ([], None, ""):
        assert read(row | {"history": none}, "alpaca").messages == conversation("Be brief.", "Third\n\nin", "3")
    counts = Counter()
    assert read(row | {"input": "<noinput>"}, "alpaca", counts).messages[1]["content"] == "Third\n\n<noinput>"
    assert +counts == {"with the input <noinput>, read as text": 1}


ASKED = [message("user", "q"), message("assistant", "a"), message("user", "r")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_prompts_and_completions_hold_messages_in_json(name, tmp_path):
    """As the same lists would be read; other text that starts like one stays text."""
    expected = [ASKED[0], ASKED[1] | {"weight": 0}, ASKED[2], message("assistant", "b")]
    shared = [{"from": m["role"], "value": m["content"]} for m in ASKED]
    texts = ["[1] is a note", "[1, 2]", "[]", '["q"]', '[{"name": "Ann"}]', '[{"role": "admin"}]', "[" * 5000]
    rows = [
        *[{"prompt": json.dumps(p), "completion": json.dumps([message("assistant", "b")])} for p in (ASKED, shared)],
        *[{"prompt": text, "completion": text} for text in texts],
    ]
    assert messages_in(write(tmp_path / name, rows), "prompt_completion") == [
        *[expected] * 2,
        *[conversation("", text, text) for text in texts],
    ]
    called = [{"role": "assistant", "tool_calls": [CALL]}]
    row = {"prompt": ASKED[:1], "completion": json.dumps(called)}
    assert read(row, "prompt_completion").messages == [ASKED[0], message("assistant", "", tool_calls=[CALL])]


def test_half_in_messages_names_the_columns_of_the_data():
    for q, a, types in (("[1]", json.dumps(CHAT), "text and list"), (json.dumps(CHAT), "a", "list and text")):
        with pytest.raises(UserError, match=f"^q and a are {types}; expected both text or both lists of messages"):
            read({"q": q, "a": a}, "prompt_completion", columns={"prompt": "q", "completion": "a"})


INVALID = {
    "history": ("alpaca", {"instruction": "", "output": "", "history": [["q"]]}, r"history\[0\] is not a list of two"),
    "a history of numbers": (
        "alpaca",
        {"instruction": "", "output": "", "history": [[1, "a"]]},
        r"history\[0\] is int; expected text",
    ),
    "mask": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"mask": 1}]},
        r"messages\[1\].mask is a number, which excludes an answer in some tools and trains it in others",
    ),
    "contradicting": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0, "train": True}]},
        r"weight and train contradict each other in messages\[1\]; keep one",
    ),
    "train": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"train": "no"}]},
        r"messages\[1\].train is 'no'; expected true or false",
    ),
    "fractional": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"loss_weight": 0.3}]},
        r"messages\[1\].loss_weight is 0.3; expected 0 or 1",
    ),
    "tools": ("messages", {"messages": CHAT, "tools": "[{"}, "tools is text that is not JSON"),
    "a tool": ("messages", {"messages": CHAT, "tools": [{"type": "x"}]}, r"tools\[0\] is .* expected .*function"),
    "calls": (
        "messages",
        {"messages": [CHAT[0], message("assistant", None, tool_calls=[{"name": "f"}])]},
        r"messages\[1\].tool_calls\[0\] is .* expected",
    ),
    "a call in text": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        r"conversations\[0\].value is text that is not JSON",
    ),
    "a call without a name": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        r"conversations\[0\].value is {}; expected",
    ),
    "an image": (
        "messages",
        {"messages": [message("user", [{"type": "image_url", "image_url": "x"}])]},
        r"messages\[0\].content is a list; expected a string or a list of",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_invalid(name):
    format, record, complaint = INVALID[name]
    with pytest.raises(UserError, match=f"^{complaint}"):
        read(record, format)


# ------------------------------------------------------------------------------------------------- columns and roles


def test_columns_have_any_names():
    """Dolly's and MetaMath's; two may trade places; what is not mapped is counted as ever."""
    dolly = {"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "math"}
    counts = Counter()
    names = {"input": "context", "output": "response"}
    assert read(dolly, "alpaca", counts, columns=names).messages == conversation("", "Add.\n\n2 and 2", "4")
    assert +counts == {"with the unused column category": 1}
    swapped = {"prompt": "4", "completion": "2 + 2?"}
    names = {"prompt": "completion", "completion": "prompt"}
    assert read(swapped, "prompt_completion", columns=names).messages == conversation("", "2 + 2?", "4")
    counts = Counter()
    record = {"text": "unused", "content": "Once"}
    assert convert_record(record, "text", counts, {"text": "content"}) == "Once"
    assert counts == {"with the unused column text": 1}


def test_errors_name_the_columns_of_the_data():
    with pytest.raises(UserError, match="^column q is missing; format alpaca needs the columns q, output, got output"):
        read({"output": "a"}, "alpaca", columns={"instruction": "q"})
    with pytest.raises(UserError, match=r"^chat\[0\].role is 'x'"):
        read({"chat": [message("x", "y")]}, columns={"messages": "chat"})


def test_a_mapped_column_that_no_row_has(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": "1", "a": "2"}, {"q": "1", "a": "2", "in": "3"}])
    columns = {"instruction": "q", "output": "a", "input": "in"}
    read_all = partial(open_source, limit=None)
    assert len(valid(read_rows(read_all(Source(path, "alpaca", columns=columns)), None, Counter()))) == 2
    reader = read_all(Source(path, "alpaca", columns=columns | {"system": "sys", "history": "h"}))
    with pytest.raises(UserError, match=f"^{path}: data.columns names h, sys, which no row has; fix the name"):
        valid(read_rows(reader, None, Counter()))


def test_roles_have_any_names():
    turns = [{"from": "narrator", "value": "s"}, {"from": "user", "value": "q"}, {"from": "bot", "value": "a"}]
    roles = {"narrator": "system", "bot": "assistant"}
    assert read({"conversations": turns}, "sharegpt", roles=roles).messages == conversation("s", "q", "a")
    # Ours may be given another meaning.
    assert read({"messages": CHAT}, roles={"user": "assistant", "assistant": "user"}).messages == [
        message("assistant", "q"),
        message("user", "a"),
    ]
