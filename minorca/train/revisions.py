"""Which commits of the hub a run uses: the same after every resume, also when a branch has moved meanwhile."""

import dataclasses
from collections.abc import Callable

from minorca.config import Config, Source
from minorca.data.sources import at_commit
from minorca.files.hub import pinned
from minorca.train import checkpoint
from minorca.train.output import read_run

Sources = str | float | list[str | Source] | None


def pin(config: Config) -> tuple[Config, dict[str, str]]:
    """The settings with every hub id at a commit: that which the run began with, where it goes on.

    Returns:
        The settings, and each id as they gave it, of a data set after datasets/ -> the id at its commit.

    Raises:
        UserError: the id of a model or an adapter that cannot be resolved.
    """
    goes_on = bool(checkpoint.published(config.output / "checkpoints"))
    run = read_run(config.output) if goes_on else None
    recorded = run.revisions if run else {}
    revisions: dict[str, str] = {}

    def resolved(path: str, resolve: Callable[[str], object], kind: str = "") -> str:
        # a model and a data set may have one id; an earlier version recorded both without what they are
        key = kind + path
        found = recorded.get(key) or recorded.get(path) or resolve(path)
        if found and str(found) != path:
            revisions[key] = str(found)
        return revisions.get(key, path)

    def of_sources(what: Sources) -> Sources:
        if isinstance(what, list):
            return [
                dataclasses.replace(source, path=resolved(source.path, at_commit, "datasets/"))
                if isinstance(source, Source)
                else resolved(source, at_commit, "datasets/")
                for source in what
            ]
        return resolved(what, at_commit, "datasets/") if isinstance(what, str) else what

    model = dataclasses.replace(config.model, path=resolved(config.model.path, pinned))
    adapters = {key: resolved(path, pinned) for key, path in config.adapters.items()}
    lora = dataclasses.replace(config.lora, init=adapters.get("lora.init", config.lora.init))
    dpo = dataclasses.replace(config.dpo, reference=adapters.get("dpo.reference", config.dpo.reference))
    data = dataclasses.replace(config.data, train=of_sources(config.data.train), eval=of_sources(config.data.eval))
    return dataclasses.replace(config, model=model, lora=lora, dpo=dpo, data=data), revisions
