"""Memory and speed of a run's step, from steps of few layers on fake tensors."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minorca.config import Config
from minorca.data.store import TokenStore
from minorca.files.bitsandbytes import stored_quantization
from minorca.files.weights import check_quantizable
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.plan.communication import Collective, communication_seconds
from minorca.plan.devices import Machine
from minorca.plan.fake_step import PREPARATION, Recording, fake_rows, fake_step, of_layers, shortest
from minorca.plan.rates import PCIE, Prediction, Rates
from minorca.plan.recorder import Launch
from minorca.train.inputs import check_unquantized
from minorca.train.metrics import hidden_pairs, visible_pairs

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "other")


@dataclass(frozen=True)
class Estimate:
    """One step of a run.

    Attributes:
        memory: bytes of a rank by kind, when most are in use, and their "total".
        tokens: of a micro-batch.
        micro_batches: of the step.
        micro_seconds: of a micro-batch on one device; None where the device's rates are not known.
        update_seconds: of the optimizer.
        collectives: of one micro-batch, the step's last one, and of the optimizer.
        sharded: whether they gather and scatter.
        reduce_each: whether gradients are reduced after every micro-batch, not once a step.
    """

    memory: dict[str, int]
    tokens: int
    micro_batches: int
    micro_seconds: float | None
    update_seconds: float
    collectives: list[Collective]
    reduce_each: bool = False

    @property
    def sharded(self) -> bool:
        return any(collective.kind == "all-gather" for collective in self.collectives)

    def step_seconds(self, device: Machine, ranks: int, replicate: int, micro_batches: int) -> float | None:
        """Of a step of so many micro-batches on so many ranks. Collectives of a micro-batch overlap with it; the
        optimizer waits for its own.
        """
        if self.micro_seconds is None:
            return None
        turns = math.ceil(micro_batches / ranks)
        within = [each for each in self.collectives if each.phase != "optimizer"]
        after = [each for each in self.collectives if each.phase == "optimizer"]
        # over all ranks, gradients are reduced in the last micro-batch alone
        kinds = ("all-gather", "reduce-scatter") if self.reduce_each else ("all-gather",)
        earlier = [each for each in within if each.kind in kinds]
        every = max(self.micro_seconds, communication_seconds(earlier, device, ranks, replicate))
        last = max(self.micro_seconds, communication_seconds(within, device, ranks, replicate))
        update = self.update_seconds + communication_seconds(after, device, ranks, replicate)
        return (turns - 1) * every + last + update


class Estimator:
    """Estimates for one architecture, device and number of ranks; each is computed once."""

    def __init__(self, arch: Architecture, device: Machine, ranks: int):
        self.arch = arch
        self.device = device
        self.ranks = ranks
        self._known: dict[str, Estimate] = {}

    def __call__(self, config: Config) -> Estimate:
        key = json.dumps(config.nested())
        if key not in self._known:
            found = self._estimate(config)
            if self._is_sharded_as_a_whole(config, found):
                sharded = dataclasses.replace(config.parallel, shard="fsdp")
                found = self._estimate(dataclasses.replace(config, parallel=sharded))
            self._known[key] = found
        return self._known[key]

    def _is_sharded_as_a_whole(self, config: Config, found: Estimate) -> bool:
        """Whether `parallel.shard: auto` shards the model of all layers, where it kept the few that were estimated."""
        if config.parallel.shard != "auto" or config.train.full or self.ranks == 1 or found.sharded:
            return False
        return 2 * (found.memory["weights"] + found.memory["adapters"]) >= self.device.memory

    def tokens_per_second(self, config: Config) -> float | None:
        """Of all ranks together."""
        found = self(config)
        seconds = found.step_seconds(self.device, self.ranks, config.parallel.replicate, found.micro_batches)
        return found.micro_batches * found.tokens / seconds if seconds else None

    def fits(self, config: Config) -> bool:
        return self(config).memory["total"] <= self.device.usable

    def _estimate(self, config: Config) -> Estimate:
        lengths = documents(config)
        micro_batches = config.train.batch_tokens // config.train.micro_batch_tokens
        later = micro_batches > self.ranks
        # of what is sharded, two blocks are on their way between ranks while a third computes
        few = 3 if self.ranks > 1 or config.train.full else 2
        more = self.arch.layers - few
        runs = [
            fake_step(config, dataclasses.replace(self.arch, layers=n), self.device, self.ranks, lengths, later=later)
            for n in ((few, few + 1) if more > 1 else (self.arch.layers,))
        ]
        launches = of_layers([run.launches for run in runs], more)
        collectives = of_layers([run.recorder.collectives for run in runs], more)
        sizes = of_layers([run.recorder.collective_bytes for run in runs], more)
        crossed = of_layers([run.recorder.crossed for run in runs], more)
        rates = self.device.rates if config.model.dtype == "bfloat16" else None
        micro = update = None
        if rates:
            passes = {launch: n for launch, n in launches.items() if launch.phase in ("forward", "backward")}
            updates = {launch: n for launch, n in launches.items() if launch.phase == "optimizer"}
            rows = fake_rows(lengths, 1.0, config.train.objective)
            micro = max(self._seconds(passes, rates, rows), (crossed["forward"] + crossed["backward"]) / PCIE)
            update = self._seconds(updates, rates, rows)
        return Estimate(
            _peak(runs, more),
            sum(lengths),
            micro_batches,
            micro,
            update or 0.0,
            [
                Collective(kind, phase, n, sizes[kind, phase])
                for (kind, phase), n in collectives.items()
                if phase not in PREPARATION
            ],
            config.train.full,
        )

    def _seconds(self, launches: Mapping[Launch, int], rates: Rates, rows: TokenStore) -> float:
        window = self.arch.window
        pairs = visible_pairs(rows.lengths.tolist(), window) - hidden_pairs(rows, np.arange(len(rows)), window)
        return Prediction(Counter(launches), rates, 4.0 * self.arch.heads * self.arch.head_dim * pairs).step_seconds


def model_of(config: Config) -> tuple[Config, Architecture]:
    """The configuration with the storage of a model whose files are quantized, and the architecture of its model.

    Raises:
        UserError: what is wrong with which file.
    """
    directory = model_directory(config.model.path)
    arch = read_architecture(directory)
    if stored := stored_quantization(directory):
        check_unquantized(config, stored, directory)
        model = dataclasses.replace(config.model, quantize="nf4", double_quant=stored.double_quant)
        config = dataclasses.replace(config, model=model)
    if config.model.quantize != "none":
        check_quantizable(arch, directory)
    return config, arch


def documents(config: Config) -> list[int]:
    """The lengths of a micro-batch's documents: as long as they may be, as many as it holds."""
    data = config.data
    if not data.packing:
        return [data.seq_len]
    whole, rest = divmod(config.train.micro_batch_tokens, data.seq_len)
    return [data.seq_len] * whole + [rest] * (rest >= shortest(config.train.objective))


def _peak(runs: list[Recording], more: int) -> dict[str, int]:
    """Bytes by kind of so many more layers than the first run has, and their total: the highest of all phases and
    parts.
    """
    parts = set.intersection(*(set(run.peaks) for run in runs))
    peaks = [
        of_layers([run.peaks[place] for run in runs], more)
        for place in parts
        if place[0] not in PREPARATION or place[0] == "build"
    ]
    highest = max(peaks, key=lambda used: used.total())
    found = {kind: highest[kind] for kind in KINDS}
    found["other"] = highest.total() - sum(found.values())
    return found | {"total": highest.total()}
