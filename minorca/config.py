"""Every setting of a run, as one tree of dataclasses, and the rules that their values keep.

Types are checked where settings are read (config_file.py).
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from minorca.errors import UserError
from minorca.model.layout import TARGETS, Target

# pydantic's: an unknown key is an error, and a boolean is not a number
_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass
class ModelConfig:
    __pydantic_config__ = _STRICT
    path: Annotated[str, "the base model's directory"]
    dtype: Annotated[Literal["bfloat16", "float32"], "of the frozen weights and of computation; adapters are fp32"] = (
        "bfloat16"
    )
    quantize: Annotated[Literal["none"], "how the frozen weights are kept"] = "none"


@dataclass
class LoRAConfig:
    __pydantic_config__ = _STRICT
    rank: Annotated[int, "of every adapter"] = 16
    alpha: Annotated[float, "the update is scaled by alpha / rank"] = 32
    dropout: Annotated[float, "of an adapter's input"] = 0.0
    targets: Annotated[list[Target], "the projections with an adapter"] = field(default_factory=lambda: list(TARGETS))
    rslora: Annotated[bool, "scale by alpha / sqrt(rank) instead"] = False
    init: Annotated[str | None, "a PEFT adapter to start from"] = None


Format = Literal["openorca", "sharegpt", "messages", "alpaca", "prompt_completion", "text"]


@dataclass
class Source:
    """One file of several in data.train or data.eval.

    Attributes:
        format: None: that of data.format.
        weight: how often an epoch has each row; 0.5: half the rows, and the other half in the next epoch.
    """

    __pydantic_config__ = _STRICT
    path: str
    format: Format | None = None
    weight: float = 1.0


@dataclass
class DataConfig:
    __pydantic_config__ = _STRICT
    train: Annotated[
        str | list[Source], "a parquet, JSONL or CSV file, a hub id, hub-id:FILE, or a list of {path, format, weight}"
    ]
    eval: Annotated[str | float | list[Source] | None, "the same, or a fraction of the rows held out by seed"] = None
    limit: Annotated[int | None, "rows to read at most, of each source"] = None
    format: Annotated[Format, "the columns of a row"] = "openorca"
    store: Annotated[
        str | None, "where rendered rows are kept; minorca/rows in the user's cache directory by default"
    ] = None
    template: Annotated[
        Literal["auto", "chatml", "mistral-v1", "mistral-v2", "mistral-v3", "jinja"], "how a row is written"
    ] = "auto"
    seq_len: Annotated[int, "the longest row, in tokens"] = 4096
    packing: Annotated[bool, "fill micro-batches with several rows; false: one row each"] = True
    train_on: Annotated[Literal["response", "all"], "the tokens that count in the loss"] = "response"
    too_long: Annotated[Literal["drop", "truncate", "error"], "what to do with rows over seq_len"] = "drop"
    empty_response: Annotated[Literal["drop", "error"], "what to do with rows without an answer"] = "drop"
    parse_control_tokens: Annotated[
        bool, "of format text: control strings in a row, such as [INST] or </s>, are control tokens; false: plain text"
    ] = True

    def sources(self, what: str | float | list[Source] | None) -> list[Source]:
        """The files that `train` or `eval` names, each with its format; none where it is a fraction or null."""
        named = [Source(what)] if isinstance(what, str) else what if isinstance(what, list) else []
        return [dataclasses.replace(source, format=source.format or self.format) for source in named]


@dataclass
class OptimConfig:
    __pydantic_config__ = _STRICT
    lr: Annotated[float, "the highest learning rate"] = 2e-4
    betas: Annotated[tuple[float, float], "AdamW's"] = (0.9, 0.95)
    eps: Annotated[float, "AdamW's"] = 1e-8
    weight_decay: Annotated[float, "AdamW's"] = 0.0
    warmup_steps: Annotated[int, "steps of linear rise"] = 0
    schedule: Annotated[Literal["cosine", "linear", "constant"], "after the rise; the first two fall to 0"] = "cosine"
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0


@dataclass
class TrainConfig:
    __pydantic_config__ = _STRICT
    objective: Annotated[Literal["sft"], "what is trained"] = "sft"
    steps: Annotated[int | None, "optimizer steps; overrides epochs"] = None
    epochs: Annotated[int, "passes over the rows"] = 1
    batch_tokens: Annotated[int, "tokens a step holds at most, over all ranks"] = 32768
    micro_batch_tokens: Annotated[int, "tokens one forward holds at most"] = 4096
    seed: Annotated[int, "of the order of the data, new adapters and dropout"] = 0
    output: Annotated[str | None, "the run's directory; runs/NAME of the configuration file by default"] = None
    checkpoint_every: Annotated[int, "steps; 0: only at the end"] = 100
    keep: Annotated[int, "checkpoints"] = 2
    eval_every: Annotated[int, "steps; 0: only at the end"] = 0
    log_every: Annotated[int, "steps between lines on the console; metrics.jsonl has every step"] = 1
    resume: Annotated[
        str, "auto (the output's newest checkpoint), last-good (its newest that is undamaged), never, or a path"
    ] = "auto"
    nonfinite: Annotated[
        Literal["stop", "skip"], "what to do with a step whose loss or gradient is NaN or infinite"
    ] = "stop"
    deterministic: Annotated[
        bool, "the same bits in every run on the same CUDA devices, slower; the CPU's always are"
    ] = False
    wandb: Annotated[str | None, "a Weights & Biases project to log to as well; needs pip install wandb"] = None


@dataclass
class ParallelConfig:
    __pydantic_config__ = _STRICT
    shard: Annotated[Literal["auto", "none", "fsdp"], "none: the model whole on each rank"] = "auto"
    replicate: Annotated[int, "copies of the sharded model; divides the ranks"] = 1
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], "what backward computes again"] = "none"
    cpu_offload: Annotated[bool, "keep shards in host memory"] = False
    timeout: Annotated[
        int, "seconds; a rank silent for longer, or a wait among ranks that takes longer, ends the run"
    ] = 300


@dataclass
class Config:
    __pydantic_config__ = _STRICT
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def output(self) -> Path:
        """The run's directory."""
        return Path(self.train.output or "runs/default")

    def nested(self) -> dict[str, dict]:
        """As plain values, in the form that YAML has."""
        values = dataclasses.asdict(self)
        values["optim"]["betas"] = list(values["optim"]["betas"])
        return values


