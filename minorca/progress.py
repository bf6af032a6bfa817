"""A progress bar for what takes longer than two seconds: on a terminal, on standard error, of the first rank alone."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Gives the items; a bar says how many were.

    Args:
        what: is done, for the bar's beginning.
        total: how many items there are; None: `len(items)` where they have one.
        unit: what an item is called.
    """
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
    with progress_bar(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def bar_disabled() -> bool | None:
    """What tqdm's `disable` is: on ranks after the first True; None, unless standard error is no terminal."""
    return None if os.environ.get("RANK", "0") == "0" else True


def progress_bar(what: str, total: int | None = None, unit: str = "", done: int = 0) -> tqdm:
    """A bar for `with`, whose `update(n)` says that n more are done; see `progress`.

    Args:
        unit: "B" counts bytes, in multiples of 1000.
        done: how many were before.
    """
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        leave=False,
        delay=2,
        disable=bar_disabled(),
        unit=f" {unit}" if unit != "B" else unit,
        unit_scale=unit == "B",
    )
