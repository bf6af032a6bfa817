"""From four answers to the settings of a run that fits the card, and to the file that says them."""

import json
import re
from typing import Any

from minorca.config import Config
from minorca.config_file import load_yaml, read_config
from minorca.errors import UserError
from minorca.init.answers import Data, Model, check_goal, sample_lengths
from minorca.model.build import fast_dtype
from minorca.plan.apart import plan_apart
from minorca.plan.devices import Machine
from minorca.plan.estimate import model_of

Settings = dict[str, Any]

# of 7B models in published recipes: LoRA's of Mistral, DPO's of NeuralHermes, and all weights' of Mistral-7B-OpenOrca
RATES = {"adapters": 2e-4, "qlora": 2e-4, "dpo": 5e-5, "full": 6e-6}
LONGEST, SHORTEST = 4096, 128
BATCH_TOKENS = 32768
# a learning rate that rises and falls wants some steps
FEWEST_STEPS = 30
COMMENTS = {
    "model.path": "the base model",
    "model.dtype": "this processor multiplies bf16 slowly",
    "model.quantize": "the frozen weights in 4 bits",
    "lora.rank": "of every adapter: more learns more, and takes more memory",
    "lora.alpha": "the update is scaled by alpha / rank",
    "data.train": "the rows",
    "data.format": "what their columns are",
    "data.eval": "the share of them that is held out, to measure the loss on",
    "data.train_on": "plain text has no answers: every token is trained",
    "data.seq_len": "the longest row in tokens; longer ones are dropped",
    "optim.lr": "the highest learning rate: the first thing to try others of",
    "optim.warmup_ratio": "the share of the steps in which it rises",
    "train.objective": "what is minimized",
    "train.full": "all weights instead of adapters",
    "train.epochs": "passes over the rows",
    "train.batch_tokens": "of a step, over all GPUs",
    "train.micro_batch_tokens": "of one forward: what memory depends on",
    "train.eval_every": "when the held-out loss is measured",
    "parallel.activation_checkpointing": "what backward computes again, to need less memory",
    "parallel.shard": "the model divided among the GPUs",
    "parallel.cpu_offload": "what each has of it waits in host memory",
    "dpo.beta": "how near the policy stays to the model that it starts from",
}
# the sections and keys of the file, in this order
ORDER = list(COMMENTS)


def first_settings(model: Model, data: Data, goal: str, device: Machine) -> Settings:
    """What the answers alone say."""
    check_goal(goal, model, data)
    positions = min(LONGEST, model.arch.max_positions or LONGEST)
    # powers of two, which divide each other
    seq_len = 1 << (positions.bit_length() - 1)
    format = "preference" if goal == "dpo" else next(name for name in data.formats if name != "preference")
    settings: Settings = {"model.path": model.path, "data.train": data.path, "data.format": format}
    if format == "text":
        settings["data.train_on"] = "all"
    if goal == "qlora" and not model.in_4_bits:
        settings["model.quantize"] = "nf4"
    if not device.arch and not str(fast_dtype()).endswith("bfloat16"):
        settings["model.dtype"] = "float32"
    if goal == "full":
        settings["train.full"] = True
    else:
        settings |= {"lora.rank": 16, "lora.alpha": 32}
    if goal == "dpo":
        settings |= {"train.objective": "kto" if data.is_labelled else "dpo", "dpo.beta": 0.1}
    settings |= {"optim.lr": RATES[goal], "optim.warmup_ratio": 0.03, "train.epochs": 1}
    return settings | {
        "data.seq_len": seq_len,
        "train.batch_tokens": max(BATCH_TOKENS, seq_len),
        "train.micro_batch_tokens": seq_len,
    }


def fit_to_rows(settings: Settings, data: Data, lengths: list[int], ranks: int) -> Settings:
    """Rows no longer than they are, where all were seen; steps of so few tokens that there are enough of them; and
    forwards as large as rows may be, where the ranks share a step.
    """
    if data.count is None:
        return settings | {"data.eval": 0.01, "train.eval_every": "0.25 epochs"}
    settings = dict(settings)
    seq_len = settings["data.seq_len"]
    if data.count <= len(lengths):
        longest = max((length for length in lengths if length <= seq_len), default=seq_len)
        seq_len = min(seq_len, max(SHORTEST, 1 << (longest - 1).bit_length()))
    tokens = tokens_of(data, lengths) or 0
    batch = settings["train.batch_tokens"]
    while batch > seq_len and tokens / batch < FEWEST_STEPS:
        batch //= 2
    micro_batch = min(LONGEST, batch)
    while micro_batch > seq_len and batch // micro_batch < ranks:
        micro_batch //= 2
    settings |= {"data.seq_len": seq_len, "train.batch_tokens": batch, "train.micro_batch_tokens": micro_batch}
    # of fewer, too few would be held out
    if data.count >= 100:
        settings |= {"data.eval": 0.05 if data.count < 10_000 else 0.01, "train.eval_every": "0.25 epochs"}
    return settings


def tokens_of(data: Data, lengths: list[int]) -> int | None:
    """Of all rows, by those that were rendered; None where nobody has counted them."""
    return None if data.count is None else round(data.count * sum(lengths) / len(lengths))


def fit_to_card(settings: Settings, device: Machine, ranks: int) -> tuple[Settings, dict[str, Any]]:
    """The fastest settings with which a step fits, and their plan.

    Raises:
        UserError: nothing fits; or there can be no plan here.
    """
    plan = _plan(settings, device, ranks)
    if plan["fits"]:
        return settings, plan
    if not plan["advice"]:
        needed, usable = plan["memory_bytes"]["total"] / 1e9, device.usable / 1e9
        message = f"a step needs {needed:.1f} GB on each {device.name}, which has {usable:.1f}, and no settings make it"
        raise UserError(f"{message} fit; choose a larger card, more of them (--gpus), or another goal", field="--gpu")
    fitting = settings | plan["advice"][0]["settings"]
    return fitting, _plan(fitting, device, ranks)


def _plan(settings: Settings, device: Machine, ranks: int) -> dict[str, Any]:
    config, arch = model_of(configuration(settings))
    return plan_apart(config, arch, device, ranks, whole=False)


def configuration(settings: Settings) -> Config:
    return read_config(None, dict(settings))


def choose(model: Model, data: Data, device: Machine, goal: str, ranks: int) -> tuple[Settings, dict[str, Any], list]:
    """Settings that fit the rows and the card, their plan, and the lengths of the rows that were rendered."""
    settings = first_settings(model, data, goal, device)
    lengths = sample_lengths(configuration(settings))
    settings, plan = fit_to_card(fit_to_rows(settings, data, lengths, ranks), device, ranks)
    return settings, plan, lengths


def file_text(settings: Settings, head: list[str]) -> str:
    """The settings as YAML, each with a comment, below lines about all of them."""
    lines = [f"# {line}".rstrip() for line in head]
    section = ""
    for key in sorted(settings, key=ORDER.index):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"{section}:")
        lines.append(f"  {key.partition('.')[2]}: {_scalar(settings[key])}  # {COMMENTS[key]}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value in YAML, of which JSON is a part; text without quotes where it is read back so."""
    if isinstance(value, str) and re.fullmatch(r"[\w./][\w./ -]*", value) and load_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
