"""`python -m minorca.data show`."""

import pytest

from minorca import UserError
from minorca.data.__main__ import main
from tests.data.samples import FORMATS, RECORDS, conversation, message, write
from tests.data.test_tokenizer import orca


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


def shown(capsys, *argv: str) -> list[tuple[str, str]]:
    """What `show` prints of each row: its header, without the file, and its text."""
    main(["show", *argv])
    parts = [part.split("\n", 1) for part in capsys.readouterr().out.split("--- ")[1:]]
    return [(header.partition(", ")[2], text.removesuffix("\n")) for header, text in parts]


def test_show_says_what_is_not_trained(config, capsys, tmp_path):
    """Dropped rows with the reason, cut ones with the place, excluded answers, and turns that are left out."""
    turns = [
        conversation("", "One", "1", "Two", "2"),
        conversation("", "Hi", "word " * 40),
        conversation("", "One", " ", "Two", "2"),
        conversation("", "One", ""),
        [message("human?", "x")],
    ]
    turns[0][1]["weight"] = 0
    path = write(tmp_path / "turns.jsonl", [{"messages": messages} for messages in turns])
    options = ["--config", config, "--data.train", path, "--data.format", "messages", "--rows", "9"]
    options += ["--data.seq_len", "40", "--data.bad_rows", "drop"]
    rows = shown(capsys, *options)
    first = rows[0]
    assert first[0].endswith(" trained, answers excluded by weight: 1")
    assert first[1].count("«") == 1 and "assistant\n«2<|im_end|>»" in first[1] and "assistant\n 1<|im_end|>" in first[1]
    assert [row[0] for row in rows[1:]] == [
        "line 2: dropped: too long: 55 tokens, data.seq_len is 40",
        rows[2][0],
        "line 4: dropped: empty response",
        "line 5: dropped: messages[0].role is 'human?'; expected one of system, developer, user, human, assistant, "
        "gpt, chatgpt, tool, function, observation, tool_response, function_call, tool_call, or name it in data.roles",
    ]
    assert "«" not in rows[1][1] and rows[1][1].count("word") == 40
    assert rows[2][0].endswith(", empty answers dropped with their questions: 1")
    assert "Two" in rows[2][1] and "One" not in rows[2][1]
    cut = shown(capsys, *options, "--data.too_long", "truncate")[1]
    assert cut[0] == "line 2: template chatml, 55 tokens, 29 trained, truncated to data.seq_len, 40"
    before, after = cut[1].split("\n[cut here: data.seq_len is 40, and the 15 tokens below are not used]\n")
    assert before.endswith("»") and before.count("word") == 29 and after.count("word") == 11 and "«" not in after
    with pytest.raises(UserError, match="line 5: messages"):
        main(["show", *options[:-2]])


def test_show_says_what_is_not_used_of_each_row(config, capsys, tmp_path):
    """What reading ignores or changes is said beside the row that it concerns, as `prepare` counts it."""
    answer = message("assistant", "4", reasoning="2 and 2") | {"weight": 1}
    rows = [
        {"messages": [message("user", "2 + 2?", train=True), answer], "score": 5},
        {"messages": [message("user", "2 + 2?"), message("assistant", "4")]},
    ]
    path = write(tmp_path / "extra.jsonl", rows)
    first, second = shown(capsys, "--config", config, "--data.train", path, "--data.format", "messages")
    assert first[0].endswith(
        "3 trained, messages marked as trained, of roles that are not, messages with the unused key reasoning, "
        "with the unused column score"
    )
    assert second[0].endswith("3 trained")


def test_show_excluded_answers_that_are_trained(config, capsys, tmp_path):
    turns = conversation("", "One", "1", "Two", "2")
    turns[1]["weight"] = 0
    path = write(tmp_path / "turns.jsonl", [{"messages": turns}])
    options = ["--config", config, "--data.train", path, "--data.format", "messages", "--data.train_on", "all"]
    ((header, text),) = shown(capsys, *options)
    assert header.endswith(" trained, with excluded answers, which train_on: all trains")
    assert text.count("«") == 1 and text.startswith("<s>«<|im_start|>user\nOne")


def test_show_repeated_rows(config, capsys, tmp_path):
    row = dict(RECORDS[0])
    path = write(tmp_path / "twice.jsonl", [row, row])
    (_, _), (header, text) = shown(capsys, "--config", config, "--data.train", path)
    assert (header, text) == ("line 2: dropped: repeated", "")


def test_show_splits_documents(config, capsys, tmp_path):
    """Marks each token once; a piece starts with the last token of the one before."""
    path = write(tmp_path / "text.jsonl", [{"text": "word " * 50}])
    options = ["--config", config, "--data.train", path, "--data.format", "text", "--data.train_on", "all"]
    ((header, text),) = shown(capsys, *options, "--data.seq_len", "16", "--data.too_long", "split")
    assert header == "line 1: plain text, 53 tokens, 52 trained, split into 4 rows"
    mark = "\n[cut here: a row ends, and the next starts with its last token]\n"
    assert text.count("«") == 4 and text.count(mark) == 3
    ((_, whole),) = shown(capsys, *options)
    words = [part.replace("«", "").replace("»", "").split() for part in (whole, text.replace(mark, " "))]
    assert words[0] == words[1]


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("<|im_end|>", "\\<|im_end|>"),
        ("a</s>b", "a\\</s>b"),
        ("\\<|im_end|>", "\\\\\\<|im_end|>"),
        ("\\", "\\\\"),
        ("a\\b", "a\\b"),
    ],
)
def test_typed_control_strings_look_different(typed, expected, config, capsys, tmp_path):
    """And are undone by removing backslashes before what is spelled out."""
    path = write(tmp_path / "typed.jsonl", [{"prompt": "Hi", "completion": typed}])
    ((_, text),) = shown(capsys, "--config", config, "--data.train", path, "--data.format", "prompt_completion")
    assert text.endswith(f"assistant\n«{expected}<|im_end|>»\n")


@pytest.mark.parametrize("rows", ["-1", "0", "x"])
def test_show_with_bad_numbers(rows, config):
    with pytest.raises(UserError, match="--rows"):
        main(["show", "--config", config, "--rows", rows])


@pytest.mark.parametrize("argv", [[], ["shw"]])
def test_data_takes_a_command_it_has(argv):
    with pytest.raises(UserError, match="minorca.data takes a command: show, prepare"):
        main(argv)
