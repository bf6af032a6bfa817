"""Settings from a YAML file and options, checked as a whole, and back into a file."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from minorca.config import EXPECTED_EVERY, Config, fields
from minorca.config_rules import problems
from minorca.errors import UserError, raise_problems

_NUMBER = "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")

# keys of other tools (axolotl, TRL and transformers, LLaMA-Factory, mistral-finetune, torchtune), and where they are
# here
_ELSEWHERE = {
    "base_model": "model.path",
    "model_id_or_path": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "bnb_4bit_quant_type": "model.quantize",
    "bnb_4bit_use_double_quant": "model.double_quant",
    "use_bnb_nested_quant": "model.double_quant",
    "double_quantization": "model.double_quant",
    "quantization_bit": "model.quantize",
    "quantization_type": "model.quantize",
    "adapter_name_or_path": "lora.init",
    "lora_model_dir": "lora.init",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "scaling": "lora.alpha",
    "lora_target": "lora.targets",
    "lora_target_linear": "lora.targets",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "additional_target": "lora.modules_to_save",
    "lora_modules_to_save": "lora.modules_to_save",
    "modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.rslora",
    "peft_use_rslora": "lora.rslora",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_text_field": "data.columns",
    "datasets": "data.train",
    "instruct_data": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "eval_instruct_data": "data.eval",
    "test_datasets": "data.eval",
    "val_set_size": "data.eval",
    "val_size": "data.eval",
    "max_samples": "data.limit",
    "max_train_samples": "data.limit",
    "field_instruction": "data.columns",
    "field_messages": "data.columns",
    "field_output": "data.columns",
    "formatting": "data.format",
    "excess_length_strategy": "data.too_long",
    "chat_template": "data.template",
    "chat_template_path": "data.template",
    "cutoff_len": "data.seq_len",
    "max_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "sequence_len": "data.seq_len",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "mask_history": "data.train_on",
    "roles_to_train": "data.train_on",
    "train_on_eos": "data.train_on",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "dataset_prepared_path": "data.store",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "learning_rate": "optim.lr",
    "cosine_min_lr_ratio": "optim.min_lr",
    "lr_min": "optim.min_lr",
    "min_lr_rate": "optim.min_lr",
    "min_lr_ratio": "optim.min_lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "pct_start": "optim.warmup_ratio",
    "gradient_clipping": "optim.max_grad_norm",
    "max_norm": "optim.max_grad_norm",
    "batch_size": "train.batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens",
    "num_microbatches": "train.batch_tokens",
    "micro_batch_size": "train.micro_batch_tokens",
    "per_device_train_batch_size": "train.micro_batch_tokens",
    "add_special_tokens": "train.new_tokens",
    "new_special_tokens": "train.new_tokens",
    "tokens": "train.new_tokens",
    "enable": "train.full",
    "finetuning_type": "train.full",
    "rl": "train.objective",
    "stage": "train.objective",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "output_dir": "train.output",
    "run_dir": "train.output",
    "random_seed": "train.seed",
    "ckpt_freq": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every",
    "save_strategy": "train.checkpoint_every",
    "saves_per_epoch": "train.checkpoint_every",
    "save_total_limit": "train.keep",
    "num_ckpt_keep": "train.keep",
    "early_stopping_patience": "train.early_stopping",
    "early_stopping_steps": "train.early_stopping",
    "load_best_model_at_end": "train.keep_best",
    "eval_freq": "train.eval_every",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "evals_per_epoch": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "no_eval": "train.eval_every",
    "log_freq": "train.log_every",
    "logging_steps": "train.log_every",
    "resume_from_checkpoint": "train.resume",
    "auto_resume_from_checkpoints": "train.resume",
    "project": "train.wandb",
    "wandb_project": "train.wandb",
    "fsdp": "parallel.shard",
    "fsdp_config": "parallel.shard",
    "dp_shard_size": "parallel.shard",
    "dp_replicate_size": "parallel.replicate",
    "gradient_checkpointing": "parallel.activation_checkpointing",
    "activation_offloading": "parallel.activation_checkpointing",
    "checkpoint": "parallel.activation_checkpointing",
    "disable_gradient_checkpointing": "parallel.activation_checkpointing",
    "pref_beta": "dpo.beta",
    "rl_beta": "dpo.beta",
    "dpo_loss_type": "dpo.loss",
    "loss_type": "dpo.loss",
    "pref_loss": "dpo.loss",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "loss_weights": "dpo.sft_weight",
    "pref_ftx": "dpo.sft_weight",
    "simpo_gamma": "dpo.gamma",
    "kto_chosen_weight": "dpo.desirable_weight",
    "kto_desirable_weight": "dpo.desirable_weight",
    "kto_rejected_weight": "dpo.undesirable_weight",
    "kto_undesirable_weight": "dpo.undesirable_weight",
    "ref_model_adapters": "dpo.reference",
    "precompute_ref_log_probs": "dpo.precompute",
}


def settings() -> list[str]:
    """Every setting, as section.key."""
    return [f"{section}.{key.name}" for section, key, _ in fields()]


def suggestion(name: str) -> str:
    """A hint for an unknown setting: where it is here, or the nearest that is known; empty where there is neither."""
    key = name.rpartition(".")[2]
    known = settings()
    same_key = [setting for setting in known if setting.endswith(f".{key}")]
    if key in _ELSEWHERE or same_key:
        return f"; here it is {_ELSEWHERE.get(key) or ' or '.join(same_key)}"
    sections = [section.name for section in dataclasses.fields(Config)]
    near = difflib.get_close_matches(name, known if "." in name else sections, n=1, cutoff=0.6)
    if not near:
        short = {setting.rpartition(".")[2]: setting for setting in known}
        near = [short[match] for match in difflib.get_close_matches(key, short, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else ""


# -------------------------------------------------------------------------------------------------------------- YAML


def load_yaml(text: str):
    """What PyYAML loads safely, but a repeated key is an error, every key is text, and 2e-4 is a number (not in YAML
    1.1).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        # the base class silently keeps the last of two equal keys
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for i, (key, _) in enumerate(node.value):
                if key.value in keys[:i]:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
            return {str(key): value for key, value in super().construct_mapping(node, deep).items()}

    Loader.add_implicit_resolver(*_NUMBER)
    return yaml.load(text, Loader)


