"""The order of all steps, and batches made from it. The order is a function of lengths, weights and a seed alone: the loader's
whole state is the number of the step, and no number of ranks changes what a step holds.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minorca.data.store import TokenStore
from minorca.errors import UserError

Step = list[np.ndarray]  # its micro-batches, each the rows it holds
ROWS, BINS = 1, 2  # streams of random numbers


class Order:
    """Which rows every step has, counted from 1 over all epochs.

    lengths [N]; parts: (first, last, weight) of each source's rows. Epoch e, counted from 0, takes the rows of a source of n rows and
    weight w from place e*w*n to place (e+1)*w*n of an endless repetition of shuffles of them: of weight 1 every row once an epoch,
    of 0.5 half of them and in the next epoch the others, of 2 every row twice.

    Packing fills each micro-batch with the longest row left that fits into `capacity` tokens, then the longest that fits the rest, and
    so on, equal lengths in shuffled order; without it, each is one row. A step is `micro_batches` of them in shuffled order; the
    last of an epoch may be short. How many micro-batches an epoch has follows from the lengths: with whole weights, all have as many.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        capacity: int,
        micro_batches: int,
        packing: bool,
        seed: int,
        parts: list[tuple[int, int, float]] | None = None,
    ):
        self.lengths, self.capacity, self.micro_batches, self.packing, self.seed = (
            lengths,
            capacity,
            micro_batches,
            packing,
            seed,
        )
        self.parts = [
            part for part in parts or [(0, len(lengths), 1.0)] if part[0] < part[1]
        ]  # all of a source may be held out
        self._ends: list[int] = []  # how many steps there are by the end of each epoch
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = (
            None  # an epoch, its rows, and where micro-batches start among them
        )

    def step(self, n: int) -> Step:
        """The n-th step's micro-batches: arrays of rows."""
        while not self._ends or self._ends[-1] < n:
            self._count_epoch()
        epoch = bisect_left(self._ends, n)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # two plans need twice the memory
            self._planned = epoch, *self._plan(epoch)
        _, rows, starts = self._planned
        first = (n - 1 - (self._ends[epoch - 1] if epoch else 0)) * self.micro_batches
        edges = starts[first : first + self.micro_batches + 1]
        return [rows[start:end] for start, end in zip(edges, edges[1:])]

    def steps(self, epochs: int) -> int:
        """How many steps so many epochs have.

        Raises:
            UserError: none, for the weights are so small that no row is drawn.
        """
        while len(self._ends) < epochs:
            self._count_epoch()
        if not self._ends[epochs - 1]:
            raise UserError(f"data.train: its weights leave no row in {epochs} epochs; raise them, or train.epochs")
        return self._ends[epochs - 1]

    def _count_epoch(self) -> None:
        epoch = len(self._ends)
        if epoch and all(float(weight).is_integer() for *_, weight in self.parts):
            steps = self._ends[0]
        else:
            lengths = self.lengths[self._draw(epoch)]
            bins = sum(times for _, times in _patterns(lengths, self.capacity)) if self.packing else len(lengths)
            steps = -(-bins // self.micro_batches)
        self._ends.append(steps + (self._ends[-1] if epoch else 0))

    def _draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        drawn = [np.empty(0, np.int64)]
        for part, (first, last, weight) in enumerate(self.parts):
            n = last - first
            start, end = round(epoch * weight * n), round((epoch + 1) * weight * n)
            for turn in range(start // n, -(-end // n)):
                shuffled = np.random.default_rng((self.seed, ROWS, part, turn)).permutation(n)
                drawn.append(first + shuffled[max(start - turn * n, 0) : end - turn * n])
        return np.concatenate(drawn)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's rows in order [R], and where its micro-batches start among them [B+1]."""
        random = np.random.default_rng((self.seed, BINS, epoch))
        rows = random.permutation(
            self._draw(epoch)
        )  # or a source's rows would share micro-batches with one another alone
        if not self.packing:
            return rows, np.arange(len(rows) + 1)
        lengths = self.lengths[rows]
        patterns = _patterns(lengths, self.capacity)
        sizes = np.repeat([len(pattern) for pattern, _ in patterns], [times for _, times in patterns])
        wanted = np.concatenate([np.tile(pattern, times) for pattern, times in patterns])  # the length in each place
        filled = np.empty_like(rows)
        filled[np.argsort(wanted, kind="stable")] = rows[np.argsort(lengths, kind="stable")]
        return _shuffle_bins(filled, sizes, random)


def _patterns(lengths: np.ndarray, capacity: int) -> list[tuple[list[int], int]]:
    """How the greedy rule fills bins: the lengths in one, and how many bins in a row have these.

    What the rule takes depends only on how many rows of each length are left, and until one length of a bin runs out it takes the
    same again.
    """
    left = np.bincount(lengths, minlength=capacity + 1).tolist()
    longest = list(range(capacity + 1))  # longest[n]: at most n, and no length between the two has a row left

    def longest_left(room: int) -> int:
        path = []
        while room and not left[room]:
            path.append(room)
            room = longest[room] if longest[room] != room else room - 1
        for length in path:
            longest[length] = room
        return room

    patterns = []
    while longest_left(capacity):
        room, pattern = capacity, []
        while length := longest_left(room):
            pattern.append(length)
            left[length] -= 1
            room -= length
        more = min(left[length] // pattern.count(length) for length in set(pattern))
        for length in pattern:
            left[length] -= more
        patterns.append((pattern, 1 + more))
    return patterns


def _shuffle_bins(rows: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bins that lie end to end in another order: their rows, and where they start [B+1]."""
    order = random.permutation(len(sizes))
    old, new = np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([[0], np.cumsum(sizes[order])])
    places = np.arange(len(rows)) + np.repeat(old[order] - new[:-1], sizes[order])
    return rows[places], new


def plan_epoch(
    lengths: np.ndarray, capacity: int, micro_batches: int, packing: bool, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch in which every row comes once."""
    order = Order(lengths, capacity, micro_batches, packing, seed)
    steps = order.steps(1)
    return [order.step(epoch * steps + n) for n in range(1, steps + 1)]


@dataclass
class Batch:
    """One micro-batch: documents end to end.

    tokens [T] int64; cu_seqlens [N+1], on the host; target_rows [M]: the positions whose next token is trained, and
    targets [M]: those tokens.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    target_rows: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        def move(t: Tensor) -> Tensor:
            return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t

        return Batch(move(self.tokens), self.cu_seqlens, move(self.target_rows), move(self.targets))

    def without_targets(self) -> "Batch":
        """The same documents with nothing to train on: what a rank runs when a step leaves it no micro-batch."""
        return Batch(self.tokens, self.cu_seqlens, self.target_rows[:0], self.targets[:0])


def make_batch(store: TokenStore, rows: np.ndarray) -> Batch:
    parts = [store.row(row) for row in rows]
    tokens = torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([mask for _, mask in parts]))
    # a row's first token is never trained, so the position before a trained token is in the same document
    targets_at = trained.nonzero()[:, 0]
    cu_seqlens = torch.from_numpy(np.cumsum([0, *(len(ids) for ids, _ in parts)]))
    return Batch(tokens, cu_seqlens, targets_at - 1, tokens[targets_at])


def trained_tokens(store: TokenStore, micro_batches: Step) -> int:
    """The loss's denominator of a step: known to every rank before anything is computed."""
    return int(store.trained_counts[np.concatenate(micro_batches)].sum())
