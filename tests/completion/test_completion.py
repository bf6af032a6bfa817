"""The scripts, run by the shells that they are for."""

import contextlib
import shutil
import subprocess
import sys

import pytest

from minorca import UserError
from minorca.__main__ import COMMANDS, dispatch
from minorca.config_file import settings
from minorca.plan.devices import GPUS

# a line's words, of which the last is completed, and some of what it becomes; nothing else where that is a set
LINES = [
    (["tr"], {"train"}),
    (["data", ""], {"show", "prepare"}),
    (["train", "--model."], {"--model.path", "--model.dtype", "--model.quantize", "--model.double_quant"}),
    (["train", "--model.dtype", ""], {"bfloat16", "float32"}),
    (["train", "--train.full", ""], {"true", "false"}),
    (["train", "--optim.lr", "1e-4", "--optim.sch"], {"--optim.schedule"}),
    (["data", "show", "--ro"], {"--rows"}),
    (["plan", "--gpu", ""], {gpu.name for gpu in GPUS} | {"cpu"}),
    (["evaluate", "--quantize", ""], {"none", "nf4"}),
    (["init", "--goal", ""], {"adapters", "qlora", "dpo", "full"}),
    (["completion", ""], {"bash", "zsh", "fish"}),
]
# files and directories of the current directory
PLACES = [
    (["train", "--config", "set"], {"settings.yaml"}),
    (["train", "--model.path", ""], {"settings.yaml", "models"}),
    (["train", "--data.train", ""], {"settings.yaml", "models"}),
    (["replay", "m"], {"models"}),
    # a directory, or a GGUF file
    (["generate", "--model", ""], {"settings.yaml", "models"}),
    (["compare", "models", "s"], {"settings.yaml"}),
    (["generate", "--adapter", ""], {"models"}),
]


def lines(cases):
    return pytest.mark.parametrize(
        "words, expected", cases, ids=lambda value: " ".join(sorted(value) if isinstance(value, set) else value)
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """script(shell): the file that `minorca completion` writes."""
    directory = tmp_path_factory.mktemp("completion")

    def write(shell: str):
        path = directory / shell
        if not path.exists():
            with path.open("w") as file, contextlib.redirect_stdout(file):
                dispatch(["completion", shell])
        return path

    return write


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "settings.yaml").touch()
    (tmp_path / "models").mkdir()
    return tmp_path


def by_bash(script, directory, words: list[str]) -> set[str]:
    program = (
        f'source {script}; COMP_WORDS=(minorca "$@"); COMP_CWORD=$#; '
        # the function that `complete` names
        '$(complete -p minorca | sed "s/.*-F //; s/ .*//"); printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(["bash", "-c", program, "-", *words], cwd=directory, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@lines(LINES + PLACES)
def test_bash(words, expected, script, directory):
    assert by_bash(script("bash"), directory, words) == expected


def test_every_command_and_setting_is_completed(script, directory):
    assert by_bash(script("bash"), directory, [""]) >= set(COMMANDS)
    assert by_bash(script("bash"), directory, ["train", "--"]) >= {f"--{name}" for name in settings()}


@lines(LINES)
def test_fish(words, expected, script, directory):
    if not shutil.which("fish"):
        pytest.skip("needs fish")
    line = " ".join(["minorca", *words])
    program = f"source {script('fish')}; complete -C '{line}'"
    ran = subprocess.run(["fish", "--no-config", "-c", program], cwd=directory, capture_output=True, text=True)
    assert {found.split("\t")[0] for found in ran.stdout.splitlines()} == expected, ran.stderr


# what a shell completes in a terminal
TERMINAL = """
import os, pty, select, sys, time
pid, master = pty.fork()
if not pid:
    os.execvp(sys.argv[1], sys.argv[1:4])
def send(text, until):
    os.write(master, text.encode())
    seen, end = "", time.monotonic() + 10
    while until not in seen and time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            seen += os.read(master, 4096).decode(errors="replace")
    return seen
send(f"{sys.argv[4]}; PS1=; echo rea''dy\\n", "ready")
sys.stdout.write(send(sys.argv[5] + "\\t", sys.argv[6]))
"""


def in_terminal(shell: list[str], setup: str, line: str, rest: str, directory) -> str:
    command = [sys.executable, "-c", TERMINAL, *shell, setup, line, rest]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True).stdout.replace("\b", "")


@pytest.mark.parametrize(
    "line, rest",
    [
        ("train --config my\\ r", "ows.yaml"),
        ('train --config "my r', "ows.yaml"),
        ("generate --adapter my\\ m", "odels/"),
    ],
)
def test_spaces_in_bash(line, rest, script, directory):
    (directory / "my rows.yaml").touch()
    (directory / "my models").mkdir()
    shell = ["bash", "--norc", "-i"]
    printed = in_terminal(shell, f"source {script('bash')}", f"minorca {line}", rest, directory)
    assert rest in printed, printed


@pytest.mark.parametrize(
    "line, expected",
    [
        ("minorca compl", "completion"),
        ("minorca train --model.dt", "--model.dtype"),
        ("minorca train --model.dtype bf", "bfloat16"),
        ("minorca data show --ro", "--rows"),
        ("minorca train --config set", "settings.yaml"),
    ],
)
def test_zsh(line, expected, script, directory):
    if not shutil.which("zsh"):
        pytest.skip("needs zsh")
    functions = directory / "functions"
    functions.mkdir()
    shutil.copy(script("zsh"), functions / "_minorca")
    rest = expected.removeprefix(line.rpartition(" ")[2])
    setup = f"fpath=({functions} $fpath); autoload -U compinit; compinit -u -D"
    printed = in_terminal(["zsh", "-f", "-i"], setup, line, rest, directory)
    assert rest in printed, printed


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="invalid choice: 'csh'"):
        dispatch(["completion", "csh"])
