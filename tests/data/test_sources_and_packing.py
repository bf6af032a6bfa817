"""Rows from files of every format, what becomes of them, and batches: every row as often as promised, none too long, nothing
trained across documents. Rows that are kept on disk: test_store.py."""

import bisect
import json
import random
from collections import Counter

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minorca import UserError, load_tokenizer
from minorca.config import DataConfig, Source
from minorca.data.__main__ import main
from minorca.data.chat_template import render
from minorca.data.packing import Batch, Order, make_batch, plan_epoch, trained_tokens
from minorca.data.sources import Row, open_source, read_rows
from minorca.data.store import TokenStore, render_rows
from tests.data.test_chat_template import FORGETFUL
from tests.data.test_tokenizer import orca

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


def write(path, records):
    """A file of records as pandas or the standard library writes it."""
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


def rows_in(path, format: str = "openorca", limit: int | None = None, counts: Counter | None = None) -> list[Row]:
    return list(
        read_rows(open_source(Source(str(path), format), limit), format, limit, Counter() if counts is None else counts)
    )


def messages_in(path, format: str = "openorca", limit: int | None = None, counts: Counter | None = None) -> list:
    return [row.content for row in rows_in(path, format, limit, counts)]


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_format_gives_the_same_rows(name, tmp_path):
    """A missing or empty system prompt is no system message; a column too many is nothing to complain of."""
    source = write(tmp_path / name, [record | {"more": 1.5} for record in RECORDS])
    assert messages_in(source) == MESSAGES
    assert messages_in(source, limit=2) == MESSAGES[:2]


