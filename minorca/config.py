"""Every setting of a run, as one tree of dataclasses, and the rules that their values keep.

Types are checked where settings are read (config_file.py).
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

from minorca.data.formats import FORMATS
from minorca.data.messages import OUR_ROLES
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
    """One source of several in data.train or data.eval.

    Attributes:
        path: a file, a directory, a glob, a hub id or hub-id:FILE.
        format: None: that of data.format.
        weight: how often an epoch has each row; 0.5: half the rows, and the other half in the next epoch.
        name: the configuration of a hub data set.
        split: of a hub data set (None: train) or a directory.
        columns, roles: None: those of data.columns and data.roles.
    """

    __pydantic_config__ = _STRICT
    path: str
    format: Format | None = None
    weight: float = 1.0
    name: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    roles: dict[str, str] | None = None


@dataclass
class DataConfig:
    __pydantic_config__ = _STRICT
    train: Annotated[
        str | list[str | Source],
        "a file, a directory, a glob, a hub id, hub-id:FILE, or a list of these or of {path, format, weight, name, "
        "split, columns, roles}",
    ]
    eval: Annotated[str | float | list[str | Source] | None, "the same, or a fraction of the rows held out by seed"] = (
        None
    )
    limit: Annotated[int | None, "rows to read at most, of each source"] = None
    format: Annotated[Format, "the columns of a row"] = "openorca"
    store: Annotated[
        str | None, "where rendered rows are kept; minorca/rows in the user's cache directory by default"
    ] = None
    template: Annotated[
        Literal["auto", "chatml", "mistral-v1", "mistral-v2", "mistral-v3", "jinja", "none"], "how a row is written"
    ] = "auto"
    seq_len: Annotated[int, "the longest row, in tokens"] = 4096
    packing: Annotated[bool, "fill micro-batches with several rows; false: one row each"] = True
    train_on: Annotated[
        Literal["response", "last", "all"],
        "what is trained: all answers, the last one, or all tokens",
    ] = "response"
    too_long: Annotated[
        Literal["drop", "truncate", "split", "error"],
        "what to do with rows over seq_len; split: text becomes several rows",
    ] = "drop"
    empty_response: Annotated[
        Literal["drop", "error"],
        "what to do with empty answers; drop: leave out their turn, or the row if none is left",
    ] = "drop"
    bad_rows: Annotated[Literal["error", "drop"], "what to do with invalid rows; both list them by reason"] = "error"
    columns: Annotated[dict[str, str], "the names of a format's columns in the data, as {instruction: question}"] = (
        field(default_factory=dict)
    )
    roles: Annotated[dict[str, str], "further names of roles in the data, as {narrator: system}"] = field(
        default_factory=dict
    )
    parse_control_tokens: Annotated[
        bool,
        "of format text and template none: control strings in a row, such as [INST] or </s>, are control tokens; "
        "false: plain text",
    ] = True

    def sources(self, what: str | float | list[str | Source] | None) -> list[Source]:
        """What `train` or `eval` names, each with its format and names; none where it is a fraction or null."""
        named = [what] if isinstance(what, str) else what if isinstance(what, list) else []
        sources = [Source(source) if isinstance(source, str) else source for source in named]
        return [
            dataclasses.replace(
                source,
                format=source.format or self.format,
                columns=self.columns if source.columns is None else source.columns,
                roles=self.roles if source.roles is None else source.roles,
            )
            for source in sources
        ]


@dataclass
class OptimConfig:
    __pydantic_config__ = _STRICT
    lr: Annotated[float, "the highest learning rate"] = 2e-4
    betas: Annotated[tuple[float, float], "AdamW's"] = (0.9, 0.95)
    eps: Annotated[float, "AdamW's"] = 1e-8
    weight_decay: Annotated[float, "AdamW's"] = 0.0
    warmup_steps: Annotated[int, "steps of linear rise"] = 0
    warmup_ratio: Annotated[float | None, "the same as a share of the run's steps, rounded up"] = None
    schedule: Annotated[Literal["cosine", "linear", "constant"], "after the rise; the first two fall to min_lr"] = (
        "cosine"
    )
    min_lr: Annotated[float, "the learning rate to which cosine and linear fall"] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0


_EVERY = 'steps, or "0.5 epochs"'
EXPECTED_EVERY = 'expected a number of steps, at least 0, or of epochs, at least 0.001, as in "0.5 epochs"'


def epochs_in(every: int | str) -> float | None:
    """The number in "0.5 epochs"; None where `every` is a number of steps.

    Raises:
        ValueError: another text, or less than a thousandth of an epoch.
    """
    if not isinstance(every, str):
        return None
    match = re.fullmatch(r"(\d+|\d*\.\d+) epochs?", every)
    if not match or float(match[1]) < 0.001:
        raise ValueError(every)
    return float(match[1])


@dataclass
class TrainConfig:
    __pydantic_config__ = _STRICT
    objective: Annotated[Literal["sft"], "what is trained"] = "sft"
    steps: Annotated[int | None, "optimizer steps; overrides epochs"] = None
    epochs: Annotated[float, "passes over the rows; 2.5: two, and half of the third's steps"] = 1
    batch_tokens: Annotated[int, "tokens a step holds at most, over all ranks"] = 32768
    micro_batch_tokens: Annotated[int, "tokens one forward holds at most"] = 4096
    seed: Annotated[int, "of the order of the data, new adapters and dropout"] = 0
    output: Annotated[str | None, "the run's directory; runs/NAME of the configuration file by default"] = None
    checkpoint_every: Annotated[int | str, f"{_EVERY}; 0: only at the end"] = 100
    keep: Annotated[int, "checkpoints"] = 2
    keep_best: Annotated[bool, "write the adapter of the lowest held-out loss instead of the last one"] = False
    eval_every: Annotated[int | str, f"{_EVERY}; 0: only before the first and after the last step"] = 0
    early_stopping: Annotated[
        int | None, "end the run after so many evaluations in a row without a lower held-out loss"
    ] = None
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
    "train.early_stopping",
    "parallel.replicate",
)
_NOT_NEGATIVE = ("optim.weight_decay", "optim.warmup_steps", "optim.min_lr", "train.seed")


def problem(message: str, *keys: str) -> Problem:
    """A problem of the first of these settings."""
    return Problem(keys, UserError(message, field=keys[0]))


def problems(config: Config) -> Iterator[Problem]:
    """Values out of range, and settings that contradict each other."""

    def value_of(key: str):
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    for key in _POSITIVE:
        if value_of(key) is not None and value_of(key) <= 0:
            yield problem(f"is {value_of(key)}; expected a positive number", key)
    for key in _NOT_NEGATIVE:
        if value_of(key) < 0:
            yield problem(f"is {value_of(key)}; expected 0 or more", key)
    data, lora, train, parallel = config.data, config.lora, config.train, config.parallel
    if data.seq_len == 1 and data.too_long == "split":
        yield problem("is 1; a piece of a text needs two tokens, of which the first is not trained", "data.seq_len")
    if not 0 <= lora.dropout < 1:
        yield problem(f"is {lora.dropout}; expected at least 0 and less than 1", "lora.dropout")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield problem(f"is {lora.targets}; expected at least one target, each once", "lora.targets")
    yield from _source_problems(data)
    yield from _schedule_problems(config.optim, train)
    yield from _evaluation_problems(train, data)
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


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """How many of a run's steps are warm-up; a share of them is rounded up, as in transformers."""
    return optim.warmup_steps if optim.warmup_ratio is None else math.ceil(optim.warmup_ratio * steps)


