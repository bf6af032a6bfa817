"""What became of rows: counts by outcome, with the places or tokens that go with them, and errors."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from minorca.data.row_files import RowError
from minorca.errors import UserError, raise_problems

# Errors that are listed, places that are listed of a reason to drop rows, and reasons that are listed.
MAX_ERRORS = 20
MAX_PLACES = 3
MAX_REASONS = 20
ADVICE = "set data.bad_rows to drop to leave invalid rows out"


@dataclass
class Tally:
    """Counts of rows that several parts of a source, or processes, have.

    Attributes:
        counts: rows by outcome, and what was ignored or changed in them.
        tokens: tokens that are dropped or cut, by outcome.
        places: where the first rows of an outcome are.
        errors: the first errors, in the order of the rows.
        more_errors: how many errors followed.
        more_invalid: how many of these were of invalid rows.
        broken: the error that ended the reading.
    """

    counts: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    errors: list[UserError] = field(default_factory=list)
    more_errors: int = 0
    more_invalid: int = 0
    broken: UserError | None = None

    def add_bad_row(self, error: UserError) -> None:
        """Counts a row that is dropped because it is invalid."""
        self._add_dropped(f"dropped: {reason_of(error)}", 1, [f"{error.path}, {error.where}"])

    def add_error(self, error: UserError) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)
        else:
            self.more_errors += 1
            self.more_invalid += isinstance(error, RowError)

    def update(self, later: "Tally") -> None:
        """Adds what became of later rows."""
        self.counts.update({what: count for what, count in later.counts.items() if what not in later.places})
        self.tokens.update(later.tokens)
        for outcome, places in later.places.items():
            self._add_dropped(outcome, later.counts[outcome], places)
        for error in later.errors:
            self.add_error(error)
        self.more_errors += later.more_errors
        self.more_invalid += later.more_invalid
        self.broken = self.broken or later.broken

    def _add_dropped(self, outcome: str, count: int, places: list[str]) -> None:
        if outcome not in self.places and len(self.places) >= MAX_REASONS:
            outcome = "dropped: invalid for other reasons"
        self.counts[outcome] += count
        known = self.places.setdefault(outcome, [])
        known += places[: MAX_PLACES - len(known)]

    @property
    def notes(self) -> dict[str, str]:
        """What is said of an outcome beside its count."""
        # Rows that were not rendered have no tokens to count.
        notes = {outcome: f"{count:,} tokens" for outcome, count in self.tokens.items() if count}
        for outcome, places in self.places.items():
            more = "; ..." if self.counts[outcome] > len(places) else ""
            notes[outcome] = "; ".join(places) + more
        return notes


def reason_of(error: UserError) -> str:
    """What is wrong, without the place and what was expected: the same for rows with the same fault."""
    fault = error.message.partition(";")[0]
    sentence = fault if error.field is None else f"{error.field} {fault}"
    # Not the numbers in names, such as UTF-8.
    return re.sub(r"(?<!\w)(?<![a-zA-Z]-)\d+", "N", re.sub(r"\[\d+\]", "[]", sentence))


def raise_errors(tallies: list[Tally]) -> None:
    """Raises the first errors of all tallies, those with the same reason together, how many more there are, and advice
    where several rows are invalid."""
    total = Tally()
    for tally in tallies:
        total.update(replace(tally, counts=Counter(), tokens=Counter(), places={}))
    broken = [] if total.broken is None else [total.broken]
    raise_problems([*_grouped(total.errors), *_rest(total), *broken])


def _grouped(errors: list[UserError]) -> list[UserError]:
    groups: dict[str, list[UserError]] = {}
    for error in errors:
        groups.setdefault(reason_of(error), []).append(error)
    return [error for group in groups.values() for error in group]


def _rest(total: Tally) -> Iterator[UserError]:
    invalid = sum(isinstance(error, RowError) for error in total.errors) + total.more_invalid
    advice = ADVICE if invalid > 1 else None
    if total.more_errors:
        yield UserError(f"and {total.more_errors:,} more rows; fix them" + (f", or {advice}" if advice else ""))
    elif advice:
        yield UserError(advice)