def test_parquet_in_several_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)
    assert [row.where for row in rows_in(path)] == [f"{path}, row {number}" for number in range(1, 6)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    path = tmp_path / name
    write(path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert messages_in(path) == MESSAGES


def test_places_in_jsonl(tmp_path):
    """Blank lines are passed over and counted, whatever ends a line."""
    path = tmp_path / "rows.jsonl"
    lines = [
        "",
        json.dumps(RECORDS[0]),
        "   ",
        *(json.dumps(record, ensure_ascii=False) for record in (RECORDS[1], RECORDS[3])),
    ]
    path.write_bytes("\r\n".join(lines).encode())
    assert [row.where for row in rows_in(path)] == [f"{path}, line {number}" for number in (2, 4, 5)]


def test_places_in_csv_are_where_rows_start(tmp_path):
    """A cell may hold lines, and a file blank ones."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,system_prompt,question,response\n1,,"a\nb\r\nc",d\n2,,e,f\n\n3,,"g\n",h\n4,,i,j\n')
    rows = rows_in(path)
    assert [row.where for row in rows] == [f"{path}, line {number}" for number in (2, 5, 7, 9)]
    assert rows[0].content[0]["content"] == "a\nb\r\nc"


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


def conversation(system: str, *turns: str) -> list[dict]:
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
FORMATS = {  # records, and the messages of each
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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, suffix, tmp_path):
    """To the same messages from every kind of file that can hold them."""
    records, expected = FORMATS[name]
    if suffix != "csv" or not any(isinstance(value, list) for value in records[0].values()):
        assert messages_in(write(tmp_path / f"rows.{suffix}", records), name.split(",")[0]) == expected


@pytest.mark.parametrize("format", ["sharegpt", "messages"])
def test_a_csv_cell_holds_no_list(format, tmp_path):
    path = write(tmp_path / "rows.csv", FORMATS[format][0])
    with pytest.raises(
        UserError, match=f"^{path}, line 2: .* is text; expected a list of .*; a CSV cell holds no list"
    ):
        rows_in(path, format)


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


def test_what_is_passed_over_is_counted(tmp_path):
    """Columns and keys that say nothing to a format, and rows of OpenOrca that come twice."""
    first, second = dict(zip(COLUMNS, ("1", "s", "q", "r"))), dict(zip(COLUMNS, ("1", "s", "q", "another")))
    records = [first, second, first, second, first | {"id": "2"}, first | {"id": None}, first | {"id": None}]
    counts = Counter()
    rows = rows_in(write(tmp_path / "rows.jsonl", [record | {"target": 0} for record in records]), counts=counts)
    assert [row.number for row in rows] == [1, 2, 5, 6, 7]
    told = {"read": 7, "with the unused column target": 7, "dropped: repeated": 2, "with the id of another row": 1}
    assert +counts == told
    turns = [message("user", "q", name="Ada"), message("assistant", "a", tool_calls=None)]
    counts = Counter()
    rows_in(write(tmp_path / "turns.jsonl", [{"messages": turns, "source": "x"}]), "messages", counts=counts)
    assert counts == {"read": 1, "with the unused column source": 1, "messages with the unused key name": 1}


CHAT = [message("user", "q"), message("assistant", "a")]
HOSTILE = {  # format, record, complaint
    "no list": ("messages", {"messages": {"role": "user"}}, "messages is dict; expected a list"),
    "null": ("messages", {"messages": None}, "messages is null; expected a list"),
    "null inside": ("messages", {"messages": [None]}, r"messages\[0\] is null; expected"),
    "lists in lists": ("sharegpt", {"conversations": [[1]]}, r"conversations\[0\] is list; expected"),
    "text inside": ("sharegpt", {"conversations": ["hi"]}, r"conversations\[0\] is text; expected"),
    "another format": (
        "messages",
        {"messages": SHAREGPT[0]},
        r"messages\[0\] has from, value; expected {role, content}",
    ),
    "another format's column": (
        "messages",
        {"conversations": CHAT},
        "no column messages; format messages needs messages, found conversations",
    ),
    "another role": (
        "messages",
        {"messages": [*CHAT, message("tool", "x")]},
        r"messages\[2\].role is 'tool'; expected one of system, user",
    ),
    "a role of ShareGPT": ("messages", {"messages": [message("human", "x")]}, r"messages\[0\].role is 'human'"),
    "a role that is a list": (
        "sharegpt",
        {"conversations": [{"from": ["human"], "value": ""}]},
        r"conversations\[0\].from is \['human'\]",
    ),
    "parts": (
        "messages",
        {"messages": [message("user", [{"type": "text"}])]},
        r"messages\[0\].content is list; expected text",
    ),
    "no content": ("messages", {"messages": [message("user", None)]}, r"messages\[0\].content is null; expected text"),
    "half a character": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "\ud83e"}]},
        r"conversations\[0\].value holds bytes",
    ),
    "weight": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]},
        r"messages\[1\].weight is 0.5; expected 0 or 1",
    ),
    "weight of truth": (
        "messages",
        {"messages": [CHAT[0], CHAT[1] | {"weight": True}]},
        r"messages\[1\].weight is True",
    ),
    "weight of text": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "", "weight": "1"}]},
        r"conversations\[0\].weight is '1'",
    ),
    "number": ("alpaca", {"instruction": 1, "output": "x"}, "instruction is int; expected text"),
    "no output": ("alpaca", {"instruction": "x"}, "no column output"),
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


GOOD = json.dumps(RECORDS[0])
HEADER = "id,system_prompt,question,response\n"
BAD_FILES = {
    "syntax": ("jsonl", f'{GOOD}\n\n{{"id": "2", "question": }}\n', "line 3: not valid JSON .*column 25"),
    "cut line": ("jsonl", f"{GOOD}\n{GOOD[:40]}", "line 2: not valid JSON"),
    "array": ("jsonl", f"{GOOD}\n[1]\n", "line 2: expected an object with columns, found list"),
    "one array of rows": ("json", f"[{GOOD}]", "line 1: expected an object with columns, found list"),
    "missing column": (
        "jsonl",
        f'{GOOD}\n{{"question": "", "s": ""}}',
        "line 2: no column system_prompt.*found question, s",
    ),
    "number": (
        "jsonl",
        '{"system_prompt": null, "question": 7, "response": "r"}',
        "line 1: question is int; expected text",
    ),
    "list": (
        "jsonl",
        '{"system_prompt": "", "question": "q", "response": ["r"]}',
        "line 1: response is list; expected text",
    ),
    "half a character": (
        "jsonl",
        '{"system_prompt": "", "question": "q", "response": "\\ud83e"}',
        "line 1: response holds",
    ),
    "bytes": ("jsonl", GOOD.encode() + b"\n" + GOOD.encode().replace(b"What", b"\xe9"), "line 2: question holds bytes"),
    "other encoding": ("jsonl", GOOD.encode("utf-16"), "line 1: "),
    "deep": ("jsonl", f"{GOOD}\n{'[' * 100_000}", "line 2: "),
    "long number": ("jsonl", f'{GOOD}\n{{"question": {"9" * 5000}}}', "line 2: "),
    "an array over lines": (
        "json",
        '[\n  {"question": "a"}\n]',
        "line 1: expected an object with columns, found list; .*jq",
    ),
    "key twice": (
        "jsonl",
        f'{GOOD}\n{{"question": "a", "x": {{"b": 1, "b": 2}}}}',
        "line 2: cannot be read .*'b' is there twice",
    ),
    "not a number": ("jsonl", '{"question": NaN}', "line 1: cannot be read .NaN is no number of JSON"),
    "csv: column twice": ("csv", "id,question,question\n1,a,b\n", "line 1: names the column question twice"),
    "csv: cell too many": ("csv", HEADER + '1,,"a\nb",c\n2,,d,e,f\n', "line 4: found 5 cells; the header has 4"),
    "csv: cell too few": ("csv", HEADER + "1,,a,b\n2,,c\n", "line 3: found 3 cells; the header has 4"),
    "csv: missing column": ("csv", "id,question,response\n1,a,b\n", "line 2: no column system_prompt"),
    "csv: open quote": ("csv", HEADER + '1,,a,b\n2,,"c,d\n3,,e,f\n', "line 3: not valid CSV"),
    "csv: text after a quote": ("csv", HEADER + '1,,"a"b,c\n', "line 2: not valid CSV"),
    "csv: bytes": (
        "csv",
        b"id,system_prompt,question,response\n1,,a,b\n2,,caf\xe9,d\n",
        "line 3: question holds bytes",
    ),
    "parquet: no parquet": ("parquet", GOOD, "cannot be read as parquet"),
    "parquet: empty": ("parquet", "", "cannot be read as parquet"),
    "another name": ("txt", GOOD, "expected a name ending in .jsonl, .json, .csv, .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_line(name, tmp_path):
    suffix, content, complaint = BAD_FILES[name]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^{path}(, |: ){complaint}"):
        rows_in(path)


@pytest.mark.parametrize(
    "column, values, complaint",
    [
        ("question", pyarrow.array([b"bytes"]), "row 1: question is bytes; expected text"),
        ("response", pyarrow.array([1.5]), "row 1: response is float; expected text"),
        ("other", pyarrow.array(["a"]), "row 1: no column response"),
        ("response", pyarrow.array([b"caf\xe9"]).view(pyarrow.string()), "cannot be read as parquet"),
    ],
    ids=["bytes", "number", "column", "no utf-8"],
)
def test_bad_parquet_columns(column, values, complaint, tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {"system_prompt": ["s"], "question": ["q"], "response": ["r"]} | {column: values}
    if column == "other":
        del columns["response"]
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(UserError, match=f"^{path}(, |: ){complaint}"):
        rows_in(path)


def test_a_parquet_file_with_a_column_twice(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(UserError, match=f"^{path}: names the column text twice"):
        rows_in(path, "text")


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"^{path}: cannot be read as parquet"):
        rows_in(path)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/rows", "~/nowhere.csv", "/"])
def test_a_file_that_is_not_there(source):
    with pytest.raises(UserError, match=f"^{source}: no such file"):
        rows_in(source)


# ------------------------------------------------------------------------------------------------------------ rendering


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(orca(tmp_path_factory.mktemp("orca")))


def rows_of(*responses: str) -> list[Row]:
    texts = [[{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}] for text in responses]
    return [Row("rows.jsonl", "line", number, messages) for number, messages in enumerate(texts, 1)]


RESPONSES = ["four", "", "  \n", "word " * 30, "word " * 300, "six"]


def rendered(tok, **settings):
    return render_rows(rows_of(*RESPONSES), tok, DataConfig("train.jsonl", **settings), "chatml")


def test_empty_and_long_rows_are_dropped_and_counted(tok):
    whole, everything = rendered(tok)
    assert (everything["kept"], everything["dropped: empty response"]) == (4, 2)
    assert (everything["tokens"], everything["trained tokens"]) == (len(whole.tokens), whole.trained.sum())
    store, counts = rendered(tok, seq_len=64)
    assert (counts["kept"], counts["dropped: too long"], counts["dropped: empty response"], counts["truncated"]) == (
        3,
        1,
        2,
        0,
    )
    assert list(store.lengths) == [length for length in whole.lengths if length <= 64] and len(store) == 3
    assert (counts["tokens"], counts["trained tokens"]) == (len(store.tokens), store.trained.sum())


def test_long_rows_are_truncated(tok):
    """A cut row is the start of the whole one; one whose cut leaves no answer teaches nothing and is dropped."""
    whole, _ = rendered(tok)
    store, counts = rendered(tok, seq_len=64, too_long="truncate")
    assert (counts["kept"], counts["truncated"], counts["dropped: too long"]) == (4, 1, 0)
    for row in range(4):
        for part, all_of_it in zip(store.row(row), whole.row(row)):
            assert np.array_equal(part, all_of_it[:64])
    assert max(store.lengths) == 64 < max(whole.lengths)
    prompt = int(whole.row(0)[1].argmax())
    store, counts = rendered(tok, seq_len=prompt, too_long="truncate")
    assert len(store) == 0 and counts["dropped: nothing to train on"] == 4
    store, counts = rendered(tok, seq_len=prompt + 1, too_long="truncate")
    assert list(store.lengths) == [prompt + 1] * 4 and counts["trained tokens"] == 4


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"empty_response": "error"}, "^rows.jsonl, line 2: the response is empty"),
        ({"too_long": "error", "seq_len": 64}, "^rows.jsonl, line 5: .* tokens, over data.seq_len, 64"),
    ],
)
def test_empty_and_long_rows_are_errors_where_asked(settings, complaint, tok):
    with pytest.raises(UserError, match=complaint):
        rendered(tok, **settings)


def test_what_is_trained(tok):
    """Under `response` the answer and its end, under `all` everything that has a token before it."""
    rows = rows_of("four")
    settings = (DataConfig("x", train_on=train_on) for train_on in ("response", "all"))
    (store, _), (all_of_it, _) = (render_rows(rows, tok, data, "chatml") for data in settings)
    ids, trained = store.row(0)
    assert tok.decode(ids[trained].tolist()) == "four" and ids[trained][-1] == tok.control_ids["<|im_end|>"]
    assert np.array_equal(all_of_it.tokens, store.tokens)
    assert all_of_it.trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_plain_text(tok):
    """No template: a bos if the tokenizer adds one, the text, the end."""
    rows = [Row("rows.jsonl", "line", number, text) for number, text in enumerate(["four", " \n"], 1)]
    store, counts = render_rows(rows, tok, DataConfig("x", train_on="all"), "chatml")
    ids, trained = store.row(0)
    assert ids.tolist() == tok.encode("four", bos=True, eos=True) and trained.tolist() == [False] + [True] * (
        len(ids) - 1
    )
    assert len(store) == 1 and counts["dropped: empty response"] == 1


def spans(mask: list[bool]) -> list[tuple[int, int]]:
    """Where runs of True start and end."""
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    return list(zip(edges[::2], edges[1::2]))


WEIGHTED = [
    *conversation("Be brief.", "One"),
    message("assistant", "1", weight=0),
    *conversation("", "Two", "2"),
    message("user", "Three"),
]


@pytest.mark.parametrize("template", ["chatml", "mistral-v1", "mistral-v3", "jinja"])
def test_answers_of_weight_0_are_not_trained(template, tmp_path):
    """Whatever the template: the same ids, without that answer's in the mask."""
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokens = {
        "</s>": 2,
        "<s>": 1,
        "<unk>": 0,
        "<|im_end|>": 32000,
        "<|im_start|>": 32001,
        "[INST]": 32002,
        "[/INST]": 32003,
    }
    orca(tmp_path / "model", added_tokens=tokens)
    (tmp_path / "model" / "chat_template.jinja").write_text(chatml)
    tok = load_tokenizer(tmp_path / "model")
    bare = [{key: m[key] for key in ("role", "content")} for m in WEIGHTED]
    weighted, every = render(tok, WEIGHTED, template), render(tok, bare, template)
    assert weighted.ids == every.ids
    one, two = spans(every.trained)
    assert spans(weighted.trained) == [two] and tok.decode(every.ids[slice(*one)]).strip() == "1"
    assert tok.decode(weighted.ids[slice(*two)]).strip() == "2" and weighted.ids[two[1] - 1] == tok.eos_id


def test_an_answer_that_is_not_trained_may_change_with_what_follows(tmp_path):
    """A template that cuts the thoughts from earlier answers has no mask for them, and needs none where their weight is 0."""
    orca(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(FORGETFUL)
    tok = load_tokenizer(tmp_path / "model")
    messages = conversation("", "One", "<think>a</think>1", "Two", "<think>b</think>2")
    with pytest.raises(UserError, match=r"writes messages\[1\] differently .* or give that message the weight 0"):
        render(tok, messages, "jinja")
    messages[1]["weight"] = 0
    rendered = render(tok, messages, "jinja")
    ((start, end),) = spans(rendered.trained)
    assert tok.decode(rendered.ids[start:end]).strip() == "<think>b</think>2" and "a</think>" not in tok.decode(
        rendered.ids
    )


# -------------------------------------------------------------------------------------------------------------- packing


def drawn_lengths(seed: int) -> tuple[np.ndarray, int]:
    """Lengths of very different kinds, and a capacity of at least the longest."""
    draw = np.random.default_rng(seed)
    count, longest = int(draw.integers(1, 200)), int(draw.integers(1, 300))
    kinds = [
        draw.integers(1, longest + 1, count),
        np.full(count, longest),
        np.clip(draw.lognormal(3, 1.5, count), 1, longest).astype(int),
        np.where(draw.random(count) < 0.5, 1, longest),
    ]
    return kinds[seed % len(kinds)], longest + int(draw.integers(0, 2) * draw.integers(0, 500))


@pytest.mark.parametrize("seed", range(60))
def test_every_row_once_and_no_micro_batch_too_full(seed):
    """Whatever the lengths; epochs are equally long, and only the last step of one may be short."""
    lengths, capacity = drawn_lengths(seed)
    micro_batches = 1 + seed % 5
    counts = set()
    for epoch in range(3):
        plan = plan_epoch(lengths, capacity, micro_batches, True, seed, epoch)
        bins = [rows for step in plan for rows in step]
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert all(0 < lengths[rows].sum() <= capacity for rows in bins)
        assert all(len(step) == micro_batches for step in plan[:-1]) and 0 < len(plan[-1]) <= micro_batches
        counts.add(len(bins))
    assert len(counts) == 1
    assert counts.pop() <= max(1, 2 * lengths.sum() / capacity)  # no two bins could be one


def orca_lengths(count: int = 20_000) -> np.ndarray:
    """As skewed as OpenOrca's: a median of 270 tokens, one row in a hundred over 2200."""
    return np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, count), 8, 4096).astype(np.int64)


def listed(plan) -> list[list[int]]:
    """The micro-batches of steps, one after the other."""
    return [rows.tolist() for step in plan for rows in step]


def test_the_plan_is_a_function_of_lengths_seed_and_epoch():
    """No other state of the process changes it; another seed or epoch does, and how steps are cut does not."""
    lengths = orca_lengths(2000)
    plan = plan_epoch(lengths, 4096, 4, True, seed=5, epoch=1)
    random.seed(1)
    np.random.seed(1)
    assert listed(plan_epoch(lengths.copy(), 4096, 4, True, seed=5, epoch=1)) == listed(plan)
    assert listed(plan_epoch(lengths, 4096, 4, True, seed=5, epoch=2)) != listed(plan)
    assert listed(plan_epoch(lengths, 4096, 4, True, seed=6, epoch=1)) != listed(plan)
    assert listed(plan_epoch(lengths, 4096, 7, True, seed=5, epoch=1)) == listed(plan)


def test_packing_fills_micro_batches():
    lengths = orca_lengths()
    plans = [plan_epoch(lengths, 4096, 8, True, seed=0, epoch=epoch) for epoch in range(3)]
    counts = [sum(map(len, plan)) for plan in plans]
    assert len(set(counts)) == 1
    assert lengths.sum() / (counts[0] * 4096) >= 0.98
    together = [{row: tuple(rows) for step in plan for rows in step for row in rows} for plan in plans]
    assert sum(together[0][row] == together[1][row] for row in range(len(lengths))) < 0.1 * len(
        lengths
    )  # new company each epoch


def test_long_rows_come_at_any_time():
    """Bins are filled from the longest row down; an epoch does not run in that order."""
    lengths = orca_lengths()
    longest = [lengths[rows].max() for step in plan_epoch(lengths, 4096, 8, True, seed=0, epoch=0) for rows in step]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.1


def greedy(lengths: list[int], capacity: int) -> list[tuple[int, ...]]:
    """The rule of packing in its plainest form: the lengths in each bin."""
    left, bins = sorted(lengths), []
    while left:
        room, taken = capacity, []
        while place := bisect.bisect_right(left, room):
            taken.append(left.pop(place - 1))
            room -= taken[-1]
        bins.append(tuple(taken))
    return bins


@pytest.mark.parametrize("lengths", [orca_lengths(200_000), *(drawn_lengths(seed)[0] for seed in range(8))], ids=len)
def test_bins_are_those_of_the_plain_rule(lengths):
    """At any size; every row once."""
    bins = listed(plan_epoch(lengths, 4096, 8, True, seed=1, epoch=0))
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert Counter(tuple(lengths[rows].tolist()) for rows in bins) == Counter(greedy(lengths.tolist(), 4096))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (0.3, 3), (1.7, 0.01), (1e-3, 1)])
def test_sources_come_as_often_as_they_weigh(weights, packing):
    """Epoch e has the places from e*w*n to (e+1)*w*n of an endless repetition of shuffles: every row of a source is drawn k
    times before any is drawn k + 1 times, over any number of epochs."""
    lengths, sizes = orca_lengths(370), (250, 120)
    parts = [(0, 250, weights[0]), (250, 370, weights[1])]
    order = Order(lengths, 4096, 4, packing, seed=3, parts=parts)
    seen, done = Counter(), 0
    for epoch in range(1, 7):
        steps = [order.step(n) for n in range(done + 1, order.steps(epoch) + 1)]
        assert all(len(step) == 4 for step in steps[:-1]) and all(
            0 < lengths[rows].sum() <= 4096 for step in steps for rows in step
        )
        if weights == (1, 1):
            assert sorted(row for rows in listed(steps) for row in rows) == list(range(370))
        seen.update(row for rows in listed(steps) for row in rows)
        done = order.steps(epoch)
        for (first, last, weight), n in zip(parts, sizes):
            drawn = [seen[row] for row in range(first, last)]
            assert sum(drawn) == round(epoch * weight * n) and max(drawn) - min(drawn) <= 1
    again = Order(lengths, 4096, 4, packing, seed=3, parts=parts)  # one that starts in the middle
    assert listed([again.step(done)]) == listed([order.step(done)])