def warmup_problem(optim: OptimConfig, steps: int) -> UserError | None:
    """What is wrong where a run of so many steps would end before its learning rate is reached."""
    warmup = warmup_steps(optim, steps)
    if not 0 < warmup >= steps:
        return None
    key = "warmup_steps" if optim.warmup_ratio is None else "warmup_ratio"
    return UserError(
        f"is {getattr(optim, key)}: a warm-up of {warmup} steps in a run of {steps}; lower it, or train longer",
        field=f"optim.{key}",
    )


def _schedule_problems(optim: OptimConfig, train: TrainConfig) -> Iterator[Problem]:
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield problem(f"is {list(optim.betas)}; expected two numbers, at least 0 and less than 1", "optim.betas")
    ratio = optim.warmup_ratio
    if ratio is not None and not 0 <= ratio < 1:
        yield problem(f"is {ratio}; expected at least 0 and less than 1", "optim.warmup_ratio")
    elif ratio is not None and optim.warmup_steps:
        message = f"is {ratio} and optim.warmup_steps {optim.warmup_steps}; set one of them"
        yield problem(message, "optim.warmup_ratio", "optim.warmup_steps")
    elif train.steps and train.steps > 0 and (error := warmup_problem(optim, train.steps)):
        yield Problem((error.field or "", "train.steps"), error)
    if optim.min_lr > optim.lr > 0:
        yield problem(f"is {optim.min_lr}; expected at most optim.lr, {optim.lr}", "optim.min_lr", "optim.lr")
    elif optim.min_lr > 0 and optim.schedule == "constant":
        message = f"is {optim.min_lr}, and optim.schedule constant never falls; set one of them otherwise"
        yield problem(message, "optim.min_lr", "optim.schedule")


def _evaluation_problems(train: TrainConfig, data: DataConfig) -> Iterator[Problem]:
    for key in ("checkpoint_every", "eval_every"):
        every = getattr(train, key)
        try:
            wrong = epochs_in(every) is None and every < 0
        except ValueError:
            wrong = True
        if wrong:
            yield problem(f"is {every!r}; {EXPECTED_EVERY}", f"train.{key}")
    if train.eval_every and data.eval is None:
        yield problem("is set but data.eval is not; give held-out rows or a fraction", "train.eval_every", "data.eval")
    for key, is_set in (("keep_best", train.keep_best), ("early_stopping", train.early_stopping is not None)):
        if is_set and (data.eval is None or not train.eval_every):
            message = "needs evaluations: set data.eval, and train.eval_every to a number of steps or epochs"
            yield problem(message, f"train.{key}", "data.eval", "train.eval_every")


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
            if source.format == "text" and data.train_on != "all":
                message = f"reads {source.path} as plain text, which has no responses; set data.train_on to all"
                yield Problem((key, "data.train_on", "data.format"), UserError(message, field=key))
            if source.format != "text" and data.too_long == "split":
                message = (
                    f"is split, but {key} reads {source.path} as {source.format}, and only text can be split; "
                    "choose drop, truncate or error"
                )
                yield Problem(("data.too_long", key, "data.format"), UserError(message, field="data.too_long"))
            yield from _name_problems(source, key)


def _name_problems(source: Source, key: str) -> Iterator[Problem]:
    known = FORMATS[cast(Format, source.format)].columns
    for column in source.columns or {}:
        if column not in known:
            message = f"has {column} for {source.path}; format {source.format} has the columns {', '.join(known)}"
            yield Problem(("data.columns", key, "data.format"), UserError(message, field="data.columns"))
    for name, role in (source.roles or {}).items():
        if role not in OUR_ROLES:
            message = f"maps {name} to {role} for {source.path}; expected one of {', '.join(OUR_ROLES)}"
            yield Problem(("data.roles", key), UserError(message, field="data.roles"))
