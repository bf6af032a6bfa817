"""What is compared on: prompts, and the answers that a data set has for them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minorca.config import Format, Source
from minorca.data.chat_template import render, render_chat
from minorca.data.conversation import Conversation, Preference, only_last_answer
from minorca.data.row_files import SUFFIXES, RowError, suffix_of
from minorca.data.sources import Row, open_source, read_rows
from minorca.data.tally import MAX_ERRORS
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError, raise_problems
from minorca.files.safe_io import user_path


class Prompt(NamedTuple):
    """A prompt and its reference answer.

    Attributes:
        path, where: the file and the place in it.
        messages: the conversation before the answer; none where a row is plain text.
        answer: the message that the data has for an answer, plain text, or None.
        tools: as in `Conversation`.
    """

    path: str
    where: str
    messages: list[dict]
    answer: dict | str | None
    tools: list[dict]

    @property
    def reference(self) -> str:
        """The answer's text, its calls of tools included; empty where there is none."""
        if self.answer is None or isinstance(self.answer, str):
            return self.answer or ""
        calls = [str(call["function"]) for call in self.answer.get("tool_calls") or ()]
        return "\n".join(filter(None, [self.answer["content"], *calls]))


class Rendered(NamedTuple):
    """A prompt's ids for one model.

    Attributes:
        prompt: what the model is asked.
        ids: the prompt with its reference answer; empty where there is none.
        scored: of each id, whether it belongs to the answer. The first never does.
    """

    prompt: list[int]
    ids: list[int]
    scored: list[bool]


def read_prompts(path: str, format: Format | None, limit: int | None) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of a file, and what was ignored or changed in how many rows.

    Of text, such as prompts.txt, each line that is not empty is a prompt without an answer. Of a data set it is a row's
    conversation up to the last answer, and that answer: of several the best; a row of which only an undesirable answer
    is known has none.

    Args:
        format: of a data set; None: text, or openorca where the name is not that of a text.

    Raises:
        UserError: what is wrong with which rows, or there is none.
    """
    file = user_path(path)
    is_text = suffix_of(file) == ".txt" or (file.is_file() and suffix_of(file) not in SUFFIXES)
    counts = Counter()
    if is_text and format is None:
        prompts = list(islice(_lines(file), limit))
    else:
        source = open_source(Source(path, format=format or "openorca"), limit)
        rows = list(read_rows(source, limit, counts))
        raise_problems([row for row in rows if isinstance(row, RowError)][:MAX_ERRORS])
        prompts = [_prompt(row) for row in rows if isinstance(row, Row)]
    if not prompts:
        raise UserError("has no prompts", path=path)
    return prompts, {note: count for note, count in counts.items() if count and note != "read"}


def _lines(file: Path) -> Iterator[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as text ({error})", path=file) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Prompt(str(file), f"line {number}", [{"role": "user", "content": line}], None, [])


def _prompt(row: Row) -> Prompt:
    content = row.content
    if isinstance(content, str):
        return Prompt(row.path, row.where, [], content, [])
    has_answer = True
    if isinstance(content, Preference):
        best = max(range(len(content.scores)), key=content.scores.__getitem__)
        has_answer = len(content.scores) > 1 or content.scores[best] > 0
        content = content.answers[best]
    return _split(row, content, has_answer)


def _split(row: Row, content: Conversation, has_answer: bool) -> Prompt:
    *messages, last = content.messages
    if last["role"] != "assistant":
        return Prompt(row.path, row.where, content.messages, None, content.tools)
    is_empty = not last["content"].strip() and not last.get("tool_calls")
    # its weight would leave it out of what is scored
    answer = {key: value for key, value in last.items() if key != "weight"}
    return Prompt(row.path, row.where, messages, answer if has_answer and not is_empty else None, content.tools)


def render_for(prompt: Prompt, tok: Tokenizer, template: str) -> Rendered:
    """Raises UserError: the template cannot write it; with the row's place."""
    messages, answer, tools = prompt.messages, prompt.answer, prompt.tools
    with _placed(prompt):
        asked = render_chat(tok, messages, template=template, tools=tools) if messages else []
        if answer is None:
            return Rendered(asked, [], [])
        if isinstance(answer, str):
            ids = tok.encode_rendered(answer, eos=True)
            scored = [True] * len(ids)
        else:
            rendered = render(tok, only_last_answer([*messages, answer]), template, tools=tools)
            ids, scored = rendered.ids, rendered.trained
        return Rendered(asked, ids, [False, *scored[1:]])


@contextmanager
def _placed(prompt: Prompt) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(str(error), path=prompt.path, where=prompt.where) from None
