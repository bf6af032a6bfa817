"""A progress bar for what takes longer than two seconds."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Gives the items; on a terminal, a bar on standard error says how many were, from the third second on.

    Args:
        what: is done, for the bar's beginning.
        total: how many items there are; None: `len(items)` where they have one.
        unit: what an item is called.
    """
    yield from tqdm(items, what, total, leave=False, delay=2, disable=None, unit=f" {unit}")
