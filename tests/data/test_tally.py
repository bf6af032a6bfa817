"""The advice that follows errors of rows."""

import pickle

import pytest

from minorca import UserError, load_tokenizer
from minorca.config import DataConfig
from minorca.data.conversation import Conversation
from minorca.data.rendering import render_rows
from minorca.data.row_files import RowError
from minorca.data.sources import Row
from minorca.data.tally import raise_errors
from tests.data.samples import conversation
from tests.data.test_tokenizer import V3, sentencepiece_directory

ADVICE = "set data.bad_rows to drop to leave invalid rows out"
LONG = conversation("", "q", "word " * 50)
EMPTY = conversation("", "q", "")
# An order that the template does not take.
REJECTED = [*conversation("", "q", "a"), *conversation("s", "q", "a")]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(sentencepiece_directory(tmp_path_factory.mktemp("model"), V3))


def last_line(tok, *contents: list[dict] | None) -> str:
    """Of the error of these conversations; None is a row that cannot be read. Each is rendered by another process."""
    tallies = []
    for n, messages in enumerate(contents, 1):
        unreadable = RowError("not valid JSON", path="a.jsonl", where=f"line {n}")
        row = unreadable if messages is None else Row("a.jsonl", "line", n, Conversation(messages))
        settings = DataConfig("a.jsonl", seq_len=40, too_long="error", empty_response="error")
        tallies.append(pickle.loads(pickle.dumps(render_rows([row], tok, settings, "mistral-v3")[1])))
    with pytest.raises(UserError) as caught:
        raise_errors(tallies)
    return str(caught.value.problems[-1])


@pytest.mark.parametrize("contents", [[None] * 2, [REJECTED] * 2, [None, REJECTED], [LONG, None, EMPTY, REJECTED]])
def test_several_invalid_rows_can_be_dropped(contents, tok):
    assert last_line(tok, *contents) == ADVICE
    assert last_line(tok, *[LONG] * 20, *contents) == f"and {len(contents)} more rows; fix them, or {ADVICE}"


@pytest.mark.parametrize("contents", [[None], [REJECTED], [LONG] * 2, [EMPTY] * 2, [LONG, EMPTY, None]])
def test_other_rows_cannot(contents, tok):
    """Long and empty ones have settings of their own, and one invalid row has its own line."""
    assert "bad_rows" not in last_line(tok, *contents)
    assert last_line(tok, *[LONG] * 20, *contents) == f"and {len(contents)} more rows; fix them"
