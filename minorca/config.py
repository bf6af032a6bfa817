"""Every setting of a run, as one tree of dataclasses.

Types are checked where settings are read (config_file.py), and the rules that values keep are in config_rules.py.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from minorca.model.layout import TARGETS, Matrix, Target

# pydantic's: an unknown key is an error, and a boolean is not a number
_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass
class ModelConfig:
    __pydantic_config__ = _STRICT
    path: Annotated[str, "the base model's directory, or its hub id, org/name or org/name@REVISION"]
    dtype: Annotated[
        Literal["bfloat16", "float32"], "of the frozen weights and of computation; what is trained is fp32"
    ] = "bfloat16"
    quantize: Annotated[
        Literal["none", "nf4"], "the projections' frozen weights in 4 bits, quantized while they load (QLoRA)"
    ] = "none"
    double_quant: Annotated[bool, "of nf4: the scales in 8 bits too, 4.13 instead of 4.5 bits a weight"] = True


@dataclass
class LoRAConfig:
    __pydantic_config__ = _STRICT
    rank: Annotated[int, "of every adapter"] = 16
    alpha: Annotated[float, "the update is scaled by alpha / rank"] = 32
    dropout: Annotated[float, "of an adapter's input"] = 0.0
    targets: Annotated[list[Literal[Target, Matrix]], "what has an adapter; besides projections, embed and head"] = (
        field(default_factory=lambda: list(TARGETS))
    )
    modules_to_save: Annotated[list[Matrix], "of embed and head, what is trained as a whole matrix"] = field(
        default_factory=list
    )
    rslora: Annotated[bool, "scale by alpha / sqrt(rank) instead"] = False
    init: Annotated[str | None, "a PEFT adapter to start from: a directory or a hub id"] = None


Format = Literal["openorca", "sharegpt", "messages", "alpaca", "prompt_completion", "text", "preference"]


@dataclass
class Source:
    """One source of several in data.train or data.eval.

    Attributes:
        path: a file, a directory, a glob, or a hub id, org/name[@REVISION][:FILE].
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
        "a file, a directory, a glob, a hub id[@REVISION][:FILE], or a list of these or of {path, format, weight, "
        "name, split, columns, roles}",
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
    pairs: Annotated[
        Literal["extremes", "all"],
        "of format preference, what a list of scored answers becomes: the best against the worst, or every pair",
    ] = "extremes"
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
    name: Annotated[
        Literal["adamw", "adamw_8bit"], "adamw_8bit: its moments in 8 bits instead of fp32; needs pip install torchao"
    ] = "adamw"
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


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """How many of a run's steps are warm-up; a share of them is rounded up, as in transformers."""
    return optim.warmup_steps if optim.warmup_ratio is None else math.ceil(optim.warmup_ratio * steps)


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
    objective: Annotated[
        Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto"],
        "what is minimized: sft, the loss of trained tokens; the others, of format preference, a loss of pairs of "
        "answers or, kto, of single ones",
    ] = "sft"
    full: Annotated[bool, "train all weights, in fp32 and sharded over the ranks, instead of adapters"] = False
    new_tokens: Annotated[list[str], "control tokens to add to the vocabulary; their rows are trained"] = field(
        default_factory=list
    )
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
class EvalConfig:
    __pydantic_config__ = _STRICT
    tasks: Annotated[
        list[str], "tasks and groups of lm_eval to evaluate the model on while it is trained; needs pip install lm_eval"
    ] = field(default_factory=list)
    every: Annotated[int | str, f"{_EVERY}; 0: only before the first and after the last step"] = 0
    limit: Annotated[int | None, "rows of each task to evaluate; all by default"] = None
    include_path: Annotated[str | None, "a directory with YAML files of your own tasks"] = None
    num_fewshot: Annotated[int | None, "examples before each question; what each task says by default"] = None


@dataclass
class DPOConfig:
    __pydantic_config__ = _STRICT
    beta: Annotated[
        float, "of dpo and kto: how near the policy stays to the reference; of simpo and cpo a scale, of orpo a weight"
    ] = 0.1
    loss: Annotated[
        Literal["sigmoid", "hinge", "ipo", "robust", "exo", "apo_zero", "apo_down", "sigmoid_norm"],
        "the loss of objective dpo; sigmoid with label_smoothing is cDPO",
    ] = "sigmoid"
    label_smoothing: Annotated[float, "the share of preferences taken to be the wrong way round"] = 0.0
    sft_weight: Annotated[
        float, "of the chosen answers' cross-entropy, which is added; orpo and cpo have their own"
    ] = 0.0
    gamma: Annotated[float, "the margin of objective simpo"] = 0.5
    desirable_weight: Annotated[float, "of desirable answers in objective kto"] = 1.0
    undesirable_weight: Annotated[float, "of undesirable answers in objective kto"] = 1.0
    reference: Annotated[
        str, "auto: the model that training starts from; base: that without lora.init; or a PEFT adapter"
    ] = "auto"
    precompute: Annotated[
        bool, "compute the reference's log-probabilities once, before the first step, and keep them beside the rows"
    ] = False


@dataclass
class ParallelConfig:
    __pydantic_config__ = _STRICT
    shard: Annotated[Literal["auto", "none", "fsdp"], "none: the model whole on each rank"] = "auto"
    replicate: Annotated[int, "copies of the sharded model; divides the ranks"] = 1
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full", "offload"],
        "what backward computes again; offload: as full, with what is kept in host memory",
    ] = "none"
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
    eval: EvalConfig = field(default_factory=EvalConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def output(self) -> Path:
        """The run's directory."""
        return Path(self.train.output or "runs/default")

    @property
    def outcome(self) -> Path:
        """The directory of what a finished run has trained."""
        return self.output / ("model" if self.train.full else "adapter")

    @property
    def has_reference(self) -> bool:
        """Whether the objective measures the policy against a reference."""
        return self.train.objective in ("dpo", "kto")

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are read: setting -> directory."""
        reference = self.has_reference and self.dpo.reference not in ("auto", "base")
        named = {"lora.init": self.lora.init, "dpo.reference": self.dpo.reference if reference else None}
        return {key: directory for key, directory in named.items() if directory}

    @property
    def start_key(self) -> str:
        """The setting with which another run starts from a checkpoint of this one."""
        return "model.path" if self.train.full else "lora.init"

    def nested(self) -> dict[str, dict]:
        """As plain values, in the form that YAML has."""
        values = dataclasses.asdict(self)
        values["optim"]["betas"] = list(values["optim"]["betas"])
        return values

    def flat(self) -> dict[str, object]:
        """section.key -> value, in the form that YAML has."""
        return {f"{section}.{key}": value for section, keys in self.nested().items() for key, value in keys.items()}


def fields() -> Iterator[tuple[str, dataclasses.Field, object]]:
    """The section, the field and the annotated type of every setting."""
    for section, kind in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(kind, include_extras=True)
        for key in dataclasses.fields(kind):
            yield section, key, hints[key.name]


def choices(setting: str) -> tuple[str, ...]:
    """The values that section.key may have, in their order; of one that takes any, none."""
    hint = next(hint for section, key, hint in fields() if f"{section}.{key.name}" == setting)
    return tuple(choice for choice in typing.get_args(typing.get_args(hint)[0]) if isinstance(choice, str))


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
