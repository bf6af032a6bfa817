"""What the directory of a run says of how its adapter, or its model, was trained, without paths of this machine."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minorca.config import Config, Source
from minorca.config_file import read_config
from minorca.errors import UserError
from minorca.files.hub import HubId
from minorca.files.safe_io import parse_json
from minorca.train.output import read_run, written_settings

# an id that a run has pinned
_PINNED = re.compile(r"([^/@:\s]+/[^/@:\s]+)@([0-9a-f]{40})(?::.*)?", re.S)


@dataclass(frozen=True)
class RunRecord:
    """A run, as its files say.

    Attributes:
        settings: with the last parts of paths alone.
        base: the model that it trained, if that is one of the hub.
        datasets: those of the hub that it trained on.
        rows: of each source its last part, and outcome -> number of rows. Several may have one name.
        steps, tokens, trained_tokens: of all steps.
        losses: (step, held-out loss), in order.
        curves: the picture of them, if there is one.
    """

    settings: Config
    base: HubId | None
    datasets: list[str]
    rows: list[tuple[str, dict[str, int]]]
    steps: int
    tokens: int
    trained_tokens: int
    losses: list[tuple[int, float]]
    curves: Path | None


def read_run_record(trained: Path) -> RunRecord | None:
    """The record of the run whose result `trained` is; None where it is no run's, or one that the run has set aside.

    Raises:
        UserError: a file of the run that cannot be read.
    """
    trained = trained.resolve()
    output = trained.parent
    settings = written_settings(output)
    run = read_run(output)
    if run is None or not settings.is_file():
        return None
    config = read_config(settings, {})
    if trained.name != config.outcome.name:
        return None
    found = pinned_id(config.model.path)
    sources = [source.path for source in config.data.sources(config.data.train)]
    datasets = [dataset.repository for dataset in map(pinned_id, sources) if dataset]
    lines = _metrics(output / "metrics.jsonl")
    steps = [line for line in lines if "trained_tokens" in line]
    return RunRecord(
        settings=without_paths(config),
        base=found,
        datasets=list(dict.fromkeys(datasets)),
        rows=[(last_part(path), counts) for path, counts in run.rows.items()],
        steps=max((line["step"] for line in steps), default=0),
        tokens=sum(line["tokens"] for line in steps),
        trained_tokens=sum(line["trained_tokens"] for line in steps),
        losses=[(line["step"], line["eval_loss"]) for line in lines if isinstance(line.get("eval_loss"), float)],
        curves=output / "curves.png" if (output / "curves.png").is_file() else None,
    )


def _metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole; none where there is no such file."""
    try:
        lines = [parse_json(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        keys = ("step", "tokens", "trained_tokens")
        return [line for line in lines if type(line["step"]) is int and all(type(line.get(k, 0)) is int for k in keys)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", path=path) from None


def pinned_id(path: str) -> HubId | None:
    """The id and the commit of what a run took from the hub; None for a path, which may look like an id."""
    match = _PINNED.fullmatch(path)
    return HubId(match[1], match[2]) if match else None


def last_part(path: str) -> str:
    """What may be published of a path: a pinned id as it is, of another its last part."""
    return path if pinned_id(path) else PurePosixPath(path.replace("\\", "/")).name


def without_paths(config: Config) -> Config:
    """The settings, with the last parts of paths alone."""

    def shown(path: str | None) -> str | None:
        return path and last_part(path)

    def of_sources(what):
        if isinstance(what, list):
            return [of_sources(source) for source in what]
        if isinstance(what, Source):
            return dataclasses.replace(what, path=shown(what.path))
        return shown(what) if isinstance(what, str) else what

    replace = dataclasses.replace
    return replace(
        config,
        model=replace(config.model, path=shown(config.model.path)),
        lora=replace(config.lora, init=shown(config.lora.init)),
        data=replace(
            config.data,
            train=of_sources(config.data.train),
            eval=of_sources(config.data.eval),
            store=shown(config.data.store),
        ),
        train=replace(config.train, output=shown(config.train.output), resume=shown(config.train.resume), wandb=None),
        eval=replace(config.eval, include_path=shown(config.eval.include_path)),
        dpo=replace(config.dpo, reference=shown(config.dpo.reference)),
    )
