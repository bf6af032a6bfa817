"""Rows rendered once: ids, the mask of trained tokens, and where each row starts. In memory."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minorca.chat import render
from minorca.config import DataConfig
from minorca.data.sources import Row
from minorca.errors import UserError
from minorca.tokenizer import Tokenizer


@dataclass
class TokenStore:
    """Rows end to end. tokens [S] int32; trained [S] bool, True where the token is predicted in the loss; offsets [N+1]."""

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sha256(self) -> str:
        """Of all it holds: what a run that resumes must find again."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.trained, self.offsets):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's ids and mask."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.trained[span]

    def select(self, indices: Iterable[int]) -> "TokenStore":
        return _store([self.row(index) for index in indices])


def _store(rows: list[tuple[np.ndarray, np.ndarray]]) -> TokenStore:
    ids, masks = ([row[side] for row in rows] for side in (0, 1))
    return TokenStore(
        np.concatenate(ids or [np.empty(0, np.int32)]),
        np.concatenate(masks or [np.empty(0, bool)]),
        np.cumsum([0, *map(len, ids)]),
    )


def render_row(row: Row, tok: Tokenizer, template: str, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    """A row's ids [n] int32 and the mask [n] of the tokens it trains; the first token is never predicted."""
    try:
        rendered = render(tok, row.messages, template, masked=train_on == "response")
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    trained = np.array(rendered.trained, bool)
    if train_on == "all":
        trained[:] = True
    trained[:1] = False
    return np.array(rendered.ids, np.int32), trained


def render_rows(rows: Iterable[Row], tok: Tokenizer, data: DataConfig, template: str) -> tuple[TokenStore, Counter]:
    """All rows worth training on, and the counts of what became of every row read.

    Raises:
        UserError: naming the row, where the settings say that an empty or over-long row is an error.
    """
    kept, counts = [], Counter()
    for row in rows:
        counts["read"] += 1
        if not row.messages[-1]["content"].strip():
            if data.empty_response == "error":
                raise UserError(f"{row.where}: the response is empty; mend the row, or set data.empty_response to drop")
            counts["dropped: empty response"] += 1
            continue
        ids, trained = render_row(row, tok, template, data.train_on)
        if len(ids) > data.seq_len:
            if data.too_long == "error":
                raise UserError(f"{row.where}: {len(ids)} tokens, over data.seq_len, {data.seq_len}; raise it, or set data.too_long")
            if data.too_long == "drop":
                counts["dropped: too long"] += 1
                continue
            ids, trained = ids[: data.seq_len], trained[: data.seq_len]
            counts["truncated"] += bool(trained.any())
        if not trained.any():
            counts["dropped: nothing to train on"] += 1
            continue
        counts["kept"] += 1
        counts["tokens"] += len(ids)
        counts["trained tokens"] += int(trained.sum())
        kept.append((ids, trained))
    return _store(kept), counts
