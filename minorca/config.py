"""Every setting of a run: one tree of dataclasses, read from a YAML file and `--section.key VALUE` options.

Types are checked by pydantic, imported only where settings are read; ranges and contradictions by `_problems`. Whatever
is wrong is reported at once.
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from minorca.cli import Parser
from minorca.errors import UserError
from minorca.model.architecture import TARGETS

log = logging.getLogger(__name__)

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
_STRICT = {
    "extra": "forbid",
    "strict": True,
    "allow_inf_nan": False,
}  # pydantic's: an unknown key is an error, true is no number


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
    targets: Annotated[list[Literal["q", "k", "v", "o", "gate", "up", "down"]], "the projections with an adapter"] = (
        field(default_factory=lambda: list(TARGETS))
    )
    rslora: Annotated[bool, "scale by alpha / sqrt(rank) instead"] = False
    init: Annotated[str | None, "a PEFT adapter to start from"] = None


Format = Literal["openorca", "sharegpt", "messages", "alpaca", "prompt_completion", "text"]


@dataclass
class Source:
    """One file of several in data.train or data.eval."""

    __pydantic_config__ = _STRICT
    path: str
    format: Format | None = None  # None: data.format
    weight: float = 1.0  # how often an epoch has each row; 0.5: half the rows, the other half in the next


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

    def nested(self) -> dict[str, dict]:
        """As plain values, in the form that YAML has."""
        values = dataclasses.asdict(self)
        values["optim"]["betas"] = list(values["optim"]["betas"])
        return values


def _problems(c: Config) -> Iterator[str]:
    """Values out of range, and keys that contradict each other."""
    positive = [
        "lora.rank",
        "lora.alpha",
        "data.limit",
        "data.seq_len",
        "optim.lr",
        "optim.eps",
        "optim.max_grad_norm",
        "train.steps",
    ]
    positive += ["train.epochs", "train.batch_tokens", "train.micro_batch_tokens", "train.keep", "train.log_every"]
    positive += ["parallel.replicate"]
    for key in positive:
        section, name = key.split(".")
        value = getattr(getattr(c, section), name)
        if value is not None and value <= 0:
            yield f"{key} is {value}; expected a positive number"
    for key in ("optim.weight_decay", "optim.warmup_steps", "train.checkpoint_every", "train.eval_every", "train.seed"):
        section, name = key.split(".")
        if (value := getattr(getattr(c, section), name)) < 0:
            yield f"{key} is {value}; expected 0 or more"
    if not 0 <= c.lora.dropout < 1:
        yield f"lora.dropout is {c.lora.dropout}; expected at least 0 and less than 1"
    if not all(0 <= beta < 1 for beta in c.optim.betas):
        yield f"optim.betas is {list(c.optim.betas)}; expected two numbers, at least 0 and less than 1"
    if not c.lora.targets or len(set(c.lora.targets)) < len(c.lora.targets):
        yield f"lora.targets is {c.lora.targets}; expected at least one target, each once"
    if isinstance(c.data.eval, float) and not 0 < c.data.eval < 1:
        yield f"data.eval is {c.data.eval}; expected a path, or a fraction between 0 and 1"
    for key in ("train", "eval"):
        sources = c.data.sources(getattr(c.data, key))
        if isinstance(getattr(c.data, key), list) and not sources:
            yield f"data.{key} is an empty list; expected at least one file"
        for source in sources:
            if not 0 < source.weight <= 1000:
                yield f"data.{key} gives {source.path} the weight {source.weight}; expected a number over 0 and at most 1000"
            elif key == "eval" and source.weight != 1:
                yield f"data.eval gives {source.path} the weight {source.weight}; rows held out are all evaluated once, so leave it out"
            if source.format == "text" and c.data.train_on == "response":
                yield f"data.{key} reads {source.path} as plain text, which has no responses; set data.train_on to all"
    if c.train.eval_every and c.data.eval is None:
        yield "train.eval_every is set but data.eval is not; give held-out rows or a fraction"
    if c.train.micro_batch_tokens < c.data.seq_len:
        yield f"train.micro_batch_tokens is {c.train.micro_batch_tokens} and data.seq_len {c.data.seq_len}; a micro-batch must hold the longest row"
    if c.train.batch_tokens % c.train.micro_batch_tokens:
        yield f"train.batch_tokens is {c.train.batch_tokens}; expected a multiple of train.micro_batch_tokens, {c.train.micro_batch_tokens}"
    if not 10 <= c.parallel.timeout <= 10**6:
        yield f"parallel.timeout is {c.parallel.timeout}; expected 10 to 1000000 seconds"
    if not c.train.output.strip():
        yield "train.output is empty; expected a directory's name"
    if c.parallel.shard == "none" and c.parallel.replicate > 1:
        yield "parallel.replicate is over 1, which needs parallel.shard fsdp, not none"
    if c.parallel.shard == "none" and c.parallel.cpu_offload:
        yield "parallel.cpu_offload needs parallel.shard fsdp, not none"


_NUMBER = "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")


def _load_yaml(text: str):
    """What PyYAML loads safely, but a key given twice is an error, every key is text, and 2e-4 is a number (not in YAML 1.1)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):  # the base class keeps the last of two equal keys, silently
            keys = [key.value for key, _ in node.value]
            for i, (key, _) in enumerate(node.value):
                if key.value in keys[:i]:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
            return {str(key): value for key, value in super().construct_mapping(node, deep).items()}

    Loader.add_implicit_resolver(*_NUMBER)
    return yaml.load(text, Loader)