def test_epochs_differ_and_sources_mix():
    """A row has other company in each epoch, and micro-batches hold rows of several sources."""
    order = Order(orca_lengths(), 4096, 4, True, seed=0, parts=[(0, 10_000, 1), (10_000, 20_000, 1.0)])
    steps = order.steps(1)
    assert order.steps(5) == 5 * steps
    first, second = (listed(order.step(epoch * steps + n) for n in range(1, steps + 1)) for epoch in (0, 1))
    assert len(set(map(frozenset, first)) & set(map(frozenset, second))) < 0.2 * len(
        first
    )  # the longest lengths come once
    assert sum(len({row < 10_000 for row in rows}) == 2 for rows in first) > 0.9 * len(first)


def test_a_source_that_is_all_held_out_and_weights_that_leave_nothing():
    order = Order(np.full(4, 10), 20, 1, True, seed=0, parts=[(0, 0, 1), (0, 4, 1)])
    assert order.steps(1) == 2
    with pytest.raises(UserError, match="data.train: its weights leave no row in 2 epochs"):
        Order(np.full(4, 10), 20, 1, True, seed=0, parts=[(0, 4, 0.01)]).steps(2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_once_on_any_number_of_ranks(ranks):
    """Ranks take a step's micro-batches in turn, from an order made by each for itself."""
    lengths, seen = orca_lengths(500), Counter()
    for rank in range(ranks):
        order = Order(lengths, 4096, 6, True, seed=0)
        seen.update(
            row for n in range(1, order.steps(1) + 1) for rows in order.step(n)[rank::ranks] for row in rows.tolist()
        )
    assert seen == Counter(range(500))


def test_without_packing_a_micro_batch_is_a_row():
    lengths = orca_lengths(50)
    plan = plan_epoch(lengths, 4096, 8, False, seed=0, epoch=0)
    rows = [rows for step in plan for rows in step]
    assert [len(step) for step in plan] == [8] * 6 + [2] and {len(row) for row in rows} == {1}
    order = [row for (row,) in rows]
    assert sorted(order) == list(range(50)) != order


def random_store(seed: int) -> TokenStore:
    draw = np.random.default_rng(seed)
    offsets = np.cumsum([0, *draw.integers(1, 12, 20)])
    trained = draw.random(offsets[-1]) < (0.5, 0, 1)[seed % 3]
    trained[offsets[:-1]] = False
    return TokenStore(draw.integers(0, 1000, offsets[-1]).astype(np.int32), trained, offsets)


@pytest.mark.parametrize("seed", range(9))
def test_targets_are_the_next_tokens_of_the_same_row(seed):
    """Against a loop over rows and tokens."""
    store, rows = random_store(seed), [7, 0, 19, 3]
    batch = make_batch(store, rows)
    tokens, starts, pairs = [], [0], []
    for row in rows:
        ids, trained = store.row(row)
        for place in range(1, len(ids)):
            if trained[place]:
                pairs.append((len(tokens) + place - 1, ids[place]))
        tokens += ids.tolist()
        starts.append(len(tokens))
    assert batch.tokens.tolist() == tokens and batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == starts
    assert list(zip(batch.target_rows.tolist(), batch.targets.tolist())) == pairs
    assert trained_tokens(store, [rows[:3], rows[3:]]) == len(pairs)
    assert not {start - 1 for start in starts} & set(batch.target_rows.tolist())  # a row's last token predicts nothing
    nothing: Batch = batch.without_targets()
    assert nothing.tokens is batch.tokens and len(nothing.target_rows) == len(nothing.targets) == 0


def test_rows_picked_from_a_store():
    store = random_store(0)
    part = store.select([5, 2])
    assert len(part) == 2
    for ours, theirs in ((0, 5), (1, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(part.row(ours), store.row(theirs)))
    assert len(store.select([])) == 0
    counts = [int(store.row(i)[1].sum()) for i in range(20)]
    assert store.trained_counts.tolist() == counts and part.trained_counts.tolist() == [counts[5], counts[2]]
    assert part.lengths.tolist() == store.lengths[[5, 2]].tolist() and np.shares_memory(part.tokens, store.tokens)
    assert (
        len({store.sha256(), part.sha256(), store.select([2, 5]).sha256()}) == 3
        and part.sha256() == store.select([5, 2]).sha256()
    )


# ----------------------------------------------------------------------------------------------------------------- show


@pytest.fixture
def config(tmp_path):
    orca(tmp_path / "model")
    source = write(tmp_path / "rows.jsonl", [RECORDS[0], RECORDS[2], RECORDS[1]])
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: {source}}}\n")
    return str(tmp_path / "run.yaml")


