"""`python -m minorca.data show`."""

import pytest

from minorca import UserError
from minorca.data.__main__ import main
from tests.data.samples import FORMATS, RECORDS, write
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


@pytest.mark.parametrize("rows", ["-1", "0", "x"])
def test_show_with_bad_numbers(rows, config):
    with pytest.raises(UserError, match="--rows"):
        main(["show", "--config", config, "--rows", rows])


@pytest.mark.parametrize("argv", [[], ["shw"]])
def test_data_takes_a_command_it_has(argv):
    with pytest.raises(UserError, match="minorca.data takes a command: show, prepare"):
        main(argv)
