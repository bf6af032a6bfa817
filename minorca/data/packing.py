"""An epoch's order, and batches made from it. The order is a function of (row lengths, seed, epoch) alone: the loader's
whole state is the epoch and the step in it, and no number of ranks changes what a step holds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minorca.data.store import TokenStore

Plan = list[list[list[int]]]  # step -> micro-batch -> rows


def plan_epoch(lengths: np.ndarray, capacity: int, micro_batches: int, packing: bool, seed: int, epoch: int) -> Plan:
    """Every row exactly once, in shuffled steps of `micro_batches` micro-batches of at most `capacity` tokens.

    Packing fills each micro-batch with the longest row left that fits, then the longest that fits the rest, and so on,
    equal lengths in shuffled order. How many micro-batches that makes follows from the lengths, so epochs are equally
    long; the last step of one may be short.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    bins = _fill(lengths, order, capacity) if packing else [[int(row)] for row in order]
    random.shuffle(bins)
    return [bins[start : start + micro_batches] for start in range(0, len(bins), micro_batches)]


def _fill(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # by length
    for row, length in zip(order.tolist(), lengths[order].tolist()):
        waiting[length].append(row)
    longest = list(range(capacity + 1))  # longest[n]: at most n, and no length between the two has a row left

    def longest_waiting(room: int) -> int:
        path = []
        while room and not waiting[room]:
            path.append(room)
            room = longest[room] if longest[room] != room else room - 1
        for length in path:
            longest[length] = room
        return room

    bins = []
    while longest_waiting(capacity):
        room, rows = capacity, []
        while length := longest_waiting(room):
            rows.append(waiting[length].pop())
            room -= length
        bins.append(rows)
    return bins


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


def make_batch(store: TokenStore, rows: list[int]) -> Batch:
    parts = [store.row(row) for row in rows]
    tokens = torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64))
    trained = torch.from_numpy(np.concatenate([mask for _, mask in parts]))
    # a row's first token is never trained, so the position before a trained token is in the same document
    targets_at = trained.nonzero()[:, 0]
    cu_seqlens = torch.from_numpy(np.cumsum([0, *(len(ids) for ids, _ in parts)]))
    return Batch(tokens, cu_seqlens, targets_at - 1, tokens[targets_at])


def trained_tokens(store: TokenStore, micro_batches: list[list[int]]) -> int:
    """The loss's denominator of a step: known to every rank before anything is computed."""
    return sum(int(store.row(row)[1].sum()) for rows in micro_batches for row in rows)
