"""The documentation: its commands run as written, and its links, files and tests exist.

Blocks fenced as bash or python run in a copy of the checkout, each document's in order. The text block right after a
quick one is its output; `[...]` in it stands for anything. A fence says after `needs=` what its block needs:

demo        what `make demo` writes; slow
minutes     a few minutes; slow
network     a package index; slow
background  to run until the end of its document: a server; slow
gpu, 7b     a GPU, or the weights of a 7B model: it does not run
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from minorca.config_file import read_config
from tests.helpers import ROOT, wait_until

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
NEEDS = {"demo", "minutes", "network", "background", "gpu", "7b"}
PORT = 8000


class Block(NamedTuple):
    """A fenced block, and the text of the block right after it if that is its output."""

    line: int
    language: str
    needs: set[str]
    text: str
    output: str | None

    @property
    def runs_slowly(self) -> bool:
        return bool(self.needs) and not self.needs & {"gpu", "7b"}


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text()
    found = list(re.finditer(r"^```(\w+)(?: needs=([\w ]+))?\n(.*?)^```\n", text, re.M | re.S))
    assert 2 * len(found) == len(re.findall("^```", text, re.M)), f"{document}: expected ```LANGUAGE needs=WORDS"
    blocks = []
    for block, after in zip(found, [*found[1:], None]):
        output = after[3] if after and after[1] == "text" and after.start() == block.end() else None
        line = text.count("\n", 0, block.start()) + 1
        blocks.append(Block(line, block[1], set((block[2] or "").split()), block[3], output))
    return blocks


def commands_of(document: Path) -> list[Block]:
    return [block for block in blocks_of(document) if block.language in ("bash", "python")]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------------ running


@pytest.fixture(scope="module")
def copy_checkout(tmp_path_factory, smollm2):
    """copy_checkout() -> a copy of the checkout, in whose .venv `python` and `torchrun` are those that run this."""

    def copy() -> Path:
        directory = tmp_path_factory.mktemp("docs") / "minorca"
        left_out = shutil.ignore_patterns(".*", "runs", "models", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, directory, ignore=left_out, ignore_dangling_symlinks=True)
        programs = directory / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name, program in (("python", ""), ("torchrun", "-m torch.distributed.run")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
            (programs / name).chmod(0o755)
        # what `make` takes as the sign that the environment is there
        (directory / ".venv" / "ready").touch()
        return directory

    return copy


@pytest.fixture(scope="module")
def checkout(copy_checkout) -> Path:
    return copy_checkout()


@pytest.fixture(scope="module")
def after_demo(checkout) -> Path:
    """The checkout after the README's first command."""
    (demo,) = [block for block in commands_of(README) if block.text == "make demo\n"]
    run(demo, checkout)
    return checkout


def environment(directory: Path) -> dict[str, str]:
    """That of a reader, in which the checkout's Python comes first."""
    paths = {
        "PATH": f"{directory / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{directory}:{directory / 'kernels'}",
    }
    return os.environ | paths


def start(block: Block, directory: Path) -> subprocess.Popen:
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    return subprocess.Popen(
        [*program, block.text],
        cwd=directory,
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(block: Block, directory: Path) -> None:
    process = start(block, directory)
    output, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, f"line {block.line}: {block.text}\n{output[-3000:]}"
    if block.output and not block.needs:
        pattern = re.escape(block.output).replace(re.escape("[...]"), ".*")
        assert re.search(pattern, output, re.S), f"line {block.line}: expected\n{block.output}\ngot\n{output}"


@contextlib.contextmanager
def running(block: Block, directory: Path) -> Iterator[None]:
    """Within it the block's server runs; it ends by SIGTERM, as documented."""
    process = start(block, directory)

    def listens() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
            return True
        return False

    try:
        wait_until(listens, seconds=300)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (143, -signal.SIGTERM), output


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_of_a_known_kind(document, tmp_path):
    for block in blocks_of(document):
        assert block.language in ("bash", "python", "text", "yaml"), block
        assert block.needs <= NEEDS, block
        assert not re.search(r"^\$ |^(\.venv/bin/)?python3? -m ", block.text, re.M) or block.language == "bash", block
        if block.language == "yaml":
            (tmp_path / "block.yaml").write_text(block.text)
            read_config(tmp_path / "block.yaml", {"model.path": "model", "data.train": "rows.jsonl"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_quick_commands(document, checkout):
    for block in commands_of(document):
        if not block.needs:
            run(block, checkout)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_slow_commands(document, after_demo, copy_checkout):
    with contextlib.ExitStack() as servers:
        for block in commands_of(document):
            if not block.runs_slowly or block.text == "make demo\n":
                continue
            if "background" in block.needs:
                servers.enter_context(running(block, after_demo))
            elif "network" in block.needs:
                fresh = copy_checkout()
                shutil.rmtree(fresh / ".venv")
                run(block, fresh)
            else:
                run(block, after_demo)


# ------------------------------------------------------------------------------------------- what the documents name


def anchors_of(document: Path) -> set[str]:
    """Those of its headings, as code hosts and the site make them."""
    text = re.sub("^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    counts, anchors = Counter(), set()
    for heading in re.findall("^#+ (.+)$", text, re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{counts[anchor]}" if counts[anchor] else anchor)
        counts[anchor] += 1
    return anchors


@pytest.mark.parametrize("document", LINKED, ids=name_of)
def test_links_and_files_exist(document):
    text = document.read_text()
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if not link.startswith("https://"):
            target = document.parent / link if link else document
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), f"{link}#{anchor}"
    outside_links = re.sub(r"\]\([^)]*\)|https://\S+", "]", text)
    for path in re.findall(r"(?<![\w/.])(?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml|sh|sbatch|html)\b", outside_links):
        # what commands write lies in runs/
        known = path.startswith(("..", "runs/")) or (ROOT / path).exists() or (document.parent / path).exists()
        assert known, path


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=name_of)
def test_files_in_figures_exist(figure):
    modules = [str(path) for package in ("minorca", "kernels") for path in (ROOT / package).rglob("*.py")]
    for name in re.findall(r"[\w/]+\.py", figure.read_text()):
        assert any(module.endswith(f"/{name}") for module in modules), name


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("root", ["minorca", "kernels/minorca_kernels"])
def test_every_module_says_what_it_is(root):
    for path in (ROOT / root).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_promise_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| ---", "| claim", "| promise"))]
    assert len(rows) > 40
    for row in rows:
        parts = re.split(r"`(tests/[\w/]+\.py)", row.split(" | ")[-1])
        assert len(parts) > 1, row
        for path, words in zip(parts[1::2], parts[2::2]):
            names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M)
            assert names
            for several, single in re.findall(r"-k (?:\"([^\"]+)\"|(\w+))", words):
                for word in (several or single).split(" or "):
                    assert any(word in name for name in names), f"{path} has no test with {word} in its name"
