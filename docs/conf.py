"""How Sphinx builds the site: `make docs`.

The documents are plain Markdown with relative links, so that a code host shows them too. Sphinx's source directory is
the repository's root, where these links lead to the files that they name. What is generated (navigation, reference) is
added to a document while it is read, and is written to the site only.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "docs")]

import reference_pages

import minorca

project = "minorca"
author = "the minorca authors"
version = release = minorca.__version__
html_title = f"minorca {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
FRONT = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
include_patterns = ["docs/**.md", *FRONT]
# or Sphinx walks through .venv
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in {"docs", *FRONT}]

# the anchors of headings that code hosts make
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# what docstrings have between single backticks
default_role = "code"
# "nf4" is a value that is typed
smartquotes = False
maximum_signature_line_length = 100

html_theme = "furo"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
templates_path = ["templates"]
# docs/index.html is the first page
html_additional_pages = {"index": "redirect.html"}

# The order of the pages: title of a group, and patterns of its documents. A document that is in none is an error.
NAVIGATION = [
    ("First steps", ["first-steps", "data", "running"]),
    ("Training", ["lora", "preference", "long-context", "small-cards", "many-gpus", "clusters"]),
    ("Using a model", ["evaluation", "serving", "exporting", "merging", "hub", "receipts"]),
    ("Moving here", ["moving/*"]),
    ("Known recipes", ["same-here/*"]),
    ("Inside", ["architecture", "inside", "benchmarks", "promises"]),
    ("Reference", ["reference/python", "reference/*"]),
    ("The project", ["../README", "../CONTRIBUTING", "../CHANGELOG", "../SECURITY"]),
]


def navigation() -> str:
    """The table of contents, of the documents that are there."""
    listed, parts = set(), []
    for title, patterns in NAVIGATION:
        found = [path for pattern in patterns for path in sorted((ROOT / "docs").glob(f"{pattern}.md"))]
        entries = [path.resolve().relative_to(ROOT).with_suffix("").as_posix() for path in found]
        entries = [f"/{entry}" for entry in dict.fromkeys(entries) if entry not in listed]
        listed.update(entry[1:] for entry in entries)
        if entries:
            parts.append("\n".join(["```{toctree}", f":caption: {title}", ":maxdepth: 1", "", *entries, "```"]))
    return "\n\n".join(["## All pages", *parts])


def add_generated(app, docname: str, source: list[str]) -> None:
    """Adds to a document what is generated for it."""
    directory = (ROOT / docname).parent

    # of files Sphinx makes downloads; of directories it can make nothing
    def without_directories(link: re.Match) -> str:
        return link[1] if (directory / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^][]+)\]\(([^)#\s]+)\)", without_directories, source[0])
    if docname == root_doc:
        source[0] += f"\n\n{navigation()}\n"
    if docname.startswith("docs/reference/"):
        page = Path(docname).name.replace("-", "_")
        if generate := getattr(reference_pages, page, None):
            source[0] += f"\n\n{generate()}\n"


def setup(app) -> dict[str, bool]:
    app.connect("source-read", add_generated)
    return {"parallel_read_safe": True}
