"""The loss of held-out rows, together and by evaluation set."""

import math
import re
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minorca.config import Config
from minorca.data.packing import plan_epoch
from minorca.data.store import TokenStore
from minorca.train.build import Learner
from minorca.train.ranks import World
from minorca.train.step import batch_outcome, local_batch

_SUFFIX = re.compile(r"(\.(jsonl?|parquet|csv|tsv|txt|arrow))?(\.(gz|zst))?$")


@torch.no_grad()
def evaluate(
    learner: Learner, store: TokenStore, config: Config, world: World, noted: Sequence[int] = ()
) -> dict[str, float] | None:
    """The loss of held-out rows, by the objective's normalizer, and its metrics, as `eval_NAME`; of several evaluation
    sets also the loss of each, as `eval_loss/NAME`. Every rank calls it.

    noted: signals of this rank; once any rank has one, the evaluation ends and gives None.
    """
    model, objective = learner.model, learner.objective
    model.eval()
    sets = evaluation_sets(config, store)
    plan = [(name, step) for name, rows in sets.items() for step in _plan(store, rows, config, world)]
    losses: dict[str, list[Tensor]] = {name: [] for name in sets}
    outcomes = []
    for name, micro_batches in plan:
        batch = local_batch(store, micro_batches, world.rank, world.device)
        outcomes.append(batch_outcome(model, objective, batch, normalizer=1))
        losses[name].append(outcomes[-1].loss)
        if world.sum([len(noted)])[0]:
            break
    model.train()
    shares = [torch.stack(losses[name]).sum().item() if losses[name] else 0.0 for name in sets]
    names = list(outcomes[0].sums)
    extra = [torch.stack([outcome.sums[name] for outcome in outcomes]).sum().item() for name in names]
    finished, *totals = world.sum([len(outcomes) == len(plan), *shares, *extra])
    if finished < world.size:
        return None
    normalizer = objective.normalizer(store, np.arange(len(store)))
    metrics = objective.metrics(dict(zip(names, totals[len(sets) :])), normalizer)
    values = {"eval_loss": sum(totals[: len(sets)]) / normalizer}
    if len(sets) > 1:
        for (name, rows), total in zip(sets.items(), totals):
            # truncated rows may train nothing
            values[f"eval_loss/{name}"] = total / (objective.normalizer(store, rows) or math.nan)
    return values | {f"eval_{name}": value for name, value in metrics.items()}


def _plan(store: TokenStore, rows: np.ndarray, config: Config, world: World) -> list[list[np.ndarray]]:
    """The micro-batches of a set, one for each rank at a time; every row comes once."""
    capacity = config.train.micro_batch_tokens
    steps = plan_epoch(store.lengths[rows], capacity, world.size, config.data.packing, seed=0, epoch=0)
    return [[rows[indices] for indices in step] for step in steps]


def evaluation_sets(config: Config, held_out: TokenStore) -> dict[str, np.ndarray]:
    """Name -> rows of each evaluation set: a source of data.eval, or of data.train where a fraction of it is held
    out.
    """
    setting = config.data.train if isinstance(config.data.eval, float) else config.data.eval
    names = set_names([source.path for source in config.data.sources(setting)])
    ranges = zip(names, held_out.source_ranges)
    return {name: np.arange(start, end) for name, (start, end) in ranges if start < end}


def set_names(paths: list[str]) -> list[str]:
    """A name for each source: its file without suffixes, or the last part of a hub id. Those that are alike get their
    directory's name before, or else a number.
    """
    places = [_place(path) for path in paths]
    plain = [name for _, name in places]
    chosen: list[str] = []
    for directory, name in places:
        candidates = chain(
            [name] if plain.count(name) == 1 else [],
            [f"{directory}-{name}"] if directory else [],
            (f"{name}-{n}" for n in count(1)),
        )
        chosen.append(next(candidate for candidate in candidates if candidate not in chosen))
    return chosen


def _place(path: str) -> tuple[str, str]:
    """The last directory of a source's path, and the name in it; of a pattern such as dir/*.jsonl, what is no
    wildcard.
    """
    place = Path(path.rpartition(":")[2])
    stripped = (re.sub(r"[^\w.-]", "", _SUFFIX.sub("", part)) for part in place.parts)
    parts = [part for part in stripped if part]
    return "".join(parts[-2:-1]), "".join(parts[-1:]) or "rows"
