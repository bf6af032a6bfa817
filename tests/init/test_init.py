"""What four answers become: a file that trains, for every goal; and what becomes of answers that are wrong."""

import builtins
import contextlib
import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minorca.config_file import read_config
from minorca.errors import UserError
from minorca.init import __main__ as command
from minorca.init.answers import Data, check_data, check_goal, check_model
from minorca.init.settings import choose, file_text, fit_to_card
from minorca.plan.devices import machine
from minorca.plan.fake_device import unavailable
from minorca.train.dry_run import dry_run
from tests.helpers import ENVIRONMENT, save_tokenizer, wait_until

TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
# a row of each format
ROWS = {
    "openorca": {"id": "t0.1", "system_prompt": "", "question": "2 + 2?", "response": "4"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "messages": {"messages": TURNS},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2 + 2?", "completion": "4"},
    "text": {"text": "2 + 2 is 4."},
    "preference": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
}
LABELLED = {"prompt": "2 + 2?", "completion": "4", "label": True}


def write_rows(path: Path, row: dict, count: int = 120) -> str:
    """Rows that differ in their ids, where they have some."""
    rows = [row | {"id": f"t0.{n}"} if "id" in row else row for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(save_mistral) -> str:
    directory, _ = save_mistral(vocab_size=260, intermediate_size=128, tie_word_embeddings=True, initializer_range=0.08)
    save_tokenizer(directory)
    return str(directory)


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_recognized_by_the_first_row(name, tmp_path):
    found = check_data(write_rows(tmp_path / "rows.jsonl", ROWS[name]))
    assert (found.formats, found.count, found.is_labelled) == ([name], 120, False)


def test_a_row_of_several_formats(tmp_path):
    found = check_data(write_rows(tmp_path / "rows.jsonl", LABELLED))
    assert found.formats == ["prompt_completion", "preference"] and found.is_labelled


def test_other_kinds_of_files(tmp_path):
    with (tmp_path / "rows.csv").open("w") as file:
        csv.writer(file).writerows([["instruction", "output"], ["2 + 2?", "4"], ["1 + 1?", "2"]])
    (tmp_path / "book.txt").write_text("2 + 2 is 4.")
    (tmp_path / "array.json").write_text(json.dumps([ROWS["openorca"]] * 3))
    for name, formats, count in (
        ("rows.csv", ["alpaca"], 2),
        ("book.txt", ["text"], 1),
        ("array.json", ["openorca"], 3),
    ):
        found = check_data(str(tmp_path / name))
        assert (found.formats, found.count) == (formats, count)


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            '{"frage": "2 + 2?", "antwort": "4"}\n',
            r"has the columns \['frage', 'antwort'\], and no format fits",
        ),
        ("", "has no rows"),
        ("{not json\n", "line 1: not valid JSON"),
        ('{"messages": 3}\n', "line 1: .*messages"),
        ('{"messages": []}\n', "line 1: .*messages"),
        ('{"instruction": 3, "output": "4"}\n', "line 1: .*instruction"),
    ],
)
def test_rows_that_are_not(content, expected, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=expected):
        check_data(str(tmp_path / "rows.jsonl"))


# -------------------------------------------------------------------------------------------------------------- goals


def test_rows_without_an_answer_to_train(model, tmp_path):
    """Of which a run would use none."""
    data = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS[:1]})
    options = ["--model", model, "--data", data, "--gpu", "cpu", "--goal", "adapters"]
    with pytest.raises(UserError, match="none of its first rows has an answer to train"):
        command.main([*options, "--output", str(tmp_path / "run.yaml")])


def test_an_output_in_no_directory_is_named_before_the_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(command.sys, "stdin", io.StringIO())
    with pytest.raises(UserError) as caught:
        command.main(["--output", str(tmp_path / "none" / "run.yaml")])
    assert f"{tmp_path / 'none'}: no such directory" in str(caught.value.problems[-1])


