"""What a case of the corpus is: files that somebody brings, and the rows or the refusal that they must give.

Nothing here, in the cases or in the reference is computed by the code under test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MESSAGES = {"format": "messages"}


@dataclass(frozen=True)
class Chat:
    """A conversation as transformers and mistral-common take it.

    Attributes:
        excluded: the indices of the answers that are not trained.
    """

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    excluded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    """A document, or its tokens from `start` up to but not including `end`."""

    text: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, without a template."""

    prompt: str
    completion: str


Row = Chat | Text | Completion


@dataclass(frozen=True)
class Case:
    """Files and settings, and what becomes of them.

    Attributes:
        files: by their path in the case's directory, the content, or what writes it.
        data: settings of `data`; paths in `train` are relative to the directory, and it is the only file by default.
        rows: what is trained, in order, each with its place, as "rows.jsonl, line 1".
        counts: what is said of rows, beside the totals.
        notes: what is said beside those counts; {dir} is the case's directory.
        refusal: the lines of the error, if it is one.
        model: which of the models in test_corpus.py reads the rows.
    """

    name: str
    files: dict[str, bytes | Callable[[Path], object]]
    data: dict = field(default_factory=dict)
    rows: list[tuple[str, Row]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refusal: tuple[str, ...] = ()
    model: str = "jinja"

    def write(self, directory: Path) -> None:
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)


# ------------------------------------------------------------------------------------------- messages, in few letters


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: dict, **more) -> dict:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **more}


def tool(content: str, **more) -> dict:
    return {"role": "tool", "content": content, **more}


def at(place: str, *rows: Row, first: int = 1) -> list[tuple[str, Row]]:
    """Rows at consecutive places: "rows.jsonl, line" is followed by their numbers."""
    return [(f"{place} {number}", row) for number, row in enumerate(rows, first)]


def refused(
    name: str, content, *lines: str, file: str = "rows.jsonl", data: dict = MESSAGES, model: str = "jinja"
) -> Case:
    """A file and the lines of its refusal, which start with the file and the place; after several rows, advice."""
    advice = ["set data.bad_rows to drop to leave invalid rows out"] if len(lines) > 1 else []
    refusal = (*(f"{{dir}}/{file}{line}" for line in lines), *advice)
    return Case(name, {file: content}, data, refusal=refusal, model=model)
