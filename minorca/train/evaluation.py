"""The loss of held-out rows, together and by evaluation set."""

import re
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch

from minorca.config import Config
from minorca.data.packing import plan_epoch
from minorca.data.store import TokenStore
from minorca.progress import progress
from minorca.train.build import Learner
from minorca.train.objectives import Sums
from minorca.train.ranks import World
from minorca.train.step import batch_sums, local_batch

_SUFFIX = re.compile(r"(\.(jsonl?|parquet|csv|tsv|txt|arrow))?(\.(gz|zst))?$")


@torch.no_grad()
def evaluate(
    learner: Learner, store: TokenStore, config: Config, world: World, noted: Sequence[int] = ()
) -> dict[str, float] | None:
    """The loss of held-out rows, and the objective's metrics, as `eval_NAME`; of several evaluation sets also the loss
    of each, as `eval_loss/NAME`, and what the objective makes of it. Every rank calls it.

    noted: signals of this rank; once any rank has one, the evaluation ends and gives None.
    """
    model, objective = learner.model, learner.objective
    model.eval()
    objective.prepare(store, np.arange(len(store)), world)
    sets = evaluation_sets(config, store)
    plan = [(name, step) for name, rows in sets.items() for step in _plan(store, rows, config, world)]
    done: list[Sums] = []
    for _, micro_batches in progress(plan, "held-out loss", unit="micro-batches"):
        batch = local_batch(store, micro_batches, world.rank, world.device)
        done.append(batch_sums(model, objective, batch))
        if world.sum([len(noted)])[0]:
            break
    model.train()
    names, places = list(done[0]), dict(zip(sets, range(len(sets))))
    shares = torch.stack([torch.stack(list(sums.values())) for sums in done]).cpu().double()
    set_of_batch = torch.tensor([places[name] for name, _ in plan[: len(done)]])
    by_set = torch.zeros(len(sets), len(names), dtype=torch.float64).index_add_(0, set_of_batch, shares)
    finished, *flat = world.sum([len(done) == len(plan), *by_set.flatten().tolist()])
    if finished < world.size:
        return None
    totals = np.reshape(flat, (len(sets), len(names)))

    def loss_and_metrics(rows: np.ndarray, totals: np.ndarray) -> tuple[float, dict[str, float]]:
        sums, counts = dict(zip(names, totals.tolist())), objective.counts(store, rows)
        return objective.loss(sums, counts), objective.metrics(sums, counts)

    loss, metrics = loss_and_metrics(np.arange(len(store)), totals.sum(0))
    losses = {"": loss}
    if len(sets) > 1:
        losses |= {f"/{name}": loss_and_metrics(rows, of_set)[0] for (name, rows), of_set in zip(sets.items(), totals)}
    values = {f"eval_loss{name}": loss for name, loss in losses.items()}
    for name, loss in losses.items():
        values |= {f"eval_{metric}{name}": value for metric, value in objective.of_held_out(loss).items()}
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
