"""Text from tokens as they are generated: whole characters only, and nothing that may become part of a stop string."""

from collections.abc import Sequence

from minorca.data.tokenizer import Tokenizer

# What tokenizers decode invalid or incomplete UTF-8 to: the replacement character.
REPLACEMENT = "\ufffd"
# Ids that are decoded again after a run of invalid bytes: at least as many bytes, and at least six characters, since a
# replacement character stands for three bytes at most.
TAIL_IDS = 18


class TextStream:
    """Decodes ids one at a time.

    The strings that `push` and `finish` return add up to `tok.decode` of all ids, cut before the stop string that
    starts first. The cost of an id does not grow with the length of the text: only ids whose characters may still
    change are decoded again. (One difference: where a tokenizer.json has byte fallback, `decode` turns every byte
    beside an invalid one into U+FFFD; characters that were already returned stay as they were.)

    Args:
        stop: strings that end the text; empty ones are ignored.
        continues: whether it continues another text: a space at its start is then kept, which `tok.decode` drops.
        min_ids: a stop string that starts in the text of so many first ids does not end the text.
    """

    def __init__(self, tok: Tokenizer, stop: Sequence[str] = (), continues: bool = False, min_ids: int = 0):
        # Whether a stop string was found: the text ends before it, and `push` returns "" from then on.
        self.stopped = False
        self._tok = tok
        self._stop = tuple(string for string in stop if string)
        self._unstoppable = min_ids
        self._control_ids = set(tok.control_ids.values())
        self._parts: list[str] = []
        # Decoded text that may be the beginning of a stop string.
        self._withheld = ""
        # Tokenizers drop a space at the start of a text, so later ids are decoded after those of a letter.
        self._letter = tok.encode("a")
        self._context: list[int] = self._letter if continues else []
        # The ids whose text is not final yet, and how many of its characters have been passed on.
        self._ids: list[int] = []
        self._passed = 0

    @property
    def text(self) -> str:
        """Everything that `push` and `finish` have returned."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """Adds an id; returns the text that is final now: "" while a character or stop string may be incomplete."""
        self._unstoppable -= 1
        if self.stopped or token in self._control_ids or token >= self._tok.vocab_size:
            return ""
        self._ids.append(token)
        return self._emit(self._decode_final())

    def finish(self) -> str:
        """Returns the text that was withheld, once generation has ended by length or a stop id.

        A stop string may be found only now: one that is contained in a longer one which did not come.
        """
        if self.stopped:
            return ""
        return self._emit(self._decode(self._context, self._ids)[self._passed :], is_last=True)

    def _decode(self, context: list[int], ids: list[int]) -> str:
        text = self._tok.decode(context + ids)
        return text[len(self._tok.decode(context)) :] if context else text

    def _decode_final(self) -> str:
        """The text of `_ids` that was not passed on yet and that no further id can change."""
        text = self._decode(self._context, self._ids)
        # Up to three replacement characters may be the beginning of a character of four bytes.
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
        start = self._passed
        self._passed = len(text) - unfinished
        new = text[start : self._passed]
        if text and not unfinished:
            self._context = self._letter
            self._ids = []
            self._passed = 0
        elif len(self._ids) > 2 * TAIL_IDS:
            # A long run of invalid bytes. The cut may fall into a character, whose remaining bytes, three at most, are
            # then decoded to replacement characters; what follows is unchanged.
            tail = self._decode(self._letter, self._ids[-TAIL_IDS:])
            if len(tail) >= 6 and text.endswith(tail[3:]):
                self._passed -= len(text) - len(tail)
                self._context = self._letter
                self._ids = self._ids[-TAIL_IDS:]
        return new

    def _emit(self, new: str, is_last: bool = False) -> str:
        """Adds `new` to the text, except for the longest suffix that further text may complete to a stop string."""
        text = self._withheld + new
        end = len(text)
        for start in range(end if self._stop and self._unstoppable < 0 else 0):
            rest = text[start:]
            self.stopped = rest.startswith(self._stop)
            may_stop = not is_last and any(string.startswith(rest) for string in self._stop)
            if self.stopped or may_stop:
                end = start
                break
        self._withheld = text[end:]
        self._parts.append(text[:end])
        return text[:end]
