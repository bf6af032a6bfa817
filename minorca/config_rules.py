"""The rules that the values of settings keep: which are out of range, and which contradict each other."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, cast

from minorca.config import (
    EXPECTED_EVERY,
    Config,
    DataConfig,
    DPOConfig,
    EvalConfig,
    Format,
    LoRAConfig,
    OptimConfig,
    ParallelConfig,
    Source,
    TrainConfig,
    choices,
    default_of,
    epochs_in,
)
from minorca.data.formats import FORMATS
from minorca.data.messages import OUR_ROLES
from minorca.errors import UserError
from minorca.model.layout import MATRICES


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
    "eval.limit",
    "parallel.replicate",
    "dpo.beta",
)
_NOT_NEGATIVE = (
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.min_lr",
    "train.seed",
    "eval.num_fewshot",
    "dpo.sft_weight",
    "dpo.gamma",
    "dpo.desirable_weight",
    "dpo.undesirable_weight",
)
# keys of dpo that only some objectives, or only some losses of objective dpo, read
_OF_OBJECTIVES = {
    "loss": ("dpo",),
    "label_smoothing": ("dpo", "simpo", "cpo"),
    "sft_weight": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("dpo", "kto"),
    "precompute": ("dpo",),
    "beta": ("dpo", "orpo", "simpo", "cpo", "kto"),
}
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo")


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
        if value_of(key) is not None and value_of(key) < 0:
            yield problem(f"is {value_of(key)}; expected 0 or more", key)
    data, lora, train, parallel = config.data, config.lora, config.train, config.parallel
    if data.seq_len == 1 and data.too_long == "split":
        yield problem("is 1; a piece of a text needs two tokens, of which the first is not trained", "data.seq_len")
    if not 0 <= lora.dropout < 1:
        yield problem(f"is {lora.dropout}; expected at least 0 and less than 1", "lora.dropout")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield problem(f"is {lora.targets}; expected at least one target, each once", "lora.targets")
    yield from _full_problems(config)
    yield from _objective_problems(config)
    yield from _vocabulary_problems(lora, train)
    yield from _source_problems(data)
    yield from _preference_problems(data, train)
    yield from _schedule_problems(config.optim, train)
    yield from _evaluation_problems(train, data)
    yield from _task_problems(config.eval, parallel)
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
    if not config.model.double_quant and config.model.quantize == "none":
        yield problem("is false, which needs model.quantize nf4", "model.double_quant", "model.quantize")
    if parallel.shard == "none" and parallel.replicate > 1:
        yield problem("is over 1, which needs parallel.shard fsdp, not none", "parallel.replicate", "parallel.shard")
    if parallel.shard == "none" and parallel.cpu_offload:
        yield problem("needs parallel.shard fsdp, not none", "parallel.cpu_offload", "parallel.shard")


def _full_problems(config: Config) -> Iterator[Problem]:
    """Settings that contradict `train.full`."""
    if not config.train.full:
        return
    without = LoRAConfig()
    for key in dataclasses.fields(LoRAConfig):
        value = getattr(config.lora, key.name)
        if value != getattr(without, key.name):
            message = f"is {value}, but train.full trains all weights, without adapters; remove it, or train.full"
            yield problem(message, f"lora.{key.name}", "train.full")
    if config.model.quantize != "none":
        message = f"is {config.model.quantize}, but train.full trains fp32 weights; set it to none, or train adapters"
        yield problem(message, "model.quantize", "train.full")
    if config.parallel.shard == "none":
        message = "is none, but train.full needs FSDP, also on one rank; set it to auto or fsdp"
        yield problem(message, "parallel.shard", "train.full")


def _objective_problems(config: Config) -> Iterator[Problem]:
    """Settings of dpo that are out of range, or that the objective does not read."""
    objective, dpo = config.train.objective, config.dpo
    for key in dataclasses.fields(DPOConfig):
        value, default = getattr(dpo, key.name), key.default
        if value != default and objective not in (readers := _OF_OBJECTIVES[key.name]):
            message = f"is {value}, which train.objective {objective} does not read; leave it at {default}, or set the "
            yield problem(f"{message}objective to {' or '.join(readers)}", f"dpo.{key.name}", "train.objective")
    if not 0 <= dpo.label_smoothing < 1:
        yield problem(f"is {dpo.label_smoothing}; expected at least 0 and less than 1", "dpo.label_smoothing")
    elif objective == "dpo":
        yield from _smoothing_problems(dpo)
    if objective != "sft" and config.lora.dropout:
        message = f"is {config.lora.dropout}; the policy and its reference are compared without dropout, so set it to 0"
        yield problem(message, "lora.dropout", "train.objective")
    if config.train.full and dpo.reference not in ("auto", "base"):
        message = f"is {dpo.reference}, but train.full trains no adapters; set it to auto"
        yield problem(message, "dpo.reference", "train.full")


def _smoothing_problems(dpo: DPOConfig) -> Iterator[Problem]:
    keys, smoothing = ("dpo.label_smoothing", "dpo.loss"), dpo.label_smoothing
    if smoothing and dpo.loss not in _SMOOTHED:
        message = f"is {smoothing}, and loss {dpo.loss} has no smoothing; set it to 0, or dpo.loss to one of "
        yield problem(message + ", ".join(_SMOOTHED), *keys)
    if dpo.loss == "robust" and smoothing >= 0.5:
        yield problem(f"is {smoothing}; loss robust needs less than 0.5", *keys)
    if dpo.loss == "exo" and not smoothing:
        yield problem("is 0, for which loss exo is infinite; set it to 0.001, say", *keys)


def warmup_problem(optim: OptimConfig, steps: int) -> UserError | None:
    """What is wrong where a run of so many steps would end before its learning rate is reached."""
    # A ratio is less than 1.
    if optim.warmup_steps <= steps:
        return None
    return UserError(
        f"is {optim.warmup_steps}, longer than the run of {steps} steps; lower it, or train longer",
        field="optim.warmup_steps",
    )


def _vocabulary_problems(lora: LoRAConfig, train: TrainConfig) -> Iterator[Problem]:
    whole, tokens = lora.modules_to_save, train.new_tokens
    if len(set(whole)) < len(whole):
        yield problem(f"is {whole}; expected each once", "lora.modules_to_save")
    if both := [matrix for matrix in whole if matrix in lora.targets]:
        message = (
            f"has {', '.join(both)}, and so has lora.targets; a matrix is trained whole or by an adapter, not both"
        )
        yield problem(message, "lora.modules_to_save", "lora.targets")
    if len(set(tokens)) < len(tokens) or not all(token.strip() and token.isprintable() for token in tokens):
        yield problem(f"is {tokens}; expected printable texts, each once", "train.new_tokens")
    if tokens and (adapted := [matrix for matrix in MATRICES if matrix in lora.targets]):
        message = (
            f"needs trained rows of {adapted[0]}, which lora.targets has; set lora.modules_to_save to "
            f"[{', '.join(adapted)}] instead, or leave it to the rows"
        )
        yield problem(message, "train.new_tokens", "lora.targets")


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


def _every_problems(every: int | str, key: str) -> Iterator[Problem]:
    try:
        wrong = epochs_in(every) is None and int(every) < 0
    except ValueError:
        wrong = True
    if wrong:
        yield problem(f"is {every!r}; {EXPECTED_EVERY}", key)


def _task_problems(tasks: EvalConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    yield from _every_problems(tasks.every, "eval.every")
    if len(set(tasks.tasks)) < len(tasks.tasks):
        yield problem(f"is {tasks.tasks}; expected each once", "eval.tasks")
    if tasks.tasks and parallel.cpu_offload:
        message = "needs the model on its device, and parallel.cpu_offload keeps it in host memory; leave one out"
        yield problem(message, "eval.tasks", "parallel.cpu_offload")
    for key in dataclasses.fields(EvalConfig):
        value = getattr(tasks, key.name)
        if value != default_of(key) and not tasks.tasks:
            yield problem(f"is {value}, which needs eval.tasks; name the tasks", f"eval.{key.name}", "eval.tasks")


def _evaluation_problems(train: TrainConfig, data: DataConfig) -> Iterator[Problem]:
    for key in ("checkpoint_every", "eval_every"):
        yield from _every_problems(getattr(train, key), f"train.{key}")
    if train.eval_every and data.eval is None:
        yield problem("is set but data.eval is not; give held-out rows or a fraction", "train.eval_every", "data.eval")
    for key, is_set in (("keep_best", train.keep_best), ("early_stopping", train.early_stopping is not None)):
        if is_set and (data.eval is None or not train.eval_every):
            message = "needs evaluations: set data.eval, and train.eval_every to a number of steps or epochs"
            yield problem(message, f"train.{key}", "data.eval", "train.eval_every")


def _source_problems(data: DataConfig) -> Iterator[Problem]:
    if isinstance(data.eval, float) and not 0 < data.eval < 1:
        yield problem(f"is {data.eval}; expected a path, or a fraction between 0 and 1", "data.eval")
    for name in ("train", "eval"):
        key = f"data.{name}"
        sources = data.sources(getattr(data, name))
        if isinstance(getattr(data, name), list) and not sources:
            yield problem("is an empty list; expected at least one file", key)
        for source in sources:
            has_weight = f"gives {source.path} the weight {source.weight}"
            if not 0 < source.weight <= 1000:
                message = f"{has_weight}; expected a number over 0 and at most 1000"
                yield problem(message, key)
            elif name == "eval" and source.weight != 1:
                message = f"{has_weight}; held-out rows are all evaluated once, so leave it out"
                yield problem(message, key)
            if source.format == "text" and data.train_on != "all":
                message = f"reads {source.path} as plain text, which has no responses; set data.train_on to all"
                yield problem(message, key, "data.train_on", "data.format")
            if source.format not in ("text", "preference") and data.too_long == "split":
                message = (
                    f"is split, but {key} reads {source.path} as {source.format}, and only text can be split; "
                    "choose drop, truncate or error"
                )
                yield problem(message, "data.too_long", key, "data.format")
            yield from _name_problems(source, key)


def _preference_problems(data: DataConfig, train: TrainConfig) -> Iterator[Problem]:
    """Settings that contradict format preference, which the objectives other than sft need."""
    named = [(f"data.{name}", source) for name in ("train", "eval") for source in data.sources(getattr(data, name))]
    compared = [(key, source) for key, source in named if source.format == "preference"]
    if data.pairs != "extremes" and not compared:
        yield problem(f"is {data.pairs}, which needs data.format preference", "data.pairs", "data.format")
    elif data.pairs != "extremes" and train.objective == "kto":
        message = (
            f"is {data.pairs}, but train.objective kto compares no answers; set it to extremes: the best of a list"
        )
        yield problem(f"{message} is desirable, the worst is not", "data.pairs", "train.objective")
    for key, source in named:
        reads = f"but {key} reads {source.path} as {source.format}"
        if source.format != "preference" and train.objective != "sft":
            message = f"is {train.objective}, {reads}; set data.format to preference, or the objective to sft"
            yield problem(message, "train.objective", key, "data.format")
        elif source.format == "preference" and train.objective == "sft":
            others = ", ".join(choices("train.objective")[1:])
            message = f"is sft, {reads}; set it to one of {others}, or read another format"
            yield problem(message, "train.objective", key, "data.format")
    for key, source in compared:
        reads = f"but {key} reads {source.path} as preference"
        if data.train_on == "all":
            message = f"is all, {reads}, of which answers alone are scored; choose response or last"
            yield problem(message, "data.train_on", key, "data.format")
        if data.too_long in ("truncate", "split"):
            message = f"is {data.too_long}, {reads}, and an answer that is cut would be scored as another; choose drop"
            yield problem(f"{message} or error", "data.too_long", key, "data.format")


def _name_problems(source: Source, key: str) -> Iterator[Problem]:
    known = FORMATS[cast(Format, source.format)].columns
    for column in source.columns or {}:
        if column not in known:
            message = f"has {column} for {source.path}; format {source.format} has the columns {', '.join(known)}"
            yield problem(message, "data.columns", key, "data.format")
    for name, role in (source.roles or {}).items():
        if role not in OUR_ROLES:
            message = f"maps {name} to {role} for {source.path}; expected one of {', '.join(OUR_ROLES)}"
            yield problem(message, "data.roles", key)
