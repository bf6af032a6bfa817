"""A progress bar for what takes longer than two seconds: on a terminal, on standard error, of the first rank alone."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from minorca.host import is_first_rank

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


def bar_settings() -> dict[str, Any]:
    """tqdm's arguments by which a bar is on a terminal alone, of the first rank alone, and there after two seconds."""
    # None: unless standard error is no terminal
    return {"disable": None if is_first_rank() else True, "leave": False, "delay": 2}


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
        unit=f" {unit}" if unit != "B" else unit,
        unit_scale=unit == "B",
        **bar_settings(),
    )
