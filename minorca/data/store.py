"""The token store: rendered rows in memory-mapped files.

A store is a directory with one file an array, a meta.json (format number, sources, type of the tokens, checksum of the
rows) and a manifest. It is complete or absent. prepare.py finds or builds the store of given rows and settings.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from minorca.errors import UserError
from minorca.files.atomic import MANIFEST, verify_manifest, write_manifest
from minorca.files.safe_io import quote, read_json

log = logging.getLogger(__name__)

# The version of a store's files and of meta.json. A store of another format is not read; its rows are rendered again.
FORMAT = 2

# The arrays of a store and their types; tokens are uint16 or uint32, as meta.json says.
ARRAY_TYPES = {
    "trained": np.bool_,
    "offsets": np.int64,
    "row_trained": np.int32,
    "numbers": np.int64,
    "files": np.int32,
}
ARRAYS = ("tokens", *ARRAY_TYPES)
# Further ones of a store of preferences.
BRANCH_TYPES = {"branch_offsets": np.int64, "branch_starts": np.int32, "branch_scores": np.float32}
STORE_FILES = {f"{name}.bin" for name in (*ARRAYS, *BRANCH_TYPES)} | {"meta.json", MANIFEST}


class StoredSource(NamedTuple):
    """A source's rows in a store, from `start` up to but not including `end`.

    Attributes:
        counts: how many rows had which outcome.
        notes: what is said beside such a count.
        files: the path of each file, and what the numbers of its rows count.
    """

    path: str
    start: int
    end: int
    counts: dict[str, int]
    notes: dict[str, str] = {}
    files: tuple[tuple[str, str], ...] = ()


def summarize(counts: dict[str, int], notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Counts in words: "60 read, 2 dropped: too long (812 tokens), 58 kept"."""
    return ", ".join(
        f"{count} {what} ({notes[what]})" if what in notes else f"{count} {what}" for what, count in counts.items()
    )


