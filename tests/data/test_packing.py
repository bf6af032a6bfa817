"""Schedules and batches: every row as often as promised, no micro-batch too full, nothing trained across documents."""

import bisect
import random
from collections import Counter
from dataclasses import replace

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
    assert NextToken().counts(store, rows) == {"tokens": len(pairs)}
    # A row's last token predicts nothing.
    assert not {start - 1 for start in starts} & set(batch.target_rows.tolist())
    nothing: Batch = batch.without_targets()
    assert nothing.tokens is batch.tokens and len(nothing.target_rows) == len(nothing.targets) == 0


def random_trees(seed: int) -> TokenStore:
    """Rows with one to four branches, of which each has a trained token at its end."""
    draw = np.random.default_rng(seed)
    tokens, trained, offsets, starts, scores, counts = [], [], [0], [], [], []
    for _ in range(20):
        lengths = draw.integers(1, 8, draw.integers(1, 5))
        starts += (draw.integers(1, 12) + np.cumsum([0, *lengths[:-1]])).tolist()
        mask = np.zeros(starts[-len(lengths)], bool)
        for length in lengths:
            mask = np.append(mask, [*(draw.random(length - 1) < 0.5), True])
        tokens.append(draw.integers(0, 1000, len(mask)))
        trained.append(mask)
        offsets.append(offsets[-1] + len(mask))
        scores += draw.integers(0, 3, len(lengths)).tolist()
        counts.append(len(lengths))
    return TokenStore(
        tokens=np.concatenate(tokens).astype(np.uint16),
        trained=np.concatenate(trained),
        offsets=np.array(offsets),
        branch_offsets=np.cumsum([0, *counts]),
        branch_starts=np.array(starts, np.int32),
        branch_scores=np.array(scores, np.float32),
    )


@pytest.mark.parametrize("seed", range(6))
def test_answers_of_a_batch(seed):
    """Against a loop over rows, branches and tokens: each branch is a document that starts with the prompt."""
    store = random_trees(seed)
    part = store.select([19, 4, 11, 7, 0])
    rows = np.array([2, 0, 4, 1])
    batch = make_batch(part, rows)
    answers = batch.answers
    assert answers is not None and answers.reference is None
    target_rows, targets, lengths, scores, pairs = [], [], [], [], []
    document = 0
    for row, branches in zip(rows, batch.branches, strict=True):
        ids, trained = part.row(row)
        starts, worth = part.branches(row)
        assert branches == starts.tolist() and not trained[: starts[0]].any()
        first = len(lengths)
        for start, end in zip(branches, [*branches[1:], len(ids)]):
            places = [*range(branches[0]), *range(start, end)]
            found = [(places[n - 1], place) for n, place in enumerate(places) if n and trained[place]]
            target_rows += [document + before for before, _ in found]
            targets += [ids[place] for _, place in found]
            lengths.append(len(found))
        scores += worth.tolist()
        ranked = range(len(worth))
        better = [[first + i, first + j] for i in ranked for j in ranked if worth[i] > worth[j]]
        assert part.pair_counts[row] == len(better) and part.branch_counts[row] == len(worth)
        pairs += better
        document += len(ids)
    assert batch.target_rows.tolist() == target_rows and batch.targets.tolist() == targets
    assert answers.lengths.tolist() == lengths and answers.scores.tolist() == scores and answers.pairs.tolist() == pairs
    assert answers.pairs.shape[1] == 2 and answers.scores.dtype == torch.float32 and answers.pairs.dtype == torch.int64
    assert np.array_equal(part.pair_counts, store.pair_counts[[19, 4, 11, 7, 0]])


def test_a_batch_of_trees_moved_and_without_targets():
    batch = make_batch(random_trees(1), np.array([3, 5]))
    assert batch.answers is not None
    batch.answers.reference = torch.rand(len(batch.targets))
    moved = batch.to(torch.device("meta"))
    assert moved.answers is not None and {t.device.type for t in vars(moved.answers).values()} == {"meta"}
    assert moved.branches == batch.branches and moved.cu_seqlens.device.type == "cpu"
    empty = batch.without_targets()
    assert empty.answers is not None and [tuple(t.shape) for t in vars(empty.answers).values()] == [
        (0,),
        (0,),
        (0, 2),
        (0,),
    ]
    assert empty.branches == batch.branches and torch.equal(empty.tokens, batch.tokens) and len(empty.targets) == 0
    assert make_batch(random_store(0), np.array([1])).without_targets().answers is None


def test_a_checksum_covers_what_branches_are_worth():
    store = random_trees(0)
    changed = [
        replace(store, branch_scores=store.branch_scores + 1),
        replace(store, branch_starts=np.maximum(store.branch_starts - 1, 1)),
        replace(store, branch_offsets=store.branch_offsets[::-1].copy()),
    ]
    assert len({copy.sha256() for copy in (store, *changed)}) == 4
