"""Schedules and batches: every row as often as promised, no micro-batch too full, nothing trained across documents."""

import bisect
import random
from collections import Counter

import numpy as np
import pytest
import torch

from minorca import UserError
from minorca.data.packing import Batch, BatchSchedule, make_batch, plan_epoch
from minorca.data.store import TokenStore
from minorca.train.objectives import NextToken


def drawn_lengths(seed: int) -> tuple[np.ndarray, int]:
    """Lengths of very different kinds, and a capacity of at least the longest."""
    draw = np.random.default_rng(seed)
    count, longest = int(draw.integers(1, 200)), int(draw.integers(1, 300))
    kinds = [
        draw.integers(1, longest + 1, count),
        np.full(count, longest),
        np.clip(draw.lognormal(3, 1.5, count), 1, longest).astype(int),
        np.where(draw.random(count) < 0.5, 1, longest),
    ]
    return kinds[seed % len(kinds)], longest + int(draw.integers(0, 2) * draw.integers(0, 500))


@pytest.mark.parametrize("seed", range(60))
def test_every_row_once_and_no_micro_batch_too_full(seed):
    """Whatever the lengths; epochs are equally long, and only the last step of one may be short."""
    lengths, capacity = drawn_lengths(seed)
    micro_batches = 1 + seed % 5
    counts = set()
    for epoch in range(3):
        plan = plan_epoch(lengths, capacity, micro_batches, True, seed, epoch)
        bins = [rows for step in plan for rows in step]
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert all(0 < lengths[rows].sum() <= capacity for rows in bins)
        assert all(len(step) == micro_batches for step in plan[:-1]) and 0 < len(plan[-1]) <= micro_batches
        counts.add(len(bins))
    assert len(counts) == 1
    # No two micro-batches would fit into one.
    assert counts.pop() <= max(1, 2 * lengths.sum() / capacity)


def orca_lengths(count: int = 20_000) -> np.ndarray:
    """As skewed as OpenOrca's: a median of 270 tokens, one row in a hundred over 2200."""
    return np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, count), 8, 4096).astype(np.int64)


def listed(plan) -> list[list[int]]:
    """The micro-batches of steps, one after the other."""
    return [rows.tolist() for step in plan for rows in step]


def test_the_plan_is_a_function_of_lengths_seed_and_epoch():
    """No other state of the process changes it; another seed or epoch does, and how steps are cut does not."""
    lengths = orca_lengths(2000)
    plan = plan_epoch(lengths, 4096, 4, True, seed=5, epoch=1)
    random.seed(1)
    np.random.seed(1)
    assert listed(plan_epoch(lengths.copy(), 4096, 4, True, seed=5, epoch=1)) == listed(plan)
    assert listed(plan_epoch(lengths, 4096, 4, True, seed=5, epoch=2)) != listed(plan)
    assert listed(plan_epoch(lengths, 4096, 4, True, seed=6, epoch=1)) != listed(plan)
    assert listed(plan_epoch(lengths, 4096, 7, True, seed=5, epoch=1)) == listed(plan)


def test_packing_fills_micro_batches():
    lengths = orca_lengths()
    plans = [plan_epoch(lengths, 4096, 8, True, seed=0, epoch=epoch) for epoch in range(3)]
    counts = [sum(map(len, plan)) for plan in plans]
    assert len(set(counts)) == 1
    assert lengths.sum() / (counts[0] * 4096) >= 0.98
    together = [{row: tuple(rows) for step in plan for rows in step for row in rows} for plan in plans]
    # Few rows are with the same others in the next epoch.
    assert sum(together[0][row] == together[1][row] for row in range(len(lengths))) < 0.1 * len(lengths)


def test_long_rows_come_at_any_time():
    """Bins are filled from the longest row down; an epoch does not run in that order."""
    lengths = orca_lengths()
    longest = [lengths[rows].max() for step in plan_epoch(lengths, 4096, 8, True, seed=0, epoch=0) for rows in step]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.1


def greedy(lengths: list[int], capacity: int) -> list[tuple[int, ...]]:
    """The rule of packing in its simplest form: the lengths in each bin."""
    left = sorted(lengths)
    bins = []
    while left:
        room = capacity
        taken = []
        while place := bisect.bisect_right(left, room):
            taken.append(left.pop(place - 1))
            room -= taken[-1]
        bins.append(tuple(taken))
    return bins


