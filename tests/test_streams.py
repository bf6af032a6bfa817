"""Standard streams that are closed, full, without a reader, or ASCII: one line, and no finished result is lost."""

import subprocess
import sys

import pytest

from tests.helpers import ENVIRONMENT, lines_of

# what a command may do, in a process of its own
SAYS = """
import sys, time
from minorca import cli
from minorca.errors import UserError

def main(argv):
    if "files" in argv:
        cli.outlive_readers()
    print("\\u4e00 caf\\xe9 \\udcff", flush="now" in argv)
    with open(argv[0], "w") as file:
        print("result", file=file)
    if "bar" in argv:
        from tqdm import tqdm
        bar = tqdm(total=9)
        bar.update(3)
    if "fails" in argv:
        raise UserError("is \\u4e8c", field="what")

cli.run(main)
"""
LOST = "minorca: warning: standard output could not be written (No space left on device), and some of it is lost\n"
FAILED = "minorca: error: standard output cannot be written (No space left on device)\n"
CLOSED = "minorca: error: standard output cannot be written (Bad file descriptor)\n"


def say(words: str, path, shell: str, **environment) -> tuple[int, str, str]:
    """The exit status and what came on both streams of the program with a redirection of the shell."""
    command = f'"$@" {shell}'
    result = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", SAYS, str(path), *words.split()],
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": ""} | environment,
        capture_output=True,
        timeout=60,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.parametrize(
    "words, shell, status, err",
    [
        ("", ">/dev/full", 2, FAILED),
        ("now", ">/dev/full", 2, FAILED),
        ("files now", ">/dev/full", 0, LOST),
        ("files fails", ">/dev/full", 2, "minorca: error: what is \u4e8c\n"),
        ("fails", "2>/dev/full", 2, ""),
        ("bar", "2>/dev/full", 0, ""),
        ("files bar", ">&- 2>&- <&-", 0, ""),
        ("bar", ">&- 2>&- <&-", 2, ""),
        ("", ">&-", 2, CLOSED),
        ("files now", ">&-", 0, ""),
        ("fails", ">&-", 2, "minorca: error: what is \u4e8c\n"),
        ("now", "| true", 0, ""),
        ("files now fails", "| true", 0, "minorca: error: what is \u4e8c\n"),
    ],
)
def test_streams_that_take_nothing(words, shell, status, err, tmp_path):
    found, out, said = say(words, tmp_path / "result", shell)
    assert (found, said) == (status, err)
    # what was printed is in no file that happened to get a closed stream's number
    if words != "now":
        assert (tmp_path / "result").read_text() == "result\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
        {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii:strict"},
    ],
    ids=str,
)
def test_text_that_the_encoding_lacks_is_escaped(environment, tmp_path):
    status, out, err = say("fails", tmp_path / "result", "", **environment)
    assert status == 2 and err in ("minorca: error: what is \u4e8c\n", "minorca: error: what is \\u4e8c\n")
    assert "\\udcff" in out and "Traceback" not in err


def test_an_error_has_a_line_of_its_own(tmp_path):
    """Beside a progress bar, which ends without a newline."""
    status, _, err = say("bar fails", tmp_path / "result", "")
    *before, last = err.splitlines()
    assert status == 2 and last == "minorca: error: what is \u4e8c" and "3/9" in "".join(before)
    # a rank's that has no bar, beside the first rank's
    _, _, err = say("fails", tmp_path / "result", "", RANK="1")
    assert err == "\nminorca: error: what is \u4e8c\n"


@pytest.mark.parametrize(
    "shell",
    [">/dev/full 2>&1", *(pytest.param(shell, marks=pytest.mark.slow) for shell in (">&- 2>&-", "| head -c 1 >&2"))],
)
def test_a_run_outlives_its_streams(shell, workplace, tmp_path):
    options = workplace(**{"train.steps": 2})
    run = [sys.executable, "-m", "minorca.train", *options]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *run], env=ENVIRONMENT)
    assert done.returncode == 0 and [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