def test_show_marks_what_is_trained(config, capsys, tmp_path):
    main(["show", "--config", config, "--rows", "2"])
    first, second = capsys.readouterr().out.split("--- ")[1:]
    title, text = first.split("\n", 1)
    assert title.startswith(f"{tmp_path}/rows.jsonl, line 1: template chatml, ")
    system = "<s><|im_start|>system\nYou are brief.<|im_end|>\n"
    assert text == system + "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n\n"
    assert second.endswith("<|im_start|>assistant\n«line one\nline two\n\nline four<|im_end|>»\n\n")
    assert second.count("«") == 1 and "system" not in second


def test_show_takes_the_settings_of_training(config, capsys):
    main(["show", "--config", config, "--rows=1", "--data.train_on", "all", "--data.template", "mistral-v1"])
    text = capsys.readouterr().out.split("\n", 1)[1]
    assert text == "<s>«[INST] You are brief.\n\nWhat is 2 + 2? [/INST] 4<|im_end|>»\n"


@pytest.mark.parametrize("format", ["sharegpt", "messages", "alpaca", "prompt_completion"])
def test_show_knows_every_format(format, config, capsys, tmp_path):
    records, _ = FORMATS[format]
    main(
        ["show", "--config", config, "--data.train", write(tmp_path / "others.jsonl", records), "--data.format", format]
    )
    shown = capsys.readouterr().out
    assert shown.count("--- ") == len(records) and "assistant\n«4<|im_end|>»" in shown