@pytest.mark.parametrize("lengths", [orca_lengths(200_000), *(drawn_lengths(seed)[0] for seed in range(8))], ids=len)
def test_bins_are_those_of_the_simple_rule(lengths):
    """At any size; every row once."""
    bins = listed(plan_epoch(lengths, 4096, 8, True, seed=1, epoch=0))
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert Counter(tuple(lengths[rows].tolist()) for rows in bins) == Counter(greedy(lengths.tolist(), 4096))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (0.3, 3), (1.7, 0.01), (1e-3, 1)])
def test_sources_come_as_often_as_they_weigh(weights, packing):
    """Epoch e has the places from e*w*n to (e+1)*w*n of an endless repetition of shuffles.

    So every row of a source is drawn k times before any is drawn k + 1 times, over any number of epochs.
    """
    lengths = orca_lengths(370)
    sources = [(0, 250, weights[0]), (250, 370, weights[1])]
    schedule = BatchSchedule(lengths, 4096, 4, packing, seed=3, sources=sources)
    seen = Counter()
    done = 0
    for epoch in range(1, 7):
        steps = [schedule.step(n) for n in range(done + 1, schedule.steps(epoch) + 1)]
        assert all(len(step) == 4 for step in steps[:-1])
        assert all(0 < lengths[rows].sum() <= 4096 for step in steps for rows in step)
        if weights == (1, 1):
            assert sorted(row for rows in listed(steps) for row in rows) == list(range(370))
        seen.update(row for rows in listed(steps) for row in rows)
        done = schedule.steps(epoch)
        for start, end, weight in sources:
            drawn = [seen[row] for row in range(start, end)]
            assert sum(drawn) == round(epoch * weight * (end - start)) and max(drawn) - min(drawn) <= 1
    # A new schedule may start in the middle.
    again = BatchSchedule(lengths, 4096, 4, packing, seed=3, sources=sources)
    assert listed([again.step(done)]) == listed([schedule.step(done)])


def test_epochs_differ_and_sources_mix():
    """A row is with other rows in each epoch, and micro-batches hold rows of several sources."""
    schedule = BatchSchedule(orca_lengths(), 4096, 4, True, seed=0, sources=[(0, 10_000, 1), (10_000, 20_000, 1.0)])
    steps = schedule.steps(1)
    assert schedule.steps(5) == 5 * steps
    first, second = (listed(schedule.step(epoch * steps + n) for n in range(1, steps + 1)) for epoch in (0, 1))
    # Rows of the longest lengths are alone in their micro-batch.
    assert len(set(map(frozenset, first)) & set(map(frozenset, second))) < 0.2 * len(first)
    assert sum(len({row < 10_000 for row in rows}) == 2 for rows in first) > 0.9 * len(first)


def test_a_source_that_is_all_held_out_and_weights_that_leave_nothing():
    schedule = BatchSchedule(np.full(4, 10), 20, 1, True, seed=0, sources=[(0, 0, 1), (0, 4, 1)])
    assert schedule.steps(1) == 2
    with pytest.raises(UserError, match="data.train has weights that leave no row in 2 epochs"):
        BatchSchedule(np.full(4, 10), 20, 1, True, seed=0, sources=[(0, 4, 0.01)]).steps(2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_once_on_any_number_of_ranks(ranks):
    """Ranks take a step's micro-batches in turn, from a schedule that each makes for itself."""
    lengths = orca_lengths(500)
    seen = Counter()
    for rank in range(ranks):
        schedule = BatchSchedule(lengths, 4096, 6, True, seed=0)
        seen.update(
            row
            for n in range(1, schedule.steps(1) + 1)
            for rows in schedule.step(n)[rank::ranks]
            for row in rows.tolist()
        )
    assert seen == Counter(range(500))


def test_without_packing_a_micro_batch_is_a_row():
    lengths = orca_lengths(50)
    plan = plan_epoch(lengths, 4096, 8, False, seed=0, epoch=0)
    rows = [rows for step in plan for rows in step]
    assert [len(step) for step in plan] == [8] * 6 + [2] and {len(row) for row in rows} == {1}
    order = [row for (row,) in rows]
    assert sorted(order) == list(range(50)) != order


def random_store(seed: int) -> TokenStore:
    draw = np.random.default_rng(seed)
    offsets = np.cumsum([0, *draw.integers(1, 12, 20)])
    trained = draw.random(offsets[-1]) < (0.5, 0, 1)[seed % 3]
    trained[offsets[:-1]] = False
    return TokenStore(draw.integers(0, 1000, offsets[-1]).astype(np.int32), trained, offsets)


@pytest.mark.parametrize("seed", range(9))
def test_targets_are_the_next_tokens_of_the_same_row(seed):
    """Against a loop over rows and tokens."""
    store = random_store(seed)
    rows = np.array([7, 0, 19, 3])
    batch = make_batch(store, rows)
    tokens = []
    starts = [0]
    pairs = []
    for row in rows:
        ids, trained = store.row(row)
        for place in range(1, len(ids)):
            if trained[place]:
                pairs.append((len(tokens) + place - 1, ids[place]))
        tokens += ids.tolist()
        starts.append(len(tokens))
    assert batch.tokens.tolist() == tokens and batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == starts
    assert list(zip(batch.target_rows.tolist(), batch.targets.tolist())) == pairs
    assert NextToken().normalizer(store, rows) == len(pairs)
    # A row's last token predicts nothing.
    assert not {start - 1 for start in starts} & set(batch.target_rows.tolist())
    nothing: Batch = batch.without_targets()
    assert nothing.tokens is batch.tokens and len(nothing.target_rows) == len(nothing.targets) == 0
