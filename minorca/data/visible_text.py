"""Ids as text that a person can read, with control tokens spelled out and trained tokens marked."""

import sys
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np

from minorca.data.tokenizer import Tokenizer


def branch_headings(starts: Sequence[int], scores: Sequence[float] | None, trained: np.ndarray) -> dict[int, str]:
    """What each branch of a tree [L] is and how long, by the index at which it starts: notes for `marked_text`.

    scores: of the branches; None: none is better than another.
    """
    if scores is None:
        names = ["answer"] * len(starts)
    else:
        roles = {(1, 0): ("chosen", "rejected"), (1,): ("desirable",), (0,): ("undesirable",)}
        names = roles.get(tuple(scores), [f"score {score:g}" for score in scores])
    spans = pairwise([*starts, len(trained)])
    return {
        start: f"\n-- {name}: {end - start} tokens, {trained[start:end].sum()} trained\n"
        for (start, end), name in zip(spans, names, strict=True)
    }


def marked_text(tok: Tokenizer, ids: np.ndarray, trained: np.ndarray, notes: dict[int, str] | None = None) -> str:
    """The text of ids [L] with what is trained [L] of it marked: «so», or on a terminal in green.

    Args:
        notes: what to write before the id at an index.
    """
    mark_start, mark_end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    notes = notes or {}
    count = len(ids)
    parts = []
    for begin, stop in pairwise(
        sorted({0, *(i for i in range(1, count) if trained[i] != trained[i - 1]), *notes, count})
    ):
        text = visible_text(tok, ids[begin:stop].tolist())
        parts += [notes.get(begin, ""), f"{mark_start}{text}{mark_end}" if trained[begin] else text]
    return "".join(parts)


def visible_text(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids, with control tokens shown as their strings.

    Text that spells a control string has a backslash before it. Backslashes before either are doubled, so that every
    text shows differently.
    """
    names = {i: name for name, i in tok.control_ids.items()}
    runs = [(control, list(run)) for control, run in groupby(ids, key=lambda i: i in names)]
    parts = []
    for n, (control, run) in enumerate(runs):
        if control:
            parts += [names[i] for i in run]
            continue
        # Ordinary text at even indices, control strings at odd ones.
        pieces = tok.split_control(tok.decode(run))
        for m, piece in enumerate(pieces):
            if m % 2:
                parts.append(f"\\{piece}")
            elif m + 1 < len(pieces) or n + 1 < len(runs):
                parts.append(piece + "\\" * (len(piece) - len(piece.rstrip("\\"))))
            else:
                parts.append(piece)
    return "".join(parts)
