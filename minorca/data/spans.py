"""Text in spans, of which some are trained, to ids and a loss mask."""

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

from minorca.data.rendered import Rendered
from minorca.data.tokenizer import Tokenizer

# A part of a text, and whether it is trained.
Span = tuple[str, bool]

# Of a long text without control strings, so many characters before a new part are encoded again, and so many ids of
# them may differ at either end.
CONTEXT = 4096
EDGE = 16


def encode_spans(tok: Tokenizer, encode: Callable[[str], list[int]], spans: list[Span]) -> Rendered:
    """The text of all spans encoded as a whole, as transformers does, except where a token would cross a border.

    What precedes a border between prompt and answer keeps its ids: where a token reaches across it (into an answer's
    leading newline, say), it is split there, or the generation prompt would not be a prefix of the training row.
    """
    encoder = _IncrementalEncoder(tok, encode)
    ids: list[int] = []
    trained: list[bool] = []
    prefix = ""
    # Where earlier spans end, in characters and in ids.
    borders = [(0, 0)]
    # Whether a token was split so far back that the text as a whole will have other ids there whatever follows.
    differs = False
    for text, is_trained in spans:
        prefix += text
        is_long = len(prefix) - encoder.start > 2 * CONTEXT
        new = _encode_end(encode, prefix, text, ids, borders) if is_long else None
        # Encoding the whole at every span would take time that grows with the square of the text.
        if new is None and not (is_long and differs and not encoder.may_advance(prefix)):
            first = encoder.head
            # `ids` has the whole head, or they differ.
            known = ids[first:]
            whole = encoder(prefix)
            if not differs and whole[: len(known)] == known:
                new = whole[len(known) :]
            elif not differs:
                # In the head it will stay so; elsewhere, if it is not near the end.
                same = next((n for n, (a, b) in enumerate(zip(whole, known)) if a != b), len(whole))
                differs = first + same < encoder.head or (is_long and same < len(whole) - EDGE)
        if new is None:
            new = encode(text)
        ids += new
        trained += [is_trained] * len(new)
        borders.append((len(prefix), len(ids)))
    return Rendered(ids, trained)


def _encode_end(
    encode: Callable[[str], list[int]], prefix: str, text: str, ids: list[int], borders: list[tuple[int, int]]
) -> list[int] | None:
    """The ids of `text`, which ends `prefix` and before which `ids` are known, by encoding the end of `prefix` alone.

    None if the ids of the context before `text` are not those known, but for the tokens at its start.
    """
    start = bisect_right(borders, (len(prefix) - len(text) - CONTEXT, 0)) - 1
    first_character, first_id = borders[max(start, 0)]
    known = ids[first_id:]
    window = encode(prefix[first_character:])
    # A tokenizer may mark the start of a text by a token more, or join that mark with the first one.
    for shift in (0, 1, -1):
        end = len(known) + shift
        if len(known) > 2 * EDGE and window[EDGE + shift : end - EDGE] == known[EDGE:-EDGE]:
            crosses = window[end - EDGE : end] != known[-EDGE:]
            return encode(text) if crosses else window[end:]
    return None


class _IncrementalEncoder:
    """`encode` for texts of which each starts with the one before, without encoding the common part again.

    Only what follows a control string near the end of the earlier text is encoded again. Tokenizers split at control
    strings first, so the ids before one do not change.

    The later part is encoded with its control string in front, which may absorb white space after it, and without which
    some tokenizers would see the start of a text. Tokenizers that find control strings otherwise (only between words,
    or in a normalized text) encode everything again.

    Attributes:
        head: the number of ids up to and including a control string.
        start: where that string starts in the text.
        searched: up to where the text was searched for one that comes later.
    """

    def __init__(self, tok: Tokenizer, encode: Callable[[str], list[int]]):
        self.tok = tok
        self.encode = encode
        self.control = set(tok.control_ids.values())
        self.longest = max(map(len, tok.control_ids), default=0)
        self.head = 0
        self.start = 0
        self.searched = 0

    def may_advance(self, text: str) -> bool:
        """Whether encoding `text` may find a later control string before which the ids do not change."""
        # One near the end was not taken.
        start = max(self.start + 1, self.searched - self.longest)
        self.searched = len(text)
        return any(_splits_text(self.tok, piece) for piece in self.tok.split_control(text[start:])[1::2])

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` that come after the head, as it was before this call."""
        # The control string's id is in the head already.
        new = self.encode(text[self.start :])[1 if self.head else 0 :]
        pieces = self.tok.split_control(text[self.start :])
        end = self.start
        cut = None
        for n, piece in enumerate(pieces):
            end += len(piece)
            # A string near the end may turn out to be part of a longer one.
            if n % 2 and end - len(piece) + self.longest < len(text) and _splits_text(self.tok, piece):
                cut = (n // 2, end - len(piece))
        # Where the control strings are among the ids; the first is in `head`, if there is one.
        places = [place for place, i in enumerate(new) if i in self.control]
        first = 1 if self.head else 0
        if cut and cut[0] >= first and len(places) == len(pieces) // 2 - first:
            self.head += places[cut[0] - first] + 1
            self.start = cut[1]
        self.searched = len(text)
        return new


@lru_cache(maxsize=4096)
def _splits_text(tok: Tokenizer, control: str) -> bool:
    """Whether the ids on both sides of a control string do not depend on each other."""
    encode = tok.encode_template
    return encode(f"a{control}a") == encode(f"a{control}") + encode(f"{control}a")[1:]
