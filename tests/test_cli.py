"""The command line: versions, commands, and the package as it is installed from a wheel."""

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minorca
from minorca import UserError
from minorca.__main__ import COMMANDS, dispatch
from minorca.signals import raise_terminated, signals_noted
from tests.helpers import ROOT, lines_of


def test_the_version_is_in_one_place(capsys):
    dispatch(["--version"])
    assert capsys.readouterr().out == f"minorca {minorca.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    if command == "data":
        dispatch(["data", "--help"])
    else:
        with pytest.raises(SystemExit) as ended:
            dispatch([command, "--help"])
        assert ended.value.code == 0
    assert f"usage: minorca.{command}" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown command exprt; expected one of .*; did you mean export"):
        dispatch(["exprt"])


@pytest.mark.parametrize("handled", ["raised", "noted"])
def test_a_forked_process_ends_by_sigterm(handled):
    """As multiprocessing's pools end theirs."""
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        with signals_noted() if handled == "noted" else contextlib.nullcontext():
            child = os.fork()
            if not child:
                time.sleep(20)
                os._exit(0)
            # also one that comes while it is forked
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.WTERMSIG(status) == signal.SIGTERM


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_the_library_does_not_import_the_command_line():
    for path in (ROOT / "minorca").rglob("*.py"):
        commands = {name for name in imports_of(path) if name.startswith("minorca") and name.endswith("__main__")}
        if path.name != "__main__.py":
            assert not commands and "minorca.cli" not in imports_of(path), path


def test_the_kernels_know_nothing_of_minorca():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.split(".")[0] == "minorca"}, path


def test_the_engine_imports_neither_transformers_nor_peft():
    for path in (*(ROOT / "minorca").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        assert not {name for name in imports_of(path) if name.split(".")[0] in ("transformers", "peft")}, path


@pytest.mark.slow
def test_a_wheel_works_outside_of_the_checkout(workplace, tmp_path):
    """Nothing is looked up beside the package: the same defaults, the same errors, and a run."""
    site, elsewhere, source = tmp_path / "site", tmp_path / "elsewhere", tmp_path / "source"
    elsewhere.mkdir()
    # a copy, for building leaves files
    for package in ("minorca", "kernels"):
        shutil.copytree(ROOT / package, source / package)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source]
    subprocess.run(pip, check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        # without the editable installation of the checkout
        program = (
            f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path = "
            "[finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]; import runpy; "
            "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    version = run("minorca", "--version")
    assert version.stdout == f"minorca {minorca.__version__}\n", version.stderr
    bare = run("minorca.train")
    assert bare.returncode == 2
    assert bare.stderr == "minorca: error: model.path is missing\nminorca: error: data.train is missing\n"
    trained = run("minorca.train", *workplace(**{"train.steps": 2}))
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2]
    assert (site / "minorca" / "serve" / "page.html").is_file()