def _read_yaml(path: Path) -> tuple[dict[str, dict], list[UserError]]:
    """The sections of a file, and a problem for each key outside of one."""
    import yaml

    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else None
        raise UserError(error.problem or "not valid YAML", path=path, where=where) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot be read as YAML ({error})", path=path) from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError("expected sections (model:, data:, ...) with keys", path=path)
    names = [section.name for section in dataclasses.fields(Config)]
    sections, outside = {}, []
    for key, value in values.items():
        if isinstance(value, dict) or (value is None and key in names):
            sections[key] = value or {}
        elif key in names:
            outside.append(UserError(f"is {value!r}; expected a section with keys", path=path, field=key))
        else:
            message = f"is outside of a section; expected {', '.join(names)}, with keys in them{suggestion(key)}"
            outside.append(UserError(message, path=path, field=key))
    return sections, outside


# ----------------------------------------------------------------------------------------------------------- reading


def read_config(path: Path | None, options: dict[str, object], unknown: Iterable[UserError] = ()) -> Config:
    """The settings of a file, which options override, and the defaults of all others.

    Args:
        path: a YAML file, or None.
        options: section.key -> value.
        unknown: problems that were found before, reported with all others.

    Raises:
        UserError: every unknown key or option, wrong type, value out of range and contradiction.
    """
    if path is not None and not path.is_file():
        raise UserError("no such configuration file; give one with --config FILE", path=path)
    values, outside = _read_yaml(path) if path else ({}, [])
    raise_problems(
        UserError(f"{value!r} is not valid UTF-8; give it another name", field=f"--{option}")
        for option, value in options.items()
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)
    )
    for option, value in options.items():
        section, key = option.split(".")
        values.setdefault(section, {})[key] = value
    # so that what is missing is a key, not a section
    values = {"model": {}, "data": {}} | values
    _expand_paths(values, path)

    config, wrong = _checked(values)
    found = [*unknown, *outside]
    found += [_placed(error, path, options) for error in wrong]
    wrong_keys = {error.field for error in wrong}
    range_errors = [problem.error for problem in problems(config) if not wrong_keys & set(problem.keys)]
    found += [_placed(error, path, options) for error in range_errors]
    raise_problems(found)
    return config


