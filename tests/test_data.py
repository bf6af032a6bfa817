"""Rows from files, what becomes of them, and batches: every row once, none too long, nothing trained across documents."""

import json
import random

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_tokenizer import orca

from minorca import UserError, load_tokenizer
from minorca.config import DataConfig
from minorca.data.__main__ import main
from minorca.data.packing import Batch, make_batch, plan_epoch, trained_tokens
from minorca.data.sources import Row, read_rows
from minorca.data.store import TokenStore, render_rows

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
    [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), list(record.values())[1:]) if text]
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


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_format_gives_the_same_rows(name, tmp_path):
    """A missing or empty system prompt is no system message; a column too many is nothing to complain of."""
    source = write(tmp_path / name, [record | {"more": 1.5} for record in RECORDS])
    assert [row.messages for row in read_rows(source)] == MESSAGES
    assert [row.messages for row in read_rows(source, 2)] == MESSAGES[:2]


def test_parquet_in_several_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=2)
    assert [row.where for row in read_rows(str(path))] == [f"{path}, row {number}" for number in range(1, 6)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    path = tmp_path / name
    write(path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.messages for row in read_rows(str(path))] == MESSAGES


def test_places_in_jsonl(tmp_path):
    """Blank lines are passed over and counted, whatever ends a line."""
    path = tmp_path / "rows.jsonl"
    lines = ["", json.dumps(RECORDS[0]), "   ", *(json.dumps(record, ensure_ascii=False) for record in (RECORDS[1], RECORDS[3]))]
    path.write_bytes("\r\n".join(lines).encode())
    assert [row.where for row in read_rows(str(path))] == [f"{path}, line {number}" for number in (2, 4, 5)]


def test_places_in_csv_are_where_rows_start(tmp_path):
    """A cell may hold lines, and a file blank ones."""
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,system_prompt,question,response\n1,,"a\nb\r\nc",d\n2,,e,f\n\n3,,"g\n",h\n4,,i,j\n')
    rows = list(read_rows(str(path)))
    assert [row.where for row in rows] == [f"{path}, line {number}" for number in (2, 5, 7, 9)]
    assert rows[0].messages[0]["content"] == "a\nb\r\nc"


GOOD = json.dumps(RECORDS[0])
HEADER = "id,system_prompt,question,response\n"
BAD_FILES = {
    "syntax": ("jsonl", f'{GOOD}\n\n{{"id": "2", "question": }}\n', "line 3: not valid JSON .*column 25"),
    "cut line": ("jsonl", f"{GOOD}\n{GOOD[:40]}", "line 2: not valid JSON"),
    "array": ("jsonl", f"{GOOD}\n[1]\n", "line 2: expected an object with columns, found list"),
    "one array of rows": ("json", f"[{GOOD}]", "line 1: expected an object with columns, found list"),
    "missing column": ("jsonl", f'{GOOD}\n{{"question": "", "s": ""}}', "line 2: no column system_prompt.*found question, s"),
    "number": ("jsonl", '{"system_prompt": null, "question": 7, "response": "r"}', "line 1: question is int; expected text"),
    "list": ("jsonl", '{"system_prompt": "", "question": "q", "response": ["r"]}', "line 1: response is list; expected text"),
    "half a character": ("jsonl", '{"system_prompt": "", "question": "q", "response": "\\ud83e"}', "line 1: response holds"),
    "bytes": ("jsonl", GOOD.encode() + b"\n" + GOOD.encode().replace(b"What", b"\xe9"), "line 2: question holds bytes"),
    "other encoding": ("jsonl", GOOD.encode("utf-16"), "line 1: "),
    "deep": ("jsonl", f'{GOOD}\n{"[" * 100_000}', "line 2: "),
    "long number": ("jsonl", f'{GOOD}\n{{"question": {"9" * 5000}}}', "line 2: "),
    "csv: cell too many": ("csv", HEADER + '1,,"a\nb",c\n2,,d,e,f\n', "line 4: found 5 cells; the header has 4"),
    "csv: cell too few": ("csv", HEADER + "1,,a,b\n2,,c\n", "line 3: found 3 cells; the header has 4"),
    "csv: missing column": ("csv", "id,question,response\n1,a,b\n", "line 2: no column system_prompt"),
    "csv: open quote": ("csv", HEADER + '1,,a,b\n2,,"c,d\n3,,e,f\n', "line 3: not valid CSV"),
    "csv: text after a quote": ("csv", HEADER + '1,,"a"b,c\n', "line 2: not valid CSV"),
    "csv: bytes": ("csv", b"id,system_prompt,question,response\n1,,a,b\n2,,caf\xe9,d\n", "line 3: question holds bytes"),
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
        list(read_rows(str(path)))


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
        list(read_rows(str(path)))


def test_a_truncated_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"^{path}: cannot be read as parquet"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/rows", "~/nowhere.csv", "/"])
def test_a_file_that_is_not_there(source):
    with pytest.raises(UserError, match=f"^{source}: no such file"):
        list(read_rows(source))


# ------------------------------------------------------------------------------------------------------------ rendering


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(orca(tmp_path_factory.mktemp("orca")))


def rows_of(*responses: str) -> list[Row]:
    texts = [[{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}] for text in responses]
    return [Row(f"rows.jsonl, line {number}", messages) for number, messages in enumerate(texts, 1)]


RESPONSES = ["four", "", "  \n", "word " * 30, "word " * 300, "six"]


def rendered(tok, **settings):
    return render_rows(rows_of(*RESPONSES), tok, DataConfig("train.jsonl", **settings), "chatml")


def test_empty_and_long_rows_are_dropped_and_counted(tok):
    whole, everything = rendered(tok)
    assert (everything["read"], everything["kept"], everything["dropped: empty response"]) == (6, 4, 2)
    assert (everything["tokens"], everything["trained tokens"]) == (len(whole.tokens), whole.trained.sum())
    store, counts = rendered(tok, seq_len=64)
    assert (counts["kept"], counts["dropped: too long"], counts["dropped: empty response"], counts["truncated"]) == (3, 1, 2, 0)
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


def test_the_plan_is_a_function_of_lengths_seed_and_epoch():
    """No other state of the process changes it; another seed or epoch does, and how steps are cut does not."""
    lengths = orca_lengths(2000)
    plan = plan_epoch(lengths, 4096, 4, True, seed=5, epoch=1)
    random.seed(1)
    np.random.seed(1)
    assert plan_epoch(lengths.copy(), 4096, 4, True, seed=5, epoch=1) == plan
    assert plan_epoch(lengths, 4096, 4, True, seed=5, epoch=2) != plan
    assert plan_epoch(lengths, 4096, 4, True, seed=6, epoch=1) != plan
    flat = [rows for step in plan for rows in step]
    assert [rows for step in plan_epoch(lengths, 4096, 7, True, seed=5, epoch=1) for rows in step] == flat


def test_packing_fills_micro_batches():
    lengths = orca_lengths()
    plans = [plan_epoch(lengths, 4096, 8, True, seed=0, epoch=epoch) for epoch in range(3)]
    counts = [sum(map(len, plan)) for plan in plans]
    assert len(set(counts)) == 1
    assert lengths.sum() / (counts[0] * 4096) >= 0.98
    together = [{row: tuple(rows) for step in plan for rows in step for row in rows} for plan in plans]
    assert sum(together[0][row] == together[1][row] for row in range(len(lengths))) < 0.1 * len(lengths)  # new company each epoch


def test_long_rows_come_at_any_time():
    """Bins are filled from the longest row down; an epoch does not run in that order."""
    lengths = orca_lengths()
    longest = [lengths[rows].max() for step in plan_epoch(lengths, 4096, 8, True, seed=0, epoch=0) for rows in step]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.1


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


@pytest.mark.parametrize("rows", ["-1", "0", "x"])
def test_show_with_bad_numbers(rows, config):
    with pytest.raises(UserError, match="--rows"):
        main(["show", "--config", config, "--rows", rows])


@pytest.mark.parametrize("argv", [[], ["shw"], ["prepare"]])
def test_data_takes_a_command_it_has(argv):
    with pytest.raises(UserError, match="minorca.data takes a command: show"):
        main(argv)


# ------------------------------------------------------------------------------------------------------------- hubs


@pytest.mark.parametrize("source, file, limit", [("Open-Orca/OpenOrca:1M-GPT4-Augmented.parquet", "1M-GPT4-Augmented.parquet", None), ("a/b", None, 2)])
def test_a_hub_id_is_read_by_datasets(source, file, limit, monkeypatch):
    """Its name and file are asked for; a limited read streams instead of downloading; what goes wrong names the source."""
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or RECORDS)
    assert [row.messages for row in read_rows(source, limit)] == MESSAGES[:limit]
    assert asked == [(source.split(":")[0], {"data_files": file, "split": "train", "streaming": limit is not None})]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: 1 / 0)
    with pytest.raises(UserError, match=f"^{source}: no such file, and as a hub id it cannot be read"):
        next(read_rows(source))
