"""What becomes of each row: dropped, truncated or kept, its ids and what is trained of them, and the golden rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minorca import UserError, load_tokenizer
from minorca.config import DataConfig, Source
from minorca.data import rendering
from minorca.data.chat_template import render
from minorca.data.conversation import Conversation, drop_empty_answers
from minorca.data.rendering import render_row, render_rows
from minorca.data.sources import Row
from minorca.data.tally import raise_errors
from tests.data import write_golden
from tests.data.samples import conversation, message, path_of, prepare, records, same_rows, write
from tests.data.test_chat_template import FORGETFUL
from tests.data.test_tokenizer import orca


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(orca(tmp_path_factory.mktemp("orca")))


def rows_of(*responses: str) -> list[Row]:
    conversations = [conversation("", "Say it", response) for response in responses]
    return [Row("rows.jsonl", "line", number, Conversation(m)) for number, m in enumerate(conversations, 1)]


RESPONSES = ["four", "", "  \n", "word " * 30, "word " * 300, "six"]


def rendered(tok, **settings):
    """The store and the counts of RESPONSES."""
    store, tally = render_rows(rows_of(*RESPONSES), tok, DataConfig("train.jsonl", **settings), "chatml")
    raise_errors([tally])
    return store, tally.counts


def test_empty_and_long_rows_are_dropped_and_counted(tok):
    whole, everything = rendered(tok)
    assert (everything["kept"], everything["dropped: empty response"]) == (4, 2)
    assert (everything["tokens"], everything["trained tokens"]) == (len(whole.tokens), whole.trained.sum())
    store, counts = rendered(tok, seq_len=64)
    assert (counts["kept"], counts["dropped: too long"], counts["dropped: empty response"]) == (3, 1, 2)
    assert counts["truncated"] == 0
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
        ({"too_long": "error", "seq_len": 64}, "^rows.jsonl, line 5: has .* tokens, more than data.seq_len, 64"),
    ],
)
def test_empty_and_long_rows_are_errors_where_asked(settings, complaint, tok):
    with pytest.raises(UserError, match=complaint):
        rendered(tok, **settings)


def test_what_is_trained(tok):
    """Under `response` the answer and its end, under `all` everything that has a token before it."""
    rows = rows_of("four")
    store, _ = render_rows(rows, tok, DataConfig("x", train_on="response"), "chatml")
    all_of_it, _ = render_rows(rows, tok, DataConfig("x", train_on="all"), "chatml")
    ids, trained = store.row(0)
    assert tok.decode(ids[trained].tolist()) == "four" and ids[trained][-1] == tok.control_ids["<|im_end|>"]
    assert np.array_equal(all_of_it.tokens, store.tokens)
    assert all_of_it.trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_plain_text(tok):
    """No template: a bos if the tokenizer adds one, the text, the end."""
    rows = [Row("rows.jsonl", "line", number, text) for number, text in enumerate(["four", " \n"], 1)]
    store, tally = render_rows(rows, tok, DataConfig("x", train_on="all"), "chatml")
    ids, trained = store.row(0)
    assert ids.tolist() == tok.encode("four", bos=True, eos=True)
    assert trained.tolist() == [False] + [True] * (len(ids) - 1)
    assert len(store) == 1 and tally.counts["dropped: empty response"] == 1
    assert tally.notes == {}


# Answers of a conversation, by their questions' numbers: which turns are left, and how many answers were empty.
EMPTY = {
    "in the middle": (["1", " \n", "3"], [0, 2], 1),
    "at the start": (["", "2", "3"], [1, 2], 1),
    "at the end": (["1", "2", ""], [0, 1], 1),
    "all but one": (["", "2", "\t"], [1], 2),
    "none": (["1", "2"], [0, 1], 0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_answer_drops_its_turn(name, tok):
    """Not its conversation: what is left is rendered as if the turn had never been there."""
    answers, left, count = EMPTY[name]
    turns = [[message("user", f"q{n}"), message("assistant", answer)] for n, answer in enumerate(answers)]
    rows, expected = (
        [Row("rows.jsonl", "line", 1, Conversation([message("system", "s"), *chain(*(turns[n] for n in numbers))]))]
        for numbers in (range(len(turns)), left)
    )
    store, tally = render_rows(rows, tok, DataConfig("x"), "chatml")
    assert tally.counts["empty answers, dropped with their questions"] == count
    assert same_rows(store, render_rows(expected, tok, DataConfig("x"), "chatml")[0])
    _, tally = render_rows(rows, tok, DataConfig("x", empty_response="error"), "chatml")
    assert [error.message.partition(";")[0] for error in tally.errors] == ["the response is empty"] * bool(count)


def test_what_counts_as_an_empty_answer():
    """Not one with tool calls, nor one that is not trained; a turn goes from a question to before the next."""
    call = message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
    unused = message("assistant", "", weight=0)
    for kept in ([message("user", "q"), call], [message("user", "q"), unused, message("user", "r")]):
        assert drop_empty_answers(kept) == (kept, 0)
    empty = message("assistant", "")
    asked = [message("user", "q"), message("user", "more"), call, message("tool", "1"), empty]
    for rest in ([], conversation("", "q", "a")):
        assert drop_empty_answers([message("system", "s"), *asked, *rest]) == ([message("system", "s"), *rest], 1)
    # Another answer to the same question stands.
    two = [message("user", "q"), message("assistant", "a"), message("assistant", "")]
    assert drop_empty_answers(two) == (two[:2], 1)
    assert drop_empty_answers([message("assistant", " "), *conversation("", "q", "a")]) == (
        conversation("", "q", "a"),
        1,
    )


@pytest.mark.parametrize("seq_len", [2, 3, 7, 50, 10_000])
def test_text_is_split(seq_len, tok):
    """Each piece has at most seq_len tokens, and all trained tokens of the whole, each once and in order, with the same
    token before it.
    """
    texts = ["one", "word " * 40, "Ünï 日本語 " * 9, "x" * 333]
    for text in texts:
        row = Row("rows.txt", "document", 1, text)
        whole, _ = render_rows([row], tok, DataConfig("x", train_on="all", seq_len=10**6), "chatml")
        pieces, tally = render_rows([row], tok, DataConfig("x", train_on="all", seq_len=seq_len, too_long="split"), "c")
        assert max(pieces.lengths) <= seq_len and tally.counts["kept"] == len(pieces)
        assert tally.counts["split"] == (len(whole.tokens) > seq_len) and not tally.tokens
        pairs = []
        for n in range(len(pieces)):
            ids, trained = pieces.row(n)
            assert not trained[0] and len(ids) > 1
            pairs += [(ids[i - 1], ids[i]) for i in np.flatnonzero(trained)]
        ids, trained = whole.row(0)
        assert pairs == [(ids[i - 1], ids[i]) for i in np.flatnonzero(trained)]


def test_tokens_that_are_not_used_are_counted(tok):
    whole, _ = rendered(tok)
    lost = [length - 64 for length in whole.lengths if length > 64]
    for too_long, outcome, tokens in (
        ("truncate", "truncated", sum(lost)),
        ("drop", "dropped: too long", sum(lost) + 64 * len(lost)),
    ):
        settings: dict[str, Any] = {"seq_len": 64, "too_long": too_long}
        _, tally = render_rows(rows_of(*RESPONSES), tok, DataConfig("x", **settings), "chatml")
        assert tally.tokens[outcome] == tokens and tally.notes[outcome] == f"{tokens:,} tokens"


def test_rendered_text(tok):
    """Control strings of a text are control tokens unless the setting says otherwise, and such rows are counted."""
    texts = ["<s>[INST] q [/INST] a </s>", "no control", "<|im_start|>user\nq<|im_end|>\n"]
    rows = [Row("rows.jsonl", "line", number, text) for number, text in enumerate(texts, 1)]
    parsed, tally = render_rows(rows, tok, DataConfig("x"), "chatml")
    assert [parsed.row(n)[0].tolist() for n in range(3)] == [tok.encode_rendered(text, eos=True) for text in texts]
    assert tally.counts["with control tokens parsed"] == 2
    plain, tally = render_rows(rows, tok, DataConfig("x", parse_control_tokens=False), "chatml")
    assert [plain.row(n)[0].tolist() for n in range(3)] == [tok.encode(text, bos=True, eos=True) for text in texts]
    assert "with control tokens parsed" not in tally.counts
    # Without a template, a prompt and its completion are such text too.
    row = Row("rows.jsonl", "line", 1, Conversation([message("user", "[INST]<s>"), message("assistant", "a</s>")]))
    parsed, tally = render_rows([row], tok, DataConfig("x"), "none")
    assert tally.counts["with control tokens parsed"] == 1 and parsed.row(0)[0].tolist().count(2) == 1
    plain, _ = render_rows([row], tok, DataConfig("x", parse_control_tokens=False), "none")
    assert 2 not in plain.row(0)[0]


def test_control_strings_in_a_conversation_stay_text(tok):
    row = Row("rows.jsonl", "line", 1, Conversation([message("user", "</s>"), message("assistant", "<|im_end|>")]))
    ids, _, _ = render_row(row, tok, "chatml", DataConfig("x"))
    # The bos, and the start and end of each of the two messages.
    assert sum(i in tok.control_ids.values() for i in ids.tolist()) == 5


def test_errors_name_the_row(tok, tmp_path):
    """And the model too, where its template is at fault."""
    row = Row("rows.jsonl", "line", 3, Conversation([message("user", "x"), message("narrator", "y")]))
    with pytest.raises(UserError, match="^rows.jsonl, line 3: .*narrator") as caught:
        render_row(row, tok, "chatml", DataConfig("x"))
    assert (caught.value.path, caught.value.where, caught.value.field) == ("rows.jsonl", "line 3", "messages[1].role")
    orca(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    failing = load_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match=f"^rows.jsonl, line 1: {tmp_path}/model: the chat template failed: never"):
        render_row(rows_of("four")[0], failing, "jinja", DataConfig("x"))


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
    """A template that removes the thoughts of earlier answers allows no mask for them; with weight 0 none is needed."""
    orca(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(FORGETFUL)
    tok = load_tokenizer(tmp_path / "model")
    messages = conversation("", "One", "<think>a</think>1", "Two", "<think>b</think>2")
    with pytest.raises(UserError, match=r"writes messages\[1\] differently .* or give that message the weight 0"):
        render(tok, messages, "jinja")
    messages[1]["weight"] = 0
    rendered = render(tok, messages, "jinja")
    ((start, end),) = spans(rendered.trained)
    assert tok.decode(rendered.ids[start:end]).strip() == "<think>b</think>2"
    assert "a</think>" not in tok.decode(rendered.ids)


# ------------------------------------------------------------------------------------------------------------ parallel


@pytest.fixture
def threads(monkeypatch):
    """`threads(model, data)`: rows are rendered in parallel, in chunks of three, by threads, which start at once."""

    def use(model: Path, data: DataConfig, template: str = "chatml") -> None:
        monkeypatch.setattr(rendering, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
        monkeypatch.setattr(rendering, "_worker", (load_tokenizer(model), data, template))
        monkeypatch.setattr(rendering, "SERIAL_ROWS", 0)
        monkeypatch.setattr(rendering, "CHUNK_ROWS", 3)

    return use


def test_parallel_is_serial(model, data, tmp_path, threads):
    """Byte for byte, dropped rows and counts included."""
    settings = replace(data, seq_len=64)
    serial = prepare(settings, model)
    threads(model, settings)
    parallel = prepare(replace(settings, store=str(tmp_path / "parallel")), model)
    files = {path.name: path.read_bytes() for path in path_of(parallel).iterdir()}
    assert files == {path.name: path.read_bytes() for path in path_of(serial).iterdir()} and len(files) == 8
    assert parallel.sources[0].counts["dropped: too long"] > 5


def test_trees_rendered_in_parallel_are_those_rendered_here(model, data, tmp_path, threads):
    """Byte for byte; of some chunks of three rows, none is left."""
    made = [
        {
            "prompt": f"Say {n}",
            "chosen": "yes " * (1 + n % 30),
            "rejected": "no",
            "status": "tie" if 9 < n < 20 else None,
        }
        for n in range(60)
    ]
    source = Source(write(tmp_path / "pairs.jsonl", made))
    settings = replace(data, train=[source], format="preference", seq_len=32)
    serial = prepare(settings, model)
    threads(model, settings)
    parallel = prepare(replace(settings, store=str(tmp_path / "parallel")), model)
    files = {path.name: path.read_bytes() for path in path_of(parallel).iterdir()}
    assert files == {path.name: path.read_bytes() for path in path_of(serial).iterdir()} and len(files) == 11
    assert parallel.sources[0].counts["dropped: tie"] == 10 and parallel.sources[0].counts["dropped: too long"] > 5


@pytest.mark.parametrize(
    "line, complaint",
    [(50, "line 16: has .* tokens, more than"), (10, "line 10: not valid JSON"), (16, "line 16: not valid")],
)
def test_the_first_row_that_is_wrong_is_reported(line, complaint, model, data, threads):
    """Though reading runs ahead of rendering: here the 16th row is too long."""
    path = Path(data.train[0].path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[: line - 1], "{", *lines[line:]]))
    settings = replace(data, seq_len=64, too_long="error")
    threads(model, settings)
    with pytest.raises(UserError, match=f"^{path}, {complaint}"):
        prepare(settings, model)


def bad_rows(path: Path) -> list[str]:
    """Writes 60 rows, of which three cannot be parsed, three lack a column and three have a number; their places."""
    lines = [json.dumps(record) for record in records(60)]
    for n in (4, 20, 41):
        lines[n] = lines[n][: 20 + n % 3]
        lines[n + 1] = json.dumps({"question": "q", "response": "r"})
        lines[n + 2] = json.dumps({"system_prompt": "", "question": n, "response": "r"})
    path.write_text("\n".join(lines))
    order = [5, 21, 42, 6, 22, 43, 7, 23, 44]
    return [f"{path}, line {n}" for n in order]


@pytest.mark.parametrize("parallel", [False, True])
def test_invalid_rows_are_listed_together(parallel, model, data, threads):
    """By reason, in the order of the rows within each; above twenty, how many more."""
    places = bad_rows(Path(data.train[0].path))
    if parallel:
        threads(model, data)
    with pytest.raises(UserError) as caught:
        prepare(data, model)
    *problems, advice = caught.value.problems
    assert [f"{problem.path}, {problem.where}" for problem in problems] == places
    assert str(advice) == "set data.bad_rows to drop to leave invalid rows out"
    path = Path(data.train[0].path)
    path.write_text("{\n" * 19 + "[1]\n" * 3 + path.read_text())
    with pytest.raises(UserError) as caught:
        prepare(data, model)
    problems = caught.value.problems
    assert [problem.where for problem in problems[:-1]] == [f"line {n}" for n in range(1, 21)]
    assert str(problems[-1]) == ("and 11 more rows; fix them, or set data.bad_rows to drop to leave invalid rows out")
    # Also after a file that ends where nobody can tell what follows.
    path.with_name("rows.json").write_text('[{"system_prompt": "", "question": 1, "response": "r"}, {"id"')
    source = replace(data.train[0], path=str(path.with_name("rows.json")))
    for settings in (data, replace(data, bad_rows="drop")):
        if parallel:
            threads(model, settings)
        with pytest.raises(UserError, match="rows.json, line 1: not valid JSON") as caught:
            prepare(replace(settings, train=[source, *data.train]), model)
        assert [problem.sentence[:8] for problem in caught.value.problems] == (
            ["question", "not vali"] if settings is data else ["not vali"]
        )


@pytest.mark.parametrize("parallel", [False, True])
def test_invalid_rows_are_dropped(parallel, model, data, threads, caplog):
    """And counted by reason, with the first places; the others are as in a file without them."""
    caplog.set_level("INFO", "minorca")
    path = Path(data.train[0].path)
    places = bad_rows(path)
    settings = replace(data, bad_rows="drop")
    if parallel:
        threads(model, settings)
    store = prepare(settings, model)
    counts = store.sources[0].counts
    reasons = [
        "dropped: not valid JSON (Unterminated string starting at, column N)",
        "dropped: column system_prompt is missing",
        "dropped: question is int",
    ]
    assert [counts[reason] for reason in reasons] == [3, 3, 3] and (counts["read"], counts["kept"]) == (60, 51)
    for n, reason in enumerate(reasons):
        assert store.sources[0].notes[reason] == "; ".join(places[3 * n : 3 * n + 3])
    store.report()
    assert f"3 {reasons[2]} ({places[6]}; {places[7]}; {places[8]})" in caplog.messages[0]
    numbers = [int(number) for number in store.numbers[:51]]
    assert numbers == [n for n in range(1, 61) if f"{path}, line {n}" not in places]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[n - 1] for n in numbers))
    assert prepare(data, model).sha256() == store.sha256()


def test_rows_that_a_template_rejects_are_invalid(tok):
    rows = rows_of("one", "two")
    rows[0] = rows[0]._replace(content=Conversation([message("tool", "x"), message("assistant", "y")]))
    _, tally = render_rows(rows, tok, DataConfig("x"), "chatml")
    assert [str(error)[:18] for error in tally.errors] == ["rows.jsonl, line 1"]
    store, tally = render_rows(rows, tok, DataConfig("x", bad_rows="drop"), "chatml")
    assert len(store) == 1 and not tally.errors
    assert list(tally.notes.values()) == ["rows.jsonl, line 1"]
    # But what the settings make an error stays one.
    _, tally = render_rows(rows, tok, DataConfig("x", bad_rows="drop", too_long="error", seq_len=4), "chatml")
    assert [error.where for error in tally.errors] == ["line 2"]


def test_a_table_without_a_column_is_broken(model, data, tmp_path):
    """Whatever becomes of invalid rows: none of its rows could be used."""
    path = tmp_path / "rows.csv"
    path.write_text("question,response\n" + "q,r\n" * 30)
    with pytest.raises(UserError, match=f"^{path}: column system_prompt is missing") as caught:
        prepare(replace(data, train=str(path), bad_rows="drop"), model)
    assert len(caught.value.problems) == 1


def test_a_rendering_process_that_is_killed(model, data, threads, monkeypatch):
    def die(chunk):
        raise BrokenProcessPool

    threads(model, data)
    monkeypatch.setattr(rendering, "_render_in_worker", die)
    with pytest.raises(UserError, match="a process that renders rows was killed, perhaps because memory ran out"):
        prepare(data, model)


# -------------------------------------------------------------------------------------------------------- golden rows


@pytest.fixture(scope="module")
def golden_rows(smollm2, tmp_path_factory):
    return write_golden.render_golden_rows(smollm2, tmp_path_factory.mktemp("golden"))


def test_rows_are_rendered_as_the_golden_ones(golden_rows):
    """Whoever changes how a row is rendered must raise RENDERER_VERSION: the message says how."""
    golden = json.loads(write_golden.GOLDEN.read_text(encoding="utf-8"))
    problem = write_golden.problem(golden, golden_rows)
    assert problem is None, problem


def test_a_changed_rendering_needs_a_new_version(golden_rows, tmp_path, monkeypatch):
    """One id or one trained token suffices; the golden file is not written anew under the old number."""
    path = tmp_path / "golden.json"
    write_golden.write(path, golden_rows)
    golden = json.loads(path.read_text(encoding="utf-8"))
    case, rows = next(iter(golden_rows.items()))
    for change in ({"ids": "7 " + rows[0]["ids"]}, {"trained": "1" + rows[0]["trained"][1:]}, None):
        changed = golden_rows | {case: [rows[0] | change, *rows[1:]] if change else rows[1:]}
        message = write_golden.problem(golden, changed)
        assert message is not None and repr(case) in message
        assert "raise RENDERER_VERSION in minorca/data/rendering.py" in message and write_golden.COMMAND in message
        with pytest.raises(SystemExit, match="raise RENDERER_VERSION"):
            write_golden.write(path, changed)
        assert json.loads(path.read_text(encoding="utf-8")) == golden
        with monkeypatch.context() as patch:
            patch.setattr(rendering, "RENDERER_VERSION", rendering.RENDERER_VERSION + 1)
            message = write_golden.problem(golden, changed)
            assert message is not None and message.endswith(f"write them anew: {write_golden.COMMAND}")
            write_golden.write(path, changed)
            assert write_golden.problem(json.loads(path.read_text(encoding="utf-8")), changed) is None
        path.unlink()
        write_golden.write(path, golden_rows)


def test_golden_rows_may_be_added(golden_rows, tmp_path):
    path = tmp_path / "golden.json"
    write_golden.write(path, dict(list(golden_rows.items())[1:]))
    message = write_golden.problem(json.loads(path.read_text(encoding="utf-8")), golden_rows)
    assert message is not None and "1 cases are not in the golden file" in message
    write_golden.write(path, golden_rows)
    assert write_golden.problem(json.loads(path.read_text(encoding="utf-8")), golden_rows) is None
