"""From an answer's text, as it is generated, to its content and the calls of tools in it."""

import re
import secrets
import string
from dataclasses import dataclass

from minorca.data.tokenizer import Tokenizer
from minorca.serve.tool_form import ToolForm

# Mistral's templates take nine of these; others take any id.
ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9


@dataclass
class Call:
    """A call, as far as it is known: its arguments are JSON text."""

    id: str
    name: str
    arguments: str = ""

    @property
    def message(self) -> dict:
        """As OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """Finds the calls in one answer, which a grammar keeps in their form (tools.py).

    Attributes:
        calls: those whose names are known.
    """

    def __init__(self, tok: Tokenizer, form: ToolForm):
        self.calls: list[Call] = []
        self._trigger = form.trigger
        # That others are part of the text is not wanted: TextStream drops them.
        names = tok.split_control(form.start + form.middle + form.between + form.end)[1::2]
        self._controls = {tok.control_ids[name]: name for name in names}
        start, between, middle = (_pattern(tok, text) for text in (form.start, form.between, form.middle))
        self._header = re.compile(f"(?:{start}|{between})(.*?){middle}", re.DOTALL)
        # Text that is not understood yet.
        self._rest = ""
        self._in_calls = False
        self._arguments: _ObjectEnd | None = None
        self._deltas: list[dict] = []

    @property
    def is_complete(self) -> bool:
        """Whether there are calls, the last of which has all of its arguments."""
        return bool(self.calls) and self._arguments is None

    def push(self, token: int, text: str, is_last: bool) -> str:
        """Adds an id and the text that it completes; returns new content."""
        self._rest += self._controls.get(token, "") + text
        content = "" if self._in_calls else self._read_content(is_last)
        while self._in_calls and self._read_call():
            pass
        return content

    def take_deltas(self) -> list[dict]:
        """What is new of the calls since the last time, as a stream sends it."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _read_content(self, is_last: bool) -> str:
        """The content up to the first call, without the white space before it."""
        content, found, _ = self._rest.partition(self._trigger)
        if found:
            self._in_calls = True
            self._rest = self._rest[len(content) :]
            return content.rstrip()
        if is_last:
            self._rest = ""
            return content
        starts = [n for n in range(1, len(self._trigger)) if content.endswith(self._trigger[:n])]
        kept = content[: len(content) - max(starts, default=0)].rstrip()
        self._rest = content[len(kept) :]
        return kept

    def _read_call(self) -> bool:
        """Reads a call's name, or more of its arguments; False where that needs more text."""
        if self._arguments is None:
            header = self._header.match(self._rest)
            if header is None:
                return False
            self.calls.append(Call("".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH)), header[1]))
            self._deltas.append({"index": len(self.calls) - 1} | self.calls[-1].message)
            self._arguments = _ObjectEnd()
            self._rest = self._rest[header.end() :]
        end = self._arguments.find(self._rest)
        piece = self._rest if end is None else self._rest[:end]
        if piece:
            self.calls[-1].arguments += piece
            self._deltas.append({"index": len(self.calls) - 1, "function": {"arguments": piece}})
        self._rest = self._rest[len(piece) :]
        if end is None:
            return False
        self._arguments = None
        return True


class _ObjectEnd:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self):
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The index after the object's end in the next piece; None if it does not end there."""
        for i, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "]}":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def _pattern(tok: Tokenizer, text: str) -> str:
    """A part of the form as a regular expression: after a control token SentencePiece writes a space."""
    pieces = enumerate(tok.split_control(text))
    return "".join(re.escape(piece) + (" ?" if n % 2 else "") for n, piece in pieces)