@dataclass
class TokenStore:
    """N rows, selected from R rows that lie end to end in S tokens.

    A row of format preference is a tree: a prompt, then B branches, the answers, end to end. Each goes on where the
    prompt ends, and only branches have trained tokens.

    Attributes:
        tokens: [S] uint16 or uint32.
        trained: [S] bool, True where the token is predicted in the loss.
        offsets: [R+1] int64, where each row starts.
        numbers: [R] int64, each row's line or row number in its file; empty if the rows are from no file.
        files: [R] int32, the number of that file in its source; empty if the rows are from no file.
        row_trained: [R] int32, how many tokens each row trains; computed if None.
        branch_offsets: [R+1] int64, which branches each row has; empty if none has any, as the next two.
        branch_starts: [B] int32, where each branch starts, counted from its row's first token; at least 1.
        branch_scores: [B] float32: of two branches of a row, the one with the higher score is preferred. A pair has 1
            and 0 in this order, a row of one branch 1 where it is desirable and 0 where it is not.
        sources: the sources of the rows, in order.
        path: the store's directory; None for rows in memory.
        digest: the checksum that `sha256` returns; computed if None.
        reference: [trained tokens of the N rows] float32, their log-probabilities under the reference of preferences;
            None if not computed.
        selected: [N] int64, the rows of the R that this store has; None for all.

    The arrays of an opened store are memory-mapped.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    files: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    row_trained: np.ndarray | None = None
    branch_offsets: np.ndarray = field(default_factory=lambda: np.empty(0, BRANCH_TYPES["branch_offsets"]))
    branch_starts: np.ndarray = field(default_factory=lambda: np.empty(0, BRANCH_TYPES["branch_starts"]))
    branch_scores: np.ndarray = field(default_factory=lambda: np.empty(0, BRANCH_TYPES["branch_scores"]))
    sources: list[StoredSource] = field(default_factory=list)
    path: Path | None = None
    digest: str | None = None
    reference: np.ndarray | None = None
    selected: np.ndarray | None = None

    @cached_property
    def indices(self) -> np.ndarray:
        """[N] int64, the row of the R that each of the N is."""
        return np.arange(len(self.offsets) - 1) if self.selected is None else self.selected

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] int64, the tokens of each row."""
        return np.diff(self.offsets)[self.indices]

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """[N], how many tokens each row trains."""
        if self.row_trained is None:
            self.row_trained = np.diff(np.concatenate([[0], np.cumsum(self.trained)])[self.offsets])
        return self.row_trained[self.indices]

    @property
    def has_branches(self) -> bool:
        """Whether its rows are trees."""
        return len(self.branch_offsets) > 0

    @cached_property
    def branch_counts(self) -> np.ndarray:
        """[N] int64, how many branches each row has."""
        return np.diff(self.branch_offsets)[self.indices] if self.has_branches else np.zeros(len(self), np.int64)

    @cached_property
    def pair_counts(self) -> np.ndarray:
        """[N] int64, how many pairs of branches each row has of which the first is preferred to the second."""
        counts = np.zeros(len(self), np.int64)
        for size in set(self.branch_counts.tolist()) - {0}:
            rows = np.flatnonzero(self.branch_counts == size)
            starts = self.branch_offsets[self.indices[rows]]
            scores = self.branch_scores[starts[:, None] + np.arange(size)]
            counts[rows] = (scores[:, :, None] > scores[:, None, :]).sum((1, 2))
        return counts

    @cached_property
    def _trained_ends(self) -> np.ndarray:
        return np.cumsum(self.trained_counts)

    def trained_span(self, index: int) -> slice:
        """The place of a row's trained tokens among those of the N rows."""
        end = self._trained_ends[index]
        return slice(end - self.trained_counts[index], end)

    @property
    def source_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of each source's rows among the N, `end` exclusive."""
        edges = [np.searchsorted(self.indices, [source.start, source.end]) for source in self.sources]
        return [(int(start), int(end)) for start, end in edges]

    def sha256(self) -> str:
        """The checksum of all N rows, by which a resumed run recognizes them."""
        if self.digest is None:
            digest = hashlib.sha256()
            trees = (self.branch_offsets, self.branch_starts, self.branch_scores)
            for array in (self.tokens, self.trained, self.offsets, *trees):
                digest.update(np.ascontiguousarray(array).data)
            self.digest = digest.hexdigest()
        return self.digest

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's ids and loss mask."""
        row = self.indices[index]
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self.tokens[span], self.trained[span]

    def branches(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each branch of a row starts, counted from its first token, and the branches' scores."""
        if not self.has_branches:
            return self.branch_starts, self.branch_scores
        row = self.indices[index]
        span = slice(self.branch_offsets[row], self.branch_offsets[row + 1])
        return self.branch_starts[span], self.branch_scores[span]

    def locate(self, index: int) -> str:
        """The file that a row is from, and its line or row there."""
        row = self.indices[index]
        source = next(source for source in self.sources if source.start <= row < source.end)
        path, unit = source.files[self.files[row]]
        return f"{path}, {unit} {self.numbers[row]}"

    def select(self, indices: Iterable[int]) -> "TokenStore":
        """The rows at `indices`, without copying tokens. `source_ranges` is correct only for increasing indices."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.sha256().encode() + chosen.tobytes()).hexdigest()
        return replace(self, selected=self.indices[chosen], digest=digest, reference=None)

    def report(self) -> None:
        """Logs the outcome of each source's rows, and the percentiles of the rows' lengths."""
        for source in self.sources:
            log.info("%s: %s", source.path, summarize(source.counts, source.notes))
        quantiles = np.quantile(self.lengths, (0.5, 0.9, 0.99, 1), method="inverted_cdf")
        log.info("tokens of a row: 50%% have up to %d, 90%% %d, 99%% %d, the longest %d", *quantiles)


def finish_store(directory: Path, token_type: str, sources: list[dict]) -> None:
    """Completes a store whose arrays are written: meta.json and the manifest."""
    checksum = _map_arrays(directory, token_type).sha256()
    meta = {"format": FORMAT, "tokens": token_type, "sources": sources, "sha256": checksum}
    (directory / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_manifest(directory)


def open_store(directory: Path) -> TokenStore | None:
    """Opens a store; None if there is none, or if it is damaged or of another format, which is logged."""
    if not directory.is_dir():
        return None
    try:
        verify_manifest(directory)
        meta = read_json(directory / "meta.json")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"is {quote(meta.get('format'))}; expected {FORMAT}", path=directory / "meta.json", field="format"
            )
    except (UserError, OSError) as error:
        # OSError: another process is replacing the store.
        log.warning("%s; its rows are rendered again", error)
        return None
    sources = []
    for source in meta["sources"]:
        start, end = source["rows"]
        sources.append(StoredSource(source["path"], start, end, source["counts"], source["notes"]))
    return replace(_map_arrays(directory, meta["tokens"]), sources=sources, path=directory, digest=meta["sha256"])


def _map_arrays(directory: Path, token_type: str) -> TokenStore:
    def mapped(types: Mapping[str, type | str]) -> dict[str, np.ndarray]:
        return {name: np.memmap(directory / f"{name}.bin", kind, "r") for name, kind in types.items()}

    arrays = mapped({"tokens": token_type} | ARRAY_TYPES)
    store = TokenStore(
        tokens=arrays["tokens"],
        trained=arrays["trained"],
        offsets=arrays["offsets"],
        numbers=arrays["numbers"],
        files=arrays["files"],
        row_trained=arrays["row_trained"],
    )
    has_branches = (directory / "branch_offsets.bin").exists()
    return replace(store, **mapped(BRANCH_TYPES)) if has_branches else store