CASES = [("adapters", "openorca"), ("qlora", "messages"), ("dpo", "labelled"), ("full", "text")]
MORE = [("adapters", name) for name in ("sharegpt", "messages", "alpaca", "prompt_completion", "text")]
MORE += [("qlora", "openorca"), ("dpo", "preference"), ("full", "messages")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize("goal, name", CASES)
def test_the_file_passes_a_dry_run(goal, name, model, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", (ROWS | {"labelled": LABELLED})[name])
    output = tmp_path / "run.yaml"
    options = ["--model", model, "--data", data, "--gpu", "cpu", "--goal", goal, "--output", str(output)]
    command.main(options)
    printed = capsys.readouterr().out
    assert "peak of a rank" in printed and f"python -m minorca.train --config {output} --dry-run" in printed
    config = read_config(output, {"train.output": str(tmp_path / "run")})
    assert config.train.full == (goal == "full") and config.model.quantize == ("nf4" if goal == "qlora" else "none")
    assert config.train.objective == {"preference": "dpo", "labelled": "kto"}.get(name, "sft")
    dry_run(config)
    assert "dry run: nothing was written" in capsys.readouterr().out
    # every line has one comment, and says what is read
    lines = [line for line in output.read_text().splitlines() if line.startswith("  ")]
    assert all(line.count("  # ") == 1 and len(line) <= 120 for line in lines)
    with pytest.raises(UserError, match="exists, and is not replaced"):
        command.main(options)


ON_CARDS = """
import io, contextlib, json, sys
from minorca.init.__main__ import main
from minorca.config_file import read_config
model, rows, directory, cards = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4].split(",")
for goal, path in rows.items():
    for card in cards:
        for gpus in ("1", "2"):
            output = f"{directory}/{goal}-{card}-{gpus}.yaml"
            main(["--model", model, "--data", path, "--gpu", card, "--goal", goal, "--gpus", gpus, "--output", output])
"""


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("cards", ["L4", "H100,cpu"])
def test_goals_on_cards(cards, save_mistral, tmp_path):
    # small heads would be a case of their own
    directory, _ = save_mistral(vocab_size=260, hidden_size=128, intermediate_size=256, num_attention_heads=2)
    save_tokenizer(directory)
    kinds = {"adapters": "openorca", "qlora": "messages", "dpo": "preference", "full": "alpaca"}
    rows = {goal: write_rows(tmp_path / f"{name}.jsonl", ROWS[name]) for goal, name in kinds.items()}
    arguments = [str(directory), json.dumps(rows), str(tmp_path), cards]
    # a process that has no GPU, real or fake
    ran = subprocess.run([sys.executable, "-c", ON_CARDS, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    written = list(tmp_path.glob("*.yaml"))
    assert len(written) == 8 * len(cards.split(","))
    for path in written:
        read_config(path, {})
    assert ran.stdout.count(": fits") == len(written)
    speeds = ran.stdout.count("tokens/s predicted")
    assert speeds == 8 * len([card for card in cards.split(",") if card != "cpu"])


def test_a_card_on_which_only_other_settings_fit(model, tmp_path, monkeypatch):
    """The fastest advice of the plan is taken; where there is none, that is said."""
    needs = {"none": 10**9, "nf4": 10**6}
    advice = [{"settings": {"model.quantize": "nf4", "parallel.activation_checkpointing": "full"}}]

    def plan(config, arch, device, ranks, whole):
        needed = needs[config.model.quantize]
        return {"fits": needed <= device.usable, "memory_bytes": {"total": needed}, "advice": advice}

    monkeypatch.setattr("minorca.init.settings.plan_apart", plan)
    data = check_data(write_rows(tmp_path / "rows.jsonl", ROWS["openorca"]))
    card = replace(machine("cpu", 1), memory=10**7)
    settings, found, _ = choose(check_model(model), data, card, "adapters", 1)
    assert found["fits"]
    (tmp_path / "run.yaml").write_text(file_text(settings, ["how"]))
    config = read_config(tmp_path / "run.yaml", {})
    assert (config.model.quantize, config.parallel.activation_checkpointing) == ("nf4", "full")
    advice.clear()
    with pytest.raises(UserError, match="no settings make it fit; choose a larger card"):
        fit_to_card(settings | {"model.quantize": "none"}, card, 1)


def test_steps_are_enough_and_ranks_have_work(model, tmp_path):
    data = check_data(write_rows(tmp_path / "rows.jsonl", ROWS["openorca"], 1000))
    settings, _, lengths = choose(check_model(model), data, machine("cpu", 4), "adapters", 4)
    assert len(lengths) == 1000 and settings["data.seq_len"] == 128
    assert 4 * settings["train.micro_batch_tokens"] <= settings["train.batch_tokens"]
    assert sum(lengths) / settings["train.batch_tokens"] >= 30


def test_goals_that_the_rows_are_not_for(model):
    found = check_model(model)
    instructions, answers = Data("a", ["openorca"], False, 1), Data("b", ["preference"], False, 1)
    for goal, data, expected in (
        ("dpo", instructions, "compares answers"),
        ("full", answers, "choose dpo"),
        ("lora", instructions, "expected one of adapters, qlora"),
    ):
        with pytest.raises(UserError, match=expected):
            check_goal(goal, found, data)
    with pytest.raises(UserError, match="is full, and the model's files are in 4 bits"):
        check_goal("full", replace(found, in_4_bits=True), instructions)
    narrow = replace(found, arch=replace(found.arch, hidden_size=96))
    with pytest.raises(UserError, match="no multiple of 64"):
        check_goal("qlora", narrow, instructions)


# ------------------------------------------------------------------------------------------------------------ answers


def test_without_a_terminal_every_missing_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UserError) as raised:
        command.main(["--goal", "full", "--gpus", "0", "--output", str(tmp_path)])
    assert [problem.field or problem.message for problem in raised.value.problems] == [
        "--model",
        "--data",
        "--gpu",
        "--gpus",
        "exists, and is not replaced; choose another --output",
    ]


def test_a_wrong_answer_is_asked_again(model, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS["openorca"])
    answers = iter(["", "nowhere", model, "none.jsonl", data, "T4", "cpu", "dpo", "", "left over"])
    asked = []

    def answer(question: str) -> str:
        asked.append(question.split(" ")[0])
        return next(answers)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", answer)
    # where nothing is proposed
    monkeypatch.chdir(tmp_path)
    command.main(["--output", "new.yaml"])
    assert asked == ["model"] * 3 + ["data"] * 2 + ["card"] * 2 + ["goal"] * 2
    assert next(answers) == "left over" and Path("new.yaml").exists()
    printed = capsys.readouterr().out
    for line in (
        "nowhere: no such directory",
        "none.jsonl: no such file",
        "--gpu is T4",
        "--goal is dpo, which compares",
    ):
        assert f"  {line}" in printed
    # the default was taken
    assert read_config(Path("new.yaml"), {}).lora.rank == 16


def test_a_card_that_is_too_small_is_asked_again(model, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS["openorca"])
    small, large = replace(machine("cpu", 1), memory=1000), machine("cpu", 1)
    nothing = "minorca.plan.report.advise"
    monkeypatch.setattr(nothing, lambda estimator, config: [])
    monkeypatch.setattr(command, "check_card", lambda text, ranks: small if text == "small" else large)
    answers = iter(["small", "adapters", "large", "adapters"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: next(answers))
    options = ["--model", model, "--data", data, "--output", str(tmp_path / "run.yaml")]
    command.main(options)
    assert "no settings make it fit" in capsys.readouterr().out
    with pytest.raises(UserError, match="no settings make it fit"):
        command.main([*options[:-1], str(tmp_path / "other.yaml"), "--gpu", "small", "--goal", "adapters"])


def state_of(pid: int) -> str:
    """Of a process: `R` where it runs, `S` where it waits (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("key, status", [("\x03", 130), ("\x04", 2)], ids=["Ctrl-C", "Ctrl-D"])
def test_leaving_the_questions(key, status, tmp_path):
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-m", "minorca", "init"], ENVIRONMENT)
    printed = b""
    # of Linux an error, once the process has ended
    with contextlib.suppress(OSError):
        while select.select([terminal], [], [], 120)[0]:
            printed += os.read(terminal, 1000)
            if key and b"model (a directory or a hub id): " in printed:
                # a signal that comes before it reads would wait for a line
                wait_until(lambda: state_of(pid) == "S", 60)
                os.write(terminal, key.encode())
                key = ""
        # it said nothing for two minutes
        os.kill(pid, signal.SIGKILL)
    _, ended = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(ended) == status
    assert (b"minorca: error: --model has no answer; nothing was written" in printed) == (status == 2)
    assert b"Traceback" not in printed and not list(tmp_path.iterdir())