def _expand_paths(values: dict[str, dict], path: Path | None) -> None:
    """Replaces ~ in paths, and gives the run its default directory, named after the configuration file."""
    lora = values.setdefault("lora", {})
    if isinstance(lora.get("init"), str):
        lora["init"] = os.path.expanduser(lora["init"])
    train = values.setdefault("train", {})
    output = train.get("output")
    if output is None:
        output = f"runs/{path.stem if path else 'default'}"
    train["output"] = os.path.expanduser(output) if isinstance(output, str) else output


def _placed(error: UserError, path: Path | None, options: dict[str, object]) -> UserError:
    """An error about a setting, with the file or the option that sets it."""
    key = error.field or ""
    base = next((option for option in options if key == option or key.startswith((f"{option}[", f"{option}."))), None)
    if base:
        return UserError(error.message, field=f"--{key}")
    return UserError(error.message, path=path, field=key)


def _checked(values: dict[str, dict]) -> tuple[Config, list[UserError]]:
    """The settings, with defaults in place of what has no setting or the wrong type, and an error for each of these."""
    import pydantic

    adapter = pydantic.TypeAdapter(Config)

    # by way of JSON, for which pydantic's strict types are YAML's (a list may be a tuple)
    def check() -> Config:
        return adapter.validate_json(json.dumps(values, default=str))

    try:
        return check(), []
    except pydantic.ValidationError as error:
        details = error.errors()
    errors = list(_type_errors(details, values))
    for detail in details:
        section, *key = map(str, detail["loc"])
        if key:
            values.get(section, {}).pop(key[0], None)
        else:
            values.pop(section, None)
    # the rest, so that its problems are reported too, but not those of the defaults
    for section, key in (("model", "path"), ("data", "train")):
        values.setdefault(section, {}).setdefault(key, "")
    return check(), errors


def _type_errors(details: list, values: dict[str, dict]) -> Iterator[UserError]:
    """What pydantic says of each setting, in our words; of a value that may be of several kinds, of the one that was
    meant.
    """
    seen = set()
    for detail in details:
        name = ".".join(str(part) for part in detail["loc"][:2])
        message = detail["msg"]
        if name in ("data.train", "data.eval") and isinstance(values["data"].get(name[5:]), dict):
            message = "is one source with keys; expected a path, or a list, as in [{path: FILE, format: NAME}]"
            if (name, message) not in seen:
                seen.add((name, message))
                yield UserError(message, field=name)
            continue
        if name in ("data.train", "data.eval") and detail["loc"][2:]:
            kind, *place = detail["loc"][2:]
            if str(kind).startswith("list") != isinstance(values["data"][name[5:]], list):
                continue
            # Of an entry that may also be a path, what is wrong with it as a source.
            if place[1:2] == ["str"]:
                continue
            place[1:2] = []
            name += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        if detail["type"] == "missing":
            message = "is missing"
        elif detail["type"] == "unexpected_keyword_argument":
            message = f"is an unknown setting{suggestion(name)}"
        elif name in ("train.checkpoint_every", "train.eval_every", "eval.every"):
            message = f"is {detail['input']!r}; {EXPECTED_EVERY}"
        elif detail["type"] == "list_type":
            message = f"is {detail['input']!r}; expected a list, as in {json.dumps([detail['input']])}"
        else:
            message = f"is {detail['input']!r}; {message[0].lower()}{message[1:]}"
        if (name, message) not in seen:
            seen.add((name, message))
            yield UserError(message, field=name)


def config_text(config: Config) -> str:
    """The whole resolved configuration, as a file that `--config` reads."""
    return _dump(config.nested())


def _dump(values: dict) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that `load_yaml` would take for a number."""

    Dumper.add_implicit_resolver(*_NUMBER)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def is_config_text(content: bytes) -> bool:
    """Whether this may be of `config_text`, in this version or an earlier one: a person's file has comments,
    another layout or fewer sections.
    """
    import yaml

    try:
        values = load_yaml(content.decode())
        sections = {section.name for section in dataclasses.fields(Config)}
        is_whole = {"model", "lora", "data", "optim", "train"} <= values.keys() <= sections
        return is_whole and _dump(values).encode() == content
    except (ValueError, AttributeError, yaml.YAMLError):
        return False