def fields() -> Iterator[tuple[str, dataclasses.Field, object]]:
    """The section, the field and the annotated type of every setting."""
    for section, kind in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(kind, include_extras=True)
        for key in dataclasses.fields(kind):
            yield section, key, hints[key.name]


def default_of(key: dataclasses.Field) -> object:
    """A setting's default; dataclasses.MISSING where it has none."""
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()


def defaults() -> dict[str, object]:
    """section.key -> default, of every setting that has one, in the form that JSON has."""
    found = {}
    for section, key, _ in fields():
        value = default_of(key)
        if value is not dataclasses.MISSING:
            found[f"{section}.{key.name}"] = list(value) if isinstance(value, tuple) else value
    return found


class Problem(NamedTuple):
    """A value out of range, or settings that contradict each other: the settings, the first of which is named."""

    keys: tuple[str, ...]
    error: UserError


_POSITIVE = (
    "lora.rank",
    "lora.alpha",
    "data.limit",
    "data.seq_len",
    "optim.lr",
    "optim.eps",
    "optim.max_grad_norm",
    "train.steps",
    "train.epochs",
    "train.batch_tokens",
    "train.micro_batch_tokens",
    "train.keep",
    "train.log_every",
    "parallel.replicate",
)
_NOT_NEGATIVE = ("optim.weight_decay", "optim.warmup_steps", "train.checkpoint_every", "train.eval_every", "train.seed")


def problems(config: Config) -> Iterator[Problem]:
    """Values out of range, and settings that contradict each other."""

    def value_of(key: str):
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    def problem(message: str, *keys: str) -> Problem:
        return Problem(keys, UserError(message, field=keys[0]))

    for key in _POSITIVE:
        if value_of(key) is not None and value_of(key) <= 0:
            yield problem(f"is {value_of(key)}; expected a positive number", key)
    for key in _NOT_NEGATIVE:
        if value_of(key) < 0:
            yield problem(f"is {value_of(key)}; expected 0 or more", key)
    data, lora, optim, train, parallel = config.data, config.lora, config.optim, config.train, config.parallel
    if not 0 <= lora.dropout < 1:
        yield problem(f"is {lora.dropout}; expected at least 0 and less than 1", "lora.dropout")
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield problem(f"is {list(optim.betas)}; expected two numbers, at least 0 and less than 1", "optim.betas")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield problem(f"is {lora.targets}; expected at least one target, each once", "lora.targets")
    yield from _source_problems(data)
    if train.eval_every and data.eval is None:
        yield problem("is set but data.eval is not; give held-out rows or a fraction", "train.eval_every", "data.eval")
    if train.micro_batch_tokens < data.seq_len:
        yield problem(
            f"is {train.micro_batch_tokens} and data.seq_len {data.seq_len}; a micro-batch must hold the longest row",
            "train.micro_batch_tokens",
            "data.seq_len",
        )
    if train.micro_batch_tokens > 0 and train.batch_tokens % train.micro_batch_tokens:
        yield problem(
            f"is {train.batch_tokens}; expected a multiple of train.micro_batch_tokens, {train.micro_batch_tokens}",
            "train.batch_tokens",
            "train.micro_batch_tokens",
        )
    if not 10 <= parallel.timeout <= 10**6:
        yield problem(f"is {parallel.timeout}; expected 10 to 1000000 seconds", "parallel.timeout")
    if not (train.output or "").strip():
        yield problem("is empty; expected a directory's name", "train.output")
    if parallel.shard == "none" and parallel.replicate > 1:
        yield problem("is over 1, which needs parallel.shard fsdp, not none", "parallel.replicate", "parallel.shard")
    if parallel.shard == "none" and parallel.cpu_offload:
        yield problem("needs parallel.shard fsdp, not none", "parallel.cpu_offload", "parallel.shard")


def _source_problems(data: DataConfig) -> Iterator[Problem]:
    if isinstance(data.eval, float) and not 0 < data.eval < 1:
        error = UserError(f"is {data.eval}; expected a path, or a fraction between 0 and 1", field="data.eval")
        yield Problem(("data.eval",), error)
    for name in ("train", "eval"):
        key = f"data.{name}"
        sources = data.sources(getattr(data, name))
        if isinstance(getattr(data, name), list) and not sources:
            yield Problem((key,), UserError("is an empty list; expected at least one file", field=key))
        for source in sources:
            has_weight = f"gives {source.path} the weight {source.weight}"
            if not 0 < source.weight <= 1000:
                message = f"{has_weight}; expected a number over 0 and at most 1000"
                yield Problem((key,), UserError(message, field=key))
            elif name == "eval" and source.weight != 1:
                message = f"{has_weight}; held-out rows are all evaluated once, so leave it out"
                yield Problem((key,), UserError(message, field=key))
            if source.format == "text" and data.train_on == "response":
                message = f"reads {source.path} as plain text, which has no responses; set data.train_on to all"
                yield Problem((key, "data.train_on", "data.format"), UserError(message, field=key))