def _read_yaml(path: Path) -> dict:
    import yaml

    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem or 'not valid YAML'}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read as YAML ({error})", path=path) from None
    if not isinstance(values or {}, dict) or not all(isinstance(v, dict | None) for v in (values or {}).values()):
        raise UserError("expected sections (model:, data:, ...) with keys", path=path)
    return {section: keys or {} for section, keys in (values or {}).items()}


def _option_reader(kind) -> Callable[[str], object]:
    """How an option's text becomes a value of `kind`: as YAML, but where only text is wanted as it stands (007 is a name)."""
    import yaml

    def read(text: str):
        try:
            return _load_yaml(text)
        except yaml.YAMLError:
            return text  # a path that starts with [ or @; where no text is wanted, the check of types says so

    def read_sources(text: str):
        value = read(text)
        if not isinstance(value, list) and text.lstrip().startswith(("[", "{")) and not Path(text).exists():
            raise argparse.ArgumentTypeError(
                f"{text}: expected a path, a hub id or a list [{{path: FILE, format: NAME, weight: NUMBER}}, ...]"
            )
        return value if isinstance(value, list) else text

    return {str: str, str | None: lambda text: None if text == "null" else text, str | list[Source]: read_sources}.get(
        kind, read
    )


def config_parser(prog: str, description: str) -> Parser:
    """A parser of `--config FILE` and one `--section.key VALUE` a setting; commands may add their own options to it."""
    usage = f"{prog} [--config FILE] [--section.key VALUE ...]"
    parser = Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of these settings, which options override; default: the quickstart",
    )
    for section in dataclasses.fields(Config):
        group = parser.add_argument_group(section.name)
        hints = typing.get_type_hints(section.type, include_extras=True)
        for key in dataclasses.fields(section.type):
            value = key.default_factory() if callable(key.default_factory) else key.default
            kind = hints[key.name].__origin__
            choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
            text = hints[key.name].__metadata__[0] + ("" if value is dataclasses.MISSING else f" (default: {value})")
            metavar = "|".join(choices) or "VALUE"
            options = {"default": argparse.SUPPRESS, "type": _option_reader(kind), "metavar": metavar, "help": text}
            group.add_argument(f"--{section.name}.{key.name}", **options)
    return parser


def read_config(args: argparse.Namespace, surplus: list[str]) -> Config:
    """The settings of a parsed command line (`config_parser(...).parse_known_args()`), checked.

    Raises:
        UserError: every unknown key or option, wrong type, value out of range and contradiction, in one message.
    """
    import pydantic

    path = Path(args.config) if args.config else QUICKSTART
    if not args.config:
        log.info("no --config: starting from the quickstart, %s", path)
    if not path.is_file():
        raise UserError("no such configuration file; give one with --config FILE", path=path)
    values = _read_yaml(path)
    options = {option: value for option, value in vars(args).items() if "." in option}
    for option, value in options.items():
        section, key = option.split(".")
        values.setdefault(section, {})[key] = value
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"--{option}: {value!r} holds bytes that are no UTF-8; give it another name")
    init = values.setdefault("lora", {}).get("init")
    if isinstance(init, str):
        values["lora"]["init"] = os.path.expanduser(init)
    output = values.setdefault("train", {}).setdefault("output", f"runs/{path.stem}")
    if output is None or isinstance(output, str):
        values["train"]["output"] = os.path.expanduser(output if output is not None else f"runs/{path.stem}")

    problems, wrong = [f"{word} is no option of this command" for word in surplus], []

    def check(
        values: dict,
    ) -> Config:  # by way of JSON, for which pydantic's strict types are YAML's (a list may be a tuple)
        return pydantic.TypeAdapter(Config).validate_json(json.dumps(values, default=str))

    try:
        config = check(values)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            name, message = ".".join(str(part) for part in problem["loc"][:2]), problem["msg"]
            wrong.append(name)
            if (
                name in ("data.train", "data.eval") and problem["loc"][2:]
            ):  # of several kinds: speak of the one that was meant
                kind, *place = problem["loc"][2:]
                if str(kind).startswith("list") != isinstance(values["data"][name[5:]], list):
                    continue
                name += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
            if problem["type"] in ("missing", "unexpected_keyword_argument"):
                problems.append(f"{name} is {'missing' if problem['type'] == 'missing' else 'no setting'}")
            else:
                problems.append(f"{name} is {problem['input']!r}; {message[0].lower()}{message[1:]}")
        for problem in error.errors():
            section, *key = problem["loc"]
            (values.get(section, {}) if key else values).pop(key[0] if key else section, None)
        # the rest, with defaults in place of what was wrong, so that its problems are reported too, but not the defaults'
        for section, key in (("model", "path"), ("data", "train")):
            values.setdefault(section, {}).setdefault(key, "")
        config = check(values)
    problems += [problem for problem in _problems(config) if not any(name in problem for name in wrong)]
    if problems:
        raise UserError(
            f"{path}{' and the command line' * bool(options or surplus)}: " + "; ".join(dict.fromkeys(problems))
        )
    return config


def write_config(config: Config, path: Path) -> None:
    """The whole resolved configuration, as a file that `--config` reads."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that `_load_yaml` would take for a number."""

    Dumper.add_implicit_resolver(*_NUMBER)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.dump(config.nested(), Dumper=Dumper, sort_keys=False))
    temporary.replace(path)
