"""Text while it is being generated: characters once all their bytes are there, and nothing that may belong to a stop string."""

from collections.abc import Sequence

from minorca.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what a tokenizer decodes bytes to that make no character, or not yet
WINDOW = 18  # ids: as many bytes at least, and six characters, for U+FFFD stands for three bytes at most


class TextStream:
    """Ids in, text out: whole UTF-8 only, and never a part of a stop string.

    What `push` and `finish` return makes `tok.decode` of all the ids together, up to the stop string that starts first. The cost of
    an id does not grow with their number: only ids whose characters may still change are decoded again. (One difference: where a
    tokenizer.json has byte fallback, a wrong byte turns every byte beside it to U+FFFD; characters that were shown stay as they were.)
    """

    def __init__(self, tok: Tokenizer, stop: Sequence[str] = ()):
        """stop: the strings that end the text; an empty one is none."""
        self.stopped = False  # a stop string was found: the text ends before it, and further ids give ""
        self._tok, self._stop, self._silent = tok, tuple(filter(None, stop)), set(tok.control_ids.values())
        self._pieces: list[str] = []
        self._held = ""  # text that may become a stop string
        # Tokenizers drop a space where a text starts. Ids of its middle are therefore decoded behind a letter.
        self._letter = tok.encode("a")
        self._before: list[int] = []
        self._ids: list[int] = []  # not all of their text has been passed on, but its first `_passed` characters
        self._passed = 0

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """The new text that is safe to show after this id: "" while a character or what may be a stop string is incomplete."""
        if self.stopped or token in self._silent or token >= self._tok.vocab_size:
            return ""
        self._ids.append(token)
        return self._show(self._whole_characters())

    def finish(self) -> str:
        """What was held back, when generation ends by length or by a stop id. A stop string may be found only now: one within
        what might have become a longer one."""
        return "" if self.stopped else self._show(self._decode(self._before, self._ids)[self._passed :], more=False)

    def _decode(self, before: list[int], ids: list[int]) -> str:
        return self._tok.decode(before + ids)[len(self._tok.decode(before)) if before else 0 :]

    def _whole_characters(self) -> str:
        """The text of `_ids` that was not passed on and that no further id can change."""
        text = self._decode(self._before, self._ids)
        unsure = min(len(text) - len(text.rstrip(BROKEN)), 3)  # a character of four bytes without its last
        start, self._passed = self._passed, len(text) - unsure
        new = text[start : self._passed]
        if text and not unsure:
            self._before, self._ids, self._passed = self._letter, [], 0
        elif len(self._ids) > 2 * WINDOW:
            # Bytes that make no character, on and on. A cut may fall into a character; its bytes behind the cut, three at
            # most, are then U+FFFD, and the rest is as it was.
            tail = self._decode(self._letter, self._ids[-WINDOW:])
            if len(tail) >= 6 and text.endswith(tail[3:]):
                self._passed -= len(text) - len(tail)
                self._before, self._ids = self._letter, self._ids[-WINDOW:]
        return new

    def _show(self, new: str, more: bool = True) -> str:
        """Adds `new` to the text but for the longest end that may still become a stop string, if `more` can come."""
        text = self._held + new
        end = len(text)
        for start in range(end if self._stop else 0):
            rest = text[start:]
            self.stopped = rest.startswith(self._stop)
            if self.stopped or more and any(string.startswith(rest) for string in self._stop):
                end = start
                break
        self._held = text[end:]
        self._pieces.append(text[:end])
        return text[:end]
