"""Commands as users run them: a user's error ends with status 2 and one line for each problem, and writes no files."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import minorca.data.__main__
import minorca.export.__main__
import minorca.generate.__main__
import minorca.train.__main__
from minorca import UserError, cli
from minorca.__main__ import dispatch
from tests.data.test_tokenizer import byte_level
from tests.export.test_export import adapted
from tests.helpers import random_mistral

ROOT = Path(__file__).parent.parent
ROW = {"id": "1", "system_prompt": "", "question": "the quick brown fox", "response": "jumps"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory with a model, its tokenizer, adapters for it and for other models, and a row to train on."""
    root = tmp_path_factory.mktemp("original")
    random_mistral(vocab_size=512).save_pretrained(root / "model")
    byte_level(root / "model")
    adapted(random_mistral(vocab_size=512), root / "adapter")
    adapted(random_mistral(vocab_size=512, num_hidden_layers=3), root / "deeper")
    adapted(random_mistral(vocab_size=512, hidden_size=48), root / "narrower")
    (root / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (root / "run.yaml").write_text(
        "model: {path: model}\ndata: {train: rows.jsonl, seq_len: 64}\n"
        "train: {steps: 1, batch_tokens: 64, micro_batch_tokens: 64, output: runs/run}\n"
    )
    return root


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    """A copy of `original`, to be damaged, as the working directory."""
    for source in original.rglob("*"):
        copy = tmp_path / source.relative_to(original)
        if source.is_dir():
            copy.mkdir()
        else:
            copy.write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    """Restores signal handlers and the process group, which a command leaves changed because its process ends."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    # tests started in the background would ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in root.rglob("*")
    }


def refusal(main, argv: list[str], capsys) -> str:
    """The error message of a command that must fail, and which must have changed nothing."""
    capsys.readouterr()
    before = tree(Path.cwd())
    with pytest.raises(SystemExit) as ended:
        cli.run(main, argv)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.endswith("\n") and all(line.startswith("minorca: error: ") for line in err.splitlines()), err
    assert out == "" and "Traceback" not in err
    assert tree(Path.cwd()) == before
    return err.removeprefix("minorca: error: ").strip()


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-100])


def shrink_vocabulary(rows: int = 128) -> None:
    """Replaces the model by one with fewer rows than its tokenizer has ids."""
    random_mistral(vocab_size=rows).save_pretrained("model")


def edit(path: str, **changes) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


WEIGHTS, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
GENERATE = ["--model", "model", "--prompt", "Hello"]
FROM_FILE = ["--model", "model", "--prompt-file"]
# what damages the directory, options, expected message
GENERATING = {
    "no directory": (None, ["--model", "./nowhere", "--prompt", "x"], r"./nowhere: no such directory"),
    "hub id": (
        None,
        ["--model", "mistralai/Mistral-7B-v0.1", "--prompt", "x"],
        "hf download mistralai/Mistral-7B-v0.1",
    ),
    "a file": (None, ["--model", "rows.jsonl", "--prompt", "x"], "rows.jsonl: is a file"),
    "truncated": (lambda: cut(WEIGHTS), GENERATE, f"{WEIGHTS}: not a whole safetensors file"),
    "no weights": (lambda: os.remove(WEIGHTS), GENERATE, "model: no weights"),
    "no configuration": (
        lambda: os.remove("model/config.json"),
        GENERATE,
        "model: holds neither config.json nor params.json",
    ),
    "another network": (
        lambda: edit("model/config.json", model_type="qwen2"),
        GENERATE,
        "model/config.json: model_type",
    ),
    "no tokenizer": (lambda: os.remove("model/tokenizer.json"), GENERATE, "model: no tokenizer found"),
    "truncated tokenizer": (lambda: cut("model/tokenizer.json"), GENERATE, "model/tokenizer.json: cannot be read"),
    "another tokenizer": (
        shrink_vocabulary,
        GENERATE,
        "vocab_size is 128; use the tokenizer that belongs to these weights",
    ),
    "deeper adapter": (
        None,
        [*GENERATE, "--adapter", "deeper"],
        "deeper/adapter_model.safetensors: .*layers.2.*another model",
    ),
    "narrower adapter": (
        None,
        [*GENERATE, "--adapter", "narrower"],
        "narrower/adapter_model.safetensors: .* has shape",
    ),
    "no adapter": (None, [*GENERATE, "--adapter", "model"], "model: no adapter_config.json"),
    "truncated adapter": (
        lambda: cut(ADAPTER),
        [*GENERATE, "--adapter", "adapter"],
        f"{ADAPTER}: not a whole safetensors file",
    ),
    "no tokens": (None, [*GENERATE, "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    "no number": (None, [*GENERATE, "--max-new-tokens", "many"], "--max-new-tokens: invalid int value: 'many'"),
    "over the limit": (None, [*GENERATE, "--max-new-tokens", "600"], "600 new tokens exceed the maximum length of 512"),
    "cold": (None, [*GENERATE, "--temperature", "-1"], "--temperature must be from 0 to 100"),
    "no temperature": (None, [*GENERATE, "--temperature", "nan"], "--temperature must be from 0 to 100"),
    "no mass": (None, [*GENERATE, "--top-p", "0"], "--top-p must be over 0"),
    "too much mass": (None, [*GENERATE, "--top-p", "1.5"], "--top-p must be over 0 and at most 1"),
    "less than none": (None, [*GENERATE, "--top-k", "-1"], "--top-k must be 0"),
    "all at once": (None, [*GENERATE, "--top-k", "-1", "--top-p", "2"], "--top-p must be .*\n.*--top-k must be"),
    "no prompt": (None, ["--model", "model"], "one of the arguments --prompt --prompt-file --chat is required"),
    "empty prompt": (None, ["--model", "model", "--prompt", "", "--raw"], "--prompt is empty"),
    "empty message": (None, ["--model", "model", "--prompt", ""], "--prompt is empty"),
    "no prompt file": (None, [*FROM_FILE, "nowhere.txt"], "nowhere.txt: cannot be read .*No such file"),
    "a directory of prompts": (None, [*FROM_FILE, "model"], "model: cannot be read .*Is a directory"),
    "a prompt without end": (None, [*FROM_FILE, "/dev/zero"], "/dev/zero: has more than 67108864 bytes"),
    "an impossible name": (None, [*FROM_FILE, "a\0b"], "cannot be read .*null byte"),
    "prompt in Latin-1": (
        lambda: Path("prompt.txt").write_bytes(b"caf\xe9"),
        [*FROM_FILE, "prompt.txt"],
        "prompt.txt: is not valid UTF-8 at byte 3; convert it to UTF-8",
    ),
    "empty prompt file": (
        lambda: Path("prompt.txt").write_text("\n"),
        [*FROM_FILE, "prompt.txt"],
        "prompt.txt: is empty; write the prompt into it",
    ),
    "two prompts": (None, [*GENERATE, "--prompt-file", "rows.jsonl"], "not allowed with argument --prompt"),
    "unknown option": (
        None,
        [*GENERATE, "--max-tokens", "5"],
        "--max-tokens is .* mean --max-new-tokens.*--help",
    ),
}


EXPORT = ["--model", "model", "--adapter", "adapter", "--output", "out"]
EXPORTING = {
    "onto a directory": (lambda: Path("out").mkdir(), EXPORT, "out: already exists"),
    "onto a file": (None, [*EXPORT[:-1], "rows.jsonl"], "rows.jsonl: already exists"),
    "no directory": (None, ["--model", "./nowhere", "--output", "out"], "./nowhere: no such directory"),
    "truncated": (lambda: cut(WEIGHTS), EXPORT, f"{WEIGHTS}: not a whole safetensors file"),
    "missing tensor": (
        lambda: edit("model/config.json", num_hidden_layers=3),
        EXPORT,
        "model: missing tensor model.layers.2",
    ),
    "deeper adapter": (None, [*EXPORT, "--adapter", "deeper"], "deeper/adapter_model.safetensors: .*another model"),
    "narrower adapter": (None, [*EXPORT, "--adapter", "narrower"], "narrower/adapter_model.safetensors: .* has shape"),
    "no adapter": (None, [*EXPORT, "--adapter", "./nowhere"], "nowhere: no adapter_config.json"),
    "DoRA": (
        lambda: edit("adapter/adapter_config.json", use_dora=True),
        EXPORT,
        "adapter/adapter_config.json: use_dora",
    ),
    "no output": (None, ["--model", "model"], "required: --output"),
}
RUN = ["--config", "run.yaml"]
TRAINING = {
    "no configuration": (None, ["--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    "unknown keys": (
        None,
        [*RUN, "--lora.rang=8", "--optim.lr", "fast"],
        "--lora.rang is an unknown option; did you mean lora.rank(.|\\n)*optim.lr is 'fast'",
    ),
    "no directory": (None, [*RUN, "--model.path", "./nowhere"], "./nowhere: no such directory"),
    "hub id": (None, [*RUN, "--model.path", "mistralai/Mistral-7B-v0.1"], "hf download mistralai/Mistral-7B-v0.1"),
    "no data": (None, [*RUN, "--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "broken data": (lambda: Path("rows.jsonl").write_text('{"id": 1,\n'), RUN, "rows.jsonl, line 1: not valid JSON"),
    "no rows": (None, [*RUN, "--data.seq_len", "2"], "rows.jsonl: no row is left"),
    "truncated": (lambda: cut(WEIGHTS), RUN, f"{WEIGHTS}: not a whole safetensors file"),
    "another tokenizer": (shrink_vocabulary, RUN, "vocab_size is 128; use the tokenizer that belongs to these weights"),
    "adapter of another shape": (
        None,
        [*RUN, "--lora.init", "adapter"],
        "lora.rank is 16, and the adapter of lora.init, adapter, has 4",
    ),
    "no checkpoint": (None, [*RUN, "--train.resume", "adapter"], "adapter: missing MANIFEST.json"),
}
SHOWING = {
    "unknown key": (
        None,
        ["show", *RUN, "--data.trian=x"],
        "--data.trian is an unknown option; did you mean data.train",
    ),
    "no tokenizer": (lambda: os.remove("model/tokenizer.json"), ["show", *RUN], "model: no tokenizer found"),
    "template": (
        None,
        ["show", *RUN, "--data.template", "mistral-v3"],
        r"model: template mistral-v3 needs .* \[INST\]",
    ),
    "broken data": (lambda: Path("rows.jsonl").write_text("{"), ["show", *RUN], "rows.jsonl, line 1: not valid JSON"),
    "no command": (None, [], "minorca.data takes a command: show"),
}
NAMING = {
    "no command": (None, [], "expected one of train, plan, data, generate, serve, export"),
    "another command": (None, ["serv"], "unknown command serv; expected one of .*; did you mean serve"),
    "a command's own": (None, ["export", *EXPORT[:-1], "rows.jsonl"], "rows.jsonl: already exists"),
}
COMMANDS = [
    (minorca.generate.__main__.main, GENERATING),
    (minorca.export.__main__.main, EXPORTING),
    (minorca.train.__main__.main, TRAINING),
    (minorca.data.__main__.main, SHOWING),
    (dispatch, NAMING),
]
CASES = [
    pytest.param(main, *case, id=f"{main.__module__.removeprefix('minorca.')}: {name}")
    for main, cases in COMMANDS
    for name, case in cases.items()
]


@pytest.mark.parametrize("main, break_it, argv, complaint", CASES)
def test_one_line_and_status_two(main, break_it, argv, complaint, here, capsys):
    if break_it:
        break_it()
    found = refusal(main, argv, capsys)
    assert re.search(complaint, found), found


def test_where_nothing_is_wrong(here, capsys):
    """Without the damage of the cases above commands succeed, and write only to their outputs."""
    before = tree(here)
    cli.run(minorca.generate.__main__.main, [*GENERATE, "--adapter", "adapter", "--max-new-tokens", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] <= 3
    cli.run(minorca.data.__main__.main, ["show", *RUN])
    assert tree(here) == before
    cli.run(minorca.export.__main__.main, EXPORT)
    cli.run(minorca.train.__main__.main, RUN)
    new = tree(here).keys() - before
    assert {Path(path).parts[0] for path in new} == {"out", "runs"} and before.items() <= tree(here).items()


def raising(error):
    def main(argv):
        raise error

    return main


def stopped_by(signum):
    return lambda argv: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    "main, status, expected",
    [
        (lambda argv: None, None, ""),
        (raising(UserError("a.json:\n  field x\n")), 2, "minorca: error: a.json: field x\n"),
        (stopped_by(signal.SIGINT), 130, ""),
        (stopped_by(signal.SIGTERM), 143, ""),
    ],
    ids=["done", "error", "SIGINT", "SIGTERM"],
)
def test_the_ways_a_command_ends(main, status, expected, capfd):
    try:
        cli.run(main, [])
        found = None
    except SystemExit as ended:
        found = ended.code
    assert found == status and capfd.readouterr().err == expected


def command(*argv: str, close_stdout: bool = False) -> tuple[int, str | None, str]:
    """Runs a command in a process of its own, optionally with a closed pipe as standard output."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONUNBUFFERED": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", *argv], env=environment, **pipes) as process:
        if close_stdout:
            assert process.stdout
            process.stdout.close()
            process.stdout = None
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_processes():
    """In processes of their own, in parallel: an error, and help written to a closed pipe."""
    with ThreadPoolExecutor() as pool:
        failed = pool.submit(command, "minorca", "generate", "--model", "a/b", "--prompt", "x")
        helped = pool.submit(command, "minorca.export", "--help", close_stdout=True)
    status, out, err = failed.result()
    assert (status, out) == (2, "")
    assert re.fullmatch("minorca: error: a/b: no such directory.*hf download a/b; .*\n", err)
    assert helped.result() == (0, None, "")