def test_show_takes_lists_of_sources(config, capsys, tmp_path):
    """A row of each; plain text is shown too."""
    others = write(tmp_path / "others.jsonl", FORMATS["text"][0])
    sources = f"[{{path: {others}, format: text}}, {{path: {tmp_path}/rows.jsonl}}]"
    main(["show", "--config", config, "--rows", "1", "--data.train_on", "all", "--data.train", sources])
    first, second = capsys.readouterr().out.split("--- ")[1:]
    assert first == f"{others}, line 1: plain text, 6 tokens, 5 trained\n<s>«Once upon a time<|im_end|>»\n"
    assert second.startswith(f"{tmp_path}/rows.jsonl, line 1: template chatml")


@pytest.mark.parametrize("rows", ["-1", "0", "x"])
def test_show_with_bad_numbers(rows, config):
    with pytest.raises(UserError, match="--rows"):
        main(["show", "--config", config, "--rows", rows])


@pytest.mark.parametrize("argv", [[], ["shw"]])
def test_data_takes_a_command_it_has(argv):
    with pytest.raises(UserError, match="minorca.data takes a command: show, prepare"):
        main(argv)


# ------------------------------------------------------------------------------------------------------------- hubs


@pytest.mark.parametrize(
    "source, file, limit",
    [("Open-Orca/OpenOrca:1M-GPT4-Augmented.parquet", "1M-GPT4-Augmented.parquet", None), ("a/b", None, 2)],
)
def test_a_hub_id_is_read_by_datasets(source, file, limit, monkeypatch):
    """Its name and file are asked for; a limited read streams instead of downloading; what goes wrong names the source."""
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or RECORDS)
    assert messages_in(source, limit=limit) == MESSAGES[:limit]
    assert asked == [(source.split(":")[0], {"data_files": file, "split": "train", "streaming": limit is not None})]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: 1 / 0)
    with pytest.raises(UserError, match=f"^{source}: no such file, and as a hub id it cannot be read"):
        rows_in(source)
