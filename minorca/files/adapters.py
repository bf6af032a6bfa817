"""PEFT's files for LoRA adapters. The format is that of PEFT's checkpoint guide."""

import json
from pathlib import Path
from typing import NoReturn

from safetensors.torch import save_file
from torch import Tensor, nn

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json
from minorca.files.tensor_files import open_exactly, open_safetensors
from minorca.model.architecture import MAX_NUMBER, MAX_SIZE
from minorca.model.layout import TARGETS, target_of
from minorca.model.lora import LoRASettings, adapter_parameters
from minorca.model.network import Mistral
from minorca_kernels import fill_rows


def save_adapter(directory: Path, tensors: dict[str, Tensor], settings: LoRASettings, base_model: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into an existing directory."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": [f"{t}_proj" for t in settings.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors", {"format": "pt"}
    )
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


# fields of adapter_config.json that change what an adapter computes, beyond what this engine does
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "alora_invocation_tokens",
)


def read_adapter_settings(directory: str | Path) -> LoRASettings:
    """The settings of an adapter in PEFT's format; refuses what this engine would compute differently.

    Raises:
        UserError: naming the file and field.
    """
    directory = Path(directory)
    path = find_file(directory, "adapter_config.json")
    if path is None:
        raise UserError("no adapter_config.json; expected an adapter's directory in PEFT's format", path=directory)
    config = read_json(path)

    def refuse(field: str, expected: str) -> NoReturn:
        raise UserError(f"is {quote(config.get(field))}; {expected}", path=path, field=field)

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "expected LORA")
    if config.get("bias", "none") != "none":
        refuse("bias", "expected none")
    for field in _UNSUPPORTED:
        if config.get(field):
            refuse(field, "which is not supported")
    # the others change the base's weights too
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        refuse("init_lora_weights", "convert the adapter to a plain one with PEFT first")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= MAX_SIZE:
        refuse("r", f"expected a positive integer of at most {MAX_SIZE}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= MAX_NUMBER:
        refuse("lora_alpha", f"expected a number of at most {MAX_NUMBER}")
    return LoRASettings(rank, alpha, _targets_in(directory), rslora=bool(config.get("use_rslora")))


def adapter_file(directory: Path) -> Path:
    """PEFT's tensor file in an adapter's directory."""
    path = find_file(directory, "adapter_model.safetensors")
    if path is None:
        raise UserError("no adapter_model.safetensors", path=directory)
    return path


def _targets_in(directory: Path) -> tuple[str, ...]:
    """The targets that an adapter's tensors name: what was trained, however target_modules spells it (list or
    pattern).
    """
    path = adapter_file(directory)
    found = set()
    for key in open_safetensors(path).keys():  # noqa: SIM118  (a file, not a dict)
        target = target_of(key)
        if target is None:
            expected = "LoRA tensors of a Mistral network's projections"
            raise UserError(f"unexpected tensor {key}; expected {expected}", path=path)
        found.add(target)
    return tuple(target for target in TARGETS if target in found)


def open_adapter(directory: str | Path, expected: dict[str, nn.Parameter]):
    """PEFT's tensor file, opened, once it is sure to hold exactly the tensors of `expected` (`adapter_parameters`).

    Raises:
        UserError: as `open_exactly`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in expected.items()}
    return open_exactly(adapter_file(Path(directory)), shapes)


def load_adapter(model: Mistral, directory: str | Path) -> None:
    """Fills a model's adapters, sharded or not, from PEFT's file; errors as `open_adapter`."""
    parameters = adapter_parameters(model)
    file = open_adapter(directory, parameters)
    for name, parameter in parameters.items():
        rows = file.get_slice(name)
        fill_rows(parameter, lambda start, stop, rows=rows: rows[start:stop])
