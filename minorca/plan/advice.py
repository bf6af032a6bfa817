"""Which settings make a run fit, or faster: found by estimates, in the order of speed."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from minorca.config import Config, choices
from minorca.config_rules import problems
from minorca.files.weights import not_quantizable
from minorca.plan.estimate import Estimator
from minorca.progress import progress

Settings = Mapping[str, object]
CHECKPOINTING = "parallel.activation_checkpointing"
# no model is worth training on shorter rows
SHORTEST = 128


@dataclass(frozen=True)
class Advice:
    """Settings beside a configuration's own, and what they give.

    Attributes:
        memory: bytes of a rank at the peak.
        tokens_per_second: None where the device's rates are not known.
    """

    settings: Settings
    memory: int
    tokens_per_second: float | None

    @property
    def options(self) -> str:
        return " ".join(f"--{key} {str(value).lower()}" for key, value in self.settings.items())

    def as_json(self) -> dict:
        return {
            "options": self.options,
            "settings": dict(self.settings),
            "memory_bytes": self.memory,
            "tokens_per_second": self.tokens_per_second,
        }


def changed(config: Config, settings: Settings) -> Config:
    """A configuration with other values of some settings."""
    for key, value in settings.items():
        section, name = key.split(".")
        values = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: values})
    return config


def largest_micro_batch(estimator: Estimator, config: Config) -> int | None:
    """The largest train.micro_batch_tokens that fits, of those that divide train.batch_tokens; None: not the smallest.

    Memory grows linearly with it, but for a few buffers: two estimates give the place, and two more check it.
    """
    sizes = _micro_batches(config)

    def total(size: int) -> int:
        return estimator(changed(config, {"train.micro_batch_tokens": size})).memory["total"]

    usable = estimator.device.usable
    first, last = sizes[0], sizes[-1]
    if total(first) > usable:
        return None
    if total(last) <= usable:
        return last
    slope = (total(last) - total(first)) / (last - first)
    place = max(i for i, size in enumerate(sizes) if size <= first + (usable - total(first)) / slope)
    while place and total(sizes[place]) > usable:
        place -= 1
    while total(sizes[place + 1]) <= usable:
        place += 1
    return sizes[place]


def _micro_batches(config: Config) -> list[int]:
    train, data = config.train, config.data
    if not data.packing:
        return [train.micro_batch_tokens]
    return [n for n in range(data.seq_len, train.batch_tokens + 1) if train.batch_tokens % n == 0]


def advise(estimator: Estimator, config: Config) -> list[Advice]:
    """Of a configuration that fits, settings with which it is faster; of another, those that make it fit; the fastest
    first. Shards on the host and shorter rows come last: only where nothing else fits.
    """
    if estimator.fits(config):
        found = _faster(estimator, config)
    else:
        ways = progress(list(_ways(estimator, config)), "looking for settings that fit", unit="settings")
        found = [advice for way in ways if (advice := _fitting(estimator, config, way))]
        last = (_fitting(estimator, config, way) for way in _last_ways(estimator, config))
        found = found or [advice for advice in [next(filter(None, last), None)] if advice]
    return sorted(found, key=lambda advice: -(advice.tokens_per_second or 0))


def _faster(estimator: Estimator, config: Config) -> list[Advice]:
    """Less that is computed again, and larger micro-batches, where they bring more than 1%."""
    speed = estimator.tokens_per_second(config)
    if speed is None:
        return []
    kinds = choices(CHECKPOINTING)
    less: list[Settings] = [{CHECKPOINTING: kind} for kind in kinds[: kinds.index(_value(config, CHECKPOINTING))]]
    if (size := largest_micro_batch(estimator, config)) and size > config.train.micro_batch_tokens:
        less.append({"train.micro_batch_tokens": size})
    found = [advice for way in less if (advice := _fitting(estimator, config, way))]
    return [advice for advice in found if (advice.tokens_per_second or 0) > 1.01 * speed]


def _ways(estimator: Estimator, config: Config) -> Iterator[Settings]:
    """What needs less memory or more, the most thrifty first; the rows stay as they are."""
    shards = [config.parallel.shard]
    if estimator.ranks > 1 and not estimator(config).sharded:
        shards.append("fsdp")
    kinds = reversed(choices(CHECKPOINTING))
    for kind, quantize, shard in itertools.product(kinds, _storages(estimator, config), shards):
        yield _different(config, {"model.quantize": quantize, CHECKPOINTING: kind, "parallel.shard": shard})


def _storages(estimator: Estimator, config: Config) -> tuple[str, ...]:
    """How the weights may be stored, from the plainest."""
    if config.train.full or not_quantizable(estimator.arch):
        return ("none",)
    kinds = choices("model.quantize")
    return kinds[kinds.index(config.model.quantize) :]


def _last_ways(estimator: Estimator, config: Config) -> Iterator[Settings]:
    """Shards on the host, then shorter rows, and both."""
    thrifty = {"model.quantize": _storages(estimator, config)[-1], CHECKPOINTING: choices(CHECKPOINTING)[-1]}
    offload = {"parallel.shard": "fsdp", "parallel.cpu_offload": True}
    yield _different(config, thrifty | offload)
    length = config.data.seq_len // 2
    while length >= SHORTEST:
        if config.train.batch_tokens % length == 0:
            shorter: dict[str, object] = {"data.seq_len": length}
            if config.data.packing:
                shorter["train.micro_batch_tokens"] = length
            yield _different(config, thrifty | shorter)
            yield _different(config, thrifty | shorter | offload)
        length //= 2


def _value(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _different(config: Config, settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if _value(config, key) != value}


def _fitting(estimator: Estimator, config: Config, settings: Settings) -> Advice | None:
    """These settings, with a smaller micro-batch where one must be; None: none fits, or the settings contradict
    others.
    """
    candidate = changed(config, settings)
    if any(problems(candidate)):
        return None
    if not estimator.fits(candidate):
        size = largest_micro_batch(estimator, candidate)
        if size is None or not config.data.packing:
            return None
        settings = dict(settings) | {"train.micro_batch_tokens": size}
        candidate = changed(config, settings)
    return Advice(settings, estimator(candidate).memory["total"], estimator.tokens_per_second(candidate))
