"""How a rendered row is shown to a person."""

import sys
from itertools import groupby

import numpy as np

from minorca.data.tokenizer import Tokenizer


def print_row(tok: Tokenizer, ids: np.ndarray, trained: np.ndarray) -> None:
    """Prints a row's text, ids [L] and trained [L], with its trained tokens marked: «so», or on a terminal in green."""
    mark_start, mark_end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    for begin, stop in zip(edges, edges[1:]):
        text = visible_text(tok, ids[begin:stop].tolist())
        print(f"{mark_start}{text}{mark_end}" if trained[begin] else text, end="")
    print()


def visible_text(tok: Tokenizer, ids: list[int]) -> str:
    """The text of ids, with control tokens shown as their strings."""
    names = {i: name for name, i in tok.control_ids.items()}
    runs = groupby(ids, key=lambda i: i in names)
    return "".join("".join(names[i] for i in run) if control else tok.decode(list(run)) for control, run in runs)
