"""What a template makes of a conversation, and what all templates share."""

from dataclasses import dataclass, field

# The note of a row that is trained without an end.
NOTHING_ENDS = "with an answer that nothing ends: the model has no end of sequence"

# Parts of a rendered conversation: ids, and whether they are trained.
Pieces = list[tuple[list[int], bool]]


@dataclass
class Rendered:
    """A conversation's ids and its loss mask.

    Attributes:
        ids: the tokens.
        trained: of each token, whether it is trained: an answer's content and the token that ends its turn are.
        notes: what the user should know of this row, to be counted: "with ...".
    """

    ids: list[int]
    trained: list[bool]
    notes: list[str] = field(default_factory=list)


def join(pieces: Pieces) -> Rendered:
    return Rendered([i for ids, _ in pieces for i in ids], [trained for ids, trained in pieces for _ in ids])
