"""The documentation's site: it builds without a warning, needs no network, and leaves nothing of the reference out."""

import contextlib
import importlib
import re
import runpy
import subprocess
import sys
import typing
from dataclasses import MISSING
from html.parser import HTMLParser
from pathlib import Path

import pytest

import minorca
import minorca.generate
import minorca_kernels
from minorca.__main__ import COMMANDS
from minorca.config import choices, default_of, fields
from minorca.config_file import load_yaml
from minorca.train import output
from minorca.train.__main__ import main as train
from tests.helpers import ROOT, lines_of

DOCS = ROOT / "docs"


class Page(HTMLParser):
    """A page of the site.

    Attributes:
        text: what it shows.
        ids: the anchors in it.
        loads: the addresses that a browser fetches to show it.
        rows: the cells of each row of its tables.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.ids, self.loads, self.rows = "", set(), [], []
        self.in_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")
        self.ids.add(values.get("id"))
        is_loaded = tag != "a" and (tag != "link" or values.get("rel") not in ("next", "prev", "index", "search"))
        self.loads += [values[key] for key in ("src", "srcset", "href", "data") if is_loaded and values.get(key)]

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it."""
    directory = tmp_path_factory.mktemp("site")
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "sphinx-build" in line]
    options = line.split("sphinx-build")[1].replace("build/doctrees", str(directory / "doctrees")).split()
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options[:-1], directory / "site"], cwd=ROOT, capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")
    return directory / "site"


@pytest.fixture(scope="module")
def reference(site) -> dict[str, Page]:
    return {path.stem: Page(path) for path in (site / "docs" / "reference").glob("*.html")}


def test_the_navigation_has_every_document():
    configuration = runpy.run_path(str(DOCS / "conf.py"))
    entries = re.findall(r"^/(.+)$", configuration["navigation"](), re.M)
    documents = {path.relative_to(ROOT).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(entries) == sorted({*documents - {"docs/index"}, "README", "CONTRIBUTING", "CHANGELOG", "SECURITY"})


@pytest.mark.slow
def test_a_browser_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for address in Page(page).loads:
            assert not re.match(r"(\w+:)?//", address), (page, address)
            assert address.startswith(("data:", "#")) or (page.parent / re.split("[?#]", address)[0]).exists(), address
    for style in site.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", style.read_text(), flags=re.S)
        assert not re.search(r"""@import|url\(["']?(\w+:)?//""", text), style
    for script in site.rglob("*.js"):
        assert not re.search(r"""(fetch|import|importScripts)\(["'`]https?:""", script.read_text()), script


@pytest.mark.slow
@pytest.mark.parametrize("words, page", [("micro_batch_tokens", "configuration"), ("load_tokenizer", "python")])
def test_a_browser_searches_without_a_server(words, page, site):
    address = f"{(site / 'search.html').as_uri()}?q={words}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=120).stdout
    assert f"docs/reference/{page}.html" in shown.split('id="search-results"')[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, "data show", "data prepare"])
def test_the_reference_has_every_option(command, reference, capsys):
    main = importlib.import_module(f"minorca.{command.split()[0]}.__main__").main
    with contextlib.suppress(SystemExit):
        main([*command.split()[1:], "--help"])
    # of a line of the help that begins with an option, the options
    heads = re.findall(r"^  (-[^ ].*?)(?:  |$)", capsys.readouterr().out, re.M)
    options = {option for head in heads for option in re.findall(r"--[\w.-]+", head)}
    assert (command == "data") == (not options)
    for option in options - {"--help"}:
        text = reference["configuration" if "." in option else "commands"].text
        assert option.removeprefix("--") in text, option


@pytest.mark.slow
def test_the_reference_has_every_setting(reference):
    """With its choices, its default as YAML, and its meaning."""
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in reference["configuration"].rows}
    for section, key, hint in fields():
        kind, written, meaning = rows[f"{section}.{key.name}"]
        default = default_of(key)
        assert all(choice in kind for choice in choices(f"{section}.{key.name}"))
        if default is MISSING:
            assert written == "required"
        else:
            assert load_yaml(written) == (list(default) if isinstance(default, tuple) else default)
        assert meaning == typing.get_args(hint)[1]


@pytest.mark.slow
@pytest.mark.parametrize("package", [minorca, minorca.generate, minorca_kernels], ids=lambda package: package.__name__)
def test_the_reference_has_every_name(package, reference):
    ids = reference["python"].ids | reference["kernels"].ids
    for name in package.__all__:
        assert f"{package.__name__}.{name}" in ids


@pytest.mark.slow
def test_the_reference_has_every_module(reference):
    rows = [row[0] for row in reference["files"].rows if len(row) == 2]
    for path in [*ROOT.glob("minorca/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        assert path.name == "__init__.py" or path.name in rows, path


def test_the_files_of_a_run_are_those_in_the_reference(workplace):
    text = (DOCS / "reference" / "run-files.md").read_text()
    named = set(re.findall(r"`([\w./-]+?)/?`", text))
    assert output.DIRECTORIES | output.FILES | {output.FILE, output.LOCK, output.RESOLVED} <= named
    train(workplace(**{"train.steps": 2, "data.eval": 0.2, "train.eval_every": 1, "train.keep_best": True}))
    run = workplace.path / "run"
    assert {path.name for path in run.iterdir()} <= named
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {path.name for path in checkpoint.iterdir() if "token" not in path.name} <= named
    keys = {key for line in lines_of(run) for key in line}
    assert keys <= named


@pytest.mark.slow
def test_the_figures_show_what_the_code_does(tmp_path):
    script = DOCS / "figures" / "draw.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(drawn) == 4
    for name, text in drawn.items():
        assert text == script.with_name(name).read_text(), f"{name}: draw it again: python docs/figures/draw.py"
