"""The schedule of all steps, and batches made from it.

The schedule is a function of the rows' lengths, the sources' weights and a seed alone: the loader's whole state is the
number of the step, and what a step holds does not depend on the number of ranks.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minorca.data.store import TokenStore
from minorca.errors import UserError

# A step's micro-batches, each an array of the rows it holds.
Step = list[np.ndarray]

# Random numbers are drawn from a stream for each purpose.
SHUFFLE_ROWS = 1
SHUFFLE_MICRO_BATCHES = 2


class BatchSchedule:
    """Which rows each step has, counted from 1 over all epochs.

    Epoch e, counted from 0, takes the rows of a source of n rows and weight w from place e*w*n to place (e+1)*w*n of an
    endless repetition of shuffles of them: with weight 1 every row once an epoch, with 0.5 half of them and in the next
    epoch the others, with 2 every row twice.

    Packing fills each micro-batch with the longest row left that fits into `capacity` tokens, then the longest that
    fits into the rest, and so on, equal lengths in shuffled order; without packing, each micro-batch is one row. A step
    is `micro_batches` of them in shuffled order; the last step of an epoch may have fewer. The number of micro-batches
    in an epoch follows from the lengths: with integer weights, it is the same in all epochs.

    Args:
        lengths: [N] int64, the tokens of each row.
        capacity: the most tokens in a micro-batch, at least the longest row.
        micro_batches: how many micro-batches a step has.
        packing: whether micro-batches are filled with several rows.
        seed: of all random numbers.
        sources: (start, end, weight) of each source's rows, `end` exclusive; by default one source of weight 1.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        capacity: int,
        micro_batches: int,
        packing: bool,
        seed: int,
        sources: list[tuple[int, int, float]] | None = None,
    ):
        self.lengths = lengths
        self.capacity = capacity
        self.micro_batches = micro_batches
        self.packing = packing
        self.seed = seed
        # All rows of a source may be held out.
        self.sources = [source for source in sources or [(0, len(lengths), 1.0)] if source[0] < source[1]]
        # The number of steps up to the end of each epoch.
        self._ends: list[int] = []
        # An epoch, its rows in order, and where its micro-batches start among them.
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def step(self, n: int) -> Step:
        """The n-th step's micro-batches: arrays of rows."""
        while not self._ends or self._ends[-1] < n:
            self._count_epoch()
        epoch = bisect_left(self._ends, n)
        if self._planned is None or self._planned[0] != epoch:
            # Frees the old plan first: two need twice the memory.
            self._planned = None
            self._planned = (epoch, *self._plan(epoch))
        _, rows, starts = self._planned
        steps_before = self._ends[epoch - 1] if epoch else 0
        first = (n - 1 - steps_before) * self.micro_batches
        edges = starts[first : first + self.micro_batches + 1]
        return [rows[start:end] for start, end in zip(edges, edges[1:])]

    def steps(self, epochs: float) -> int:
        """The number of steps in that many epochs: those of the whole ones, and the rounded share of the next one's;
        at least one.

        Raises:
            UserError: there are none, because the weights are so small that no row is drawn.
        """
        if not self._steps_until(math.ceil(epochs)):
            raise UserError(
                f"has weights that leave no row in {epochs:g} epochs; raise them, or train.epochs", field="data.train"
            )
        return max(1, self._steps_until(epochs))

    def steps_every(self, epochs: float, steps: int) -> set[int]:
        """Of the first `steps` steps, those with which `epochs` epochs end, or twice as many, and so on."""
        found = set()
        n = 1
        # rounded, so that the ends of epochs are exact
        while (step := self._steps_until(round(n * epochs, 9))) <= steps:
            found.add(step)
            n += 1
        return found

    def _steps_until(self, epochs: float) -> int:
        whole, share = divmod(epochs, 1)
        while len(self._ends) < math.ceil(epochs):
            self._count_epoch()
        ends = [0, *self._ends]
        start = ends[int(whole)]
        return start + round(share * (ends[int(whole) + 1] - start)) if share else start

    def _count_epoch(self) -> None:
        epoch = len(self._ends)
        if epoch and all(float(weight).is_integer() for *_, weight in self.sources):
            steps = self._ends[0]
        else:
            lengths = self.lengths[self._draw(epoch)]
            bins = sum(times for _, times in _patterns(lengths, self.capacity)) if self.packing else len(lengths)
            steps = -(-bins // self.micro_batches)
        self._ends.append(steps + (self._ends[-1] if epoch else 0))

    def _draw(self, epoch: int) -> np.ndarray:
        """The rows of an epoch."""
        drawn = [np.empty(0, np.int64)]
        for source, (first_row, end_row, weight) in enumerate(self.sources):
            n = end_row - first_row
            start = round(epoch * weight * n)
            end = round((epoch + 1) * weight * n)
            for turn in range(start // n, -(-end // n)):
                shuffled = np.random.default_rng((self.seed, SHUFFLE_ROWS, source, turn)).permutation(n)
                drawn.append(first_row + shuffled[max(start - turn * n, 0) : end - turn * n])
        return np.concatenate(drawn)

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's rows in order [R], and where its micro-batches start among them [B+1]."""
        random = np.random.default_rng((self.seed, SHUFFLE_MICRO_BATCHES, epoch))
        # Otherwise a source's rows would share micro-batches only with one another.
        rows = random.permutation(self._draw(epoch))
        if not self.packing:
            return rows, np.arange(len(rows) + 1)
        lengths = self.lengths[rows]
        patterns = _patterns(lengths, self.capacity)
        sizes = np.repeat([len(pattern) for pattern, _ in patterns], [times for _, times in patterns])
        # The length of the row in each place.
        wanted = np.concatenate([np.tile(pattern, times) for pattern, times in patterns])
        filled = np.empty_like(rows)
        filled[np.argsort(wanted, kind="stable")] = rows[np.argsort(lengths, kind="stable")]
        return _shuffle_bins(filled, sizes, random)


def _patterns(lengths: np.ndarray, capacity: int) -> list[tuple[list[int], int]]:
    """How the greedy rule fills bins: the lengths in one bin, and how many bins in a row have these.

    What the rule takes depends only on how many rows of each length are left, and until one length of a bin runs out it
    takes the same again.
    """
    left = np.bincount(lengths, minlength=capacity + 1).tolist()
    # longest[n] <= n, and no length between the two has a row left.
    longest = list(range(capacity + 1))

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
        room = capacity
        pattern = []
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
    """Shuffles bins that lie end to end: returns their rows, and where each bin starts [B+1]."""
    order = random.permutation(len(sizes))
    old_starts = np.concatenate([[0], np.cumsum(sizes)])
    new_starts = np.concatenate([[0], np.cumsum(sizes[order])])
    places = np.arange(len(rows)) + np.repeat(old_starts[order] - new_starts[:-1], sizes[order])
    return rows[places], new_starts


def plan_epoch(
    lengths: np.ndarray, capacity: int, micro_batches: int, packing: bool, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch in which every row comes once; arguments as for `BatchSchedule`."""
    schedule = BatchSchedule(lengths, capacity, micro_batches, packing, seed)
    steps = schedule.steps(1)
    return [schedule.step(epoch * steps + n) for n in range(1, steps + 1)]


@dataclass
class Answers:
    """The A answers of a micro-batch, one for each branch, in order.

    Attributes:
        lengths: [A] int64, how many targets each has; the batch's targets lie in the answers' order.
        scores: [A] float32, as in the store.
        pairs: [P, 2] int64, places among the A of two answers of one row, of which the first is preferred; in order of
            the rows.
        reference: [M] float32, the log-probability of each target under the reference; None if not computed before.
    """

    lengths: Tensor
    scores: Tensor
    pairs: Tensor
    reference: Tensor | None = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Answers":
        """The same with every tensor changed."""
        reference = None if self.reference is None else change(self.reference)
        return Answers(change(self.lengths), change(self.scores), change(self.pairs), reference)


@dataclass
class Batch:
    """One micro-batch: documents end to end.

    Attributes:
        tokens: [T] int64.
        cu_seqlens: [N+1] int64, where each document starts and the last one ends; always on the CPU.
        target_rows: [M] int64, the positions in `tokens` whose next token is trained; for the first token of a branch,
            that of the prompt's last token.
        targets: [M] int64, those next tokens.
        branches: of each document where its branches start, counted from its first token; empty if none has any.
        answers: of the branches, which are compared and how; None if there are none.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    target_rows: Tensor
    targets: Tensor
    branches: list[list[int]] = field(default_factory=list)
    answers: Answers | None = None

    def to(self, device: torch.device) -> "Batch":
        def move(t: Tensor) -> Tensor:
            return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)

        return Batch(
            tokens=move(self.tokens),
            cu_seqlens=self.cu_seqlens,
            target_rows=move(self.target_rows),
            targets=move(self.targets),
            branches=self.branches,
            answers=self.answers and self.answers.apply(move),
        )

    def without_targets(self) -> "Batch":
        """The same documents without targets: what a rank runs when a step leaves it no micro-batch."""
        answers = self.answers and self.answers.apply(lambda t: t[:0])
        return replace(self, target_rows=self.target_rows[:0], targets=self.targets[:0], answers=answers)


def make_batch(store: TokenStore, rows: np.ndarray) -> Batch:
    """The micro-batch of some rows of a store, in their order, on the CPU."""
    documents = [store.row(row) for row in rows]
    tokens = torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([mask for _, mask in documents]))
    # A row's first token is never trained, so the position before a trained token is in the same document.
    targets_at = trained.nonzero()[:, 0]
    cu_seqlens = torch.from_numpy(np.cumsum([0, *(len(ids) for ids, _ in documents)]))
    batch = Batch(tokens, cu_seqlens, targets_at - 1, tokens[targets_at])
    return _with_branches(batch, store, rows, targets_at) if store.has_branches else batch


def _with_branches(batch: Batch, store: TokenStore, rows: np.ndarray, targets_at: Tensor) -> Batch:
    trees = [store.branches(row) for row in rows]
    documents = batch.cu_seqlens[:-1].tolist()
    starts = torch.tensor([document + start for document, (begin, _) in zip(documents, trees) for start in begin])
    sizes = [len(scores) for _, scores in trees]
    # The last token of each branch's prompt.
    before = torch.tensor([document + begin[0] - 1 for document, (begin, _) in zip(documents, trees)])
    before = before.repeat_interleave(torch.tensor(sizes))
    answer = torch.searchsorted(starts, targets_at, right=True) - 1
    pairs = [np.argwhere(scores[:, None] > scores) + first for (_, scores), first in zip(trees, np.cumsum([0, *sizes]))]
    return replace(
        batch,
        target_rows=torch.where(targets_at == starts[answer], before[answer], batch.target_rows),
        branches=[begin.tolist() for begin, _ in trees],
        answers=Answers(
            lengths=torch.bincount(answer, minlength=len(starts)),
            scores=torch.from_numpy(np.concatenate([scores for _, scores in trees])),
            pairs=torch.from_numpy(np.concatenate(pairs)),
            reference=_reference(store, rows),
        ),
    )


def _reference(store: TokenStore, rows: np.ndarray) -> Tensor | None:
    values = store.reference
    if values is None:
        return None
    return torch.from_numpy(np.concatenate([values[store.trained_span(row)] for row in rows]))
