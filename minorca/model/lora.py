"""Low-rank adapters on a model's projections, and PEFT's files for them. Sources: Hu et al. 2021 (arXiv:2106.09685);
Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732); the format is that of PEFT's checkpoint guide.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json
from minorca.files.weights import fill_rows, open_exactly, open_safetensors
from minorca.model.architecture import LARGEST, TARGETS, Architecture
from minorca.model.network import Mistral, SwiGLULinear
from minorca_kernels import Adapter, lora_linear, pad_rows, padding_pays
from minorca_kernels.operator import uses_triton

GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
PEFT_NAMES = {t: f"self_attn.{t}_proj" if t in "qkvo" else f"mlp.{t}_proj" for t in TARGETS}
PEFT_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoRASettings:
    """What defines an adapter besides its numbers. `dropout` is for training only."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _group_rows(arch: Architecture, target: str) -> tuple[int, int]:
    """Where a target's rows lie in the projection its group stacks."""
    attended, kv, inner = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.intermediate_size
    ends = {
        "q": (0, attended),
        "k": (attended, attended + kv),
        "v": (attended + kv, attended + 2 * kv),
        "gate": (0, inner),
        "up": (inner, 2 * inner),
    }
    return ends.get(target, (0, arch.hidden_size))


class LoRALinear(nn.Module):
    """A frozen projection with an adapter for each of its targets: A [r, in] and B [out, r], PEFT's shapes."""

    def __init__(self, base: nn.Linear, rows: dict[str, tuple[int, int]], settings: LoRASettings, dtype: torch.dtype):
        super().__init__()
        self.weight, self.rows, self.scale, self.dropout = base.weight, rows, settings.scale, settings.dropout
        like = {"dtype": dtype, "device": base.weight.device}
        rank, width = settings.rank, base.in_features
        self.a = nn.ParameterDict({t: nn.Parameter(torch.empty(rank, width, **like)) for t in rows})
        self.b = nn.ParameterDict(
            {t: nn.Parameter(torch.empty(stop - start, rank, **like)) for t, (start, stop) in rows.items()}
        )
        self.seeds = dict.fromkeys(rows, 0)
        self.of_swiglu, self.way = isinstance(base, SwiGLULinear), None

    def forward(self, x_TK: Tensor) -> Tensor:
        adapters = [
            Adapter(start, stop, self.a[t].to(x_TK.dtype), self.b[t].to(x_TK.dtype), self.seeds[t])
            for t, (start, stop) in self.rows.items()
        ]
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x_TK, self.weight, adapters, self.scale, dropout, self.of_swiglu, self.way)


def add_adapters(model: Mistral, settings: LoRASettings, dtype: torch.dtype = torch.float32) -> None:
    """Puts adapters, their values not yet set, in place of the targeted projections of every layer."""
    for block in model.layers:
        for group, members in GROUPS.items():
            rows = {t: _group_rows(model.arch, t) for t in members if t in settings.targets}
            if rows:
                setattr(block, group, LoRALinear(getattr(block, group), rows, settings, dtype))


def _projections(model: Mistral):
    for layer, block in enumerate(model.layers):
        for group in GROUPS:
            if isinstance(projection := getattr(block, group), LoRALinear):
                yield layer, projection


def room_for_adapters(model: Mistral) -> None:
    """Gives weights that are whole on this rank, on CUDA, room for their adapters after each row, where that is faster."""
    for _, projection in _projections(model):
        weight = projection.weight
        if not isinstance(weight, DTensor) and uses_triton(weight) and padding_pays(weight, projection.of_swiglu):
            roomy = pad_rows(weight.detach(), sum(map(len, projection.a.values()))).copy_(weight.detach())
            projection.weight, projection.way = nn.Parameter(roomy, requires_grad=False), "augmented"


def adapter_parameters(model: Mistral) -> dict[str, nn.Parameter]:
    """PEFT's tensor name -> parameter, in a fixed order."""
    return {
        f"base_model.model.model.layers.{layer}.{PEFT_NAMES[target]}.lora_{matrix}.weight": values[target]
        for layer, projection in _projections(model)
        for target in projection.rows
        for matrix, values in (("A", projection.a), ("B", projection.b))
    }


def _seed(*parts) -> int:
    """64 bits that depend on every part, the same on every machine and rank."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def init_adapters(model: Mistral, seed: int) -> None:
    """PEFT's initial values: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero. A function of seed and name
    alone, so any sharding of one model starts from the same numbers."""
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
            continue
        generator = torch.Generator().manual_seed(_seed(seed, name))
        bound = parameter.shape[1] ** -0.5
        whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        fill_rows(parameter, lambda start, stop: whole[start:stop])


def seed_dropout(model: Mistral, *parts: int) -> None:
    """Fixes the next forward's dropout masks as a function of parts (seed, step, micro-batch), layer and projection."""
    for layer, projection in _projections(model):
        if projection.dropout:
            projection.seeds = {target: _seed(*parts, layer, target) for target in projection.rows}


# ----------------------------------------------------------------------------------------------------- PEFT's files


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
    if config.get("peft_type") != "LORA":
        raise UserError(f"field peft_type is {quote(config.get('peft_type'))}; expected LORA", path=path)
    if config.get("bias", "none") != "none":
        raise UserError(f"field bias is {quote(config['bias'])}; expected none", path=path)
    for field in (
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "alora_invocation_tokens",
    ):
        if config.get(field):
            raise UserError(f"field {field} is {quote(config[field])}, which this engine does not compute", path=path)
    if config.get("init_lora_weights") not in (
        None,
        True,
        False,
        "gaussian",
        "orthogonal",
    ):  # the others change the base too
        raise UserError(
            f"field init_lora_weights is {quote(config['init_lora_weights'])}; convert it to a plain adapter with PEFT first",
            path=path,
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= LARGEST[int]:
        raise UserError(
            f"field r is {quote(rank)}; expected a positive whole number of at most {LARGEST[int]}", path=path
        )
    if type(alpha) not in (int, float) or not abs(alpha) <= LARGEST[float]:
        raise UserError(f"field lora_alpha is {quote(alpha)}; expected a number of at most {LARGEST[float]}", path=path)
    return LoRASettings(rank, alpha, _targets_in(directory), rslora=bool(config.get("use_rslora")))


def adapter_file(directory: Path) -> Path:
    """PEFT's tensor file in an adapter's directory."""
    path = find_file(directory, "adapter_model.safetensors")
    if path is None:
        raise UserError("no adapter_model.safetensors", path=directory)
    return path


def _targets_in(directory: Path) -> tuple[str, ...]:
    """The targets an adapter's tensors name: what was trained, however target_modules spells it (list or pattern)."""
    path, found = adapter_file(directory), set()
    for key in open_safetensors(path).keys():
        match = PEFT_KEY.fullmatch(key)
        if not match or match[2] not in TARGETS:
            raise UserError(f"holds {key}, which is no LoRA tensor of a Mistral projection", path=path)
        found.add(match[2])
    return tuple(t for t in TARGETS if t in found)


def open_adapter(directory: str | Path, expected: dict[str, nn.Parameter]):
    """PEFT's tensor file, opened, once it is sure to hold just the tensors of `expected` (`adapter_parameters`); errors as
    `open_exactly`."""
    return open_exactly(
        adapter_file(Path(directory)), {name: tuple(parameter.shape) for name, parameter in expected.items()}
    )


def load_adapter(model: Mistral, directory: str | Path) -> None:
    """Fills a model's adapters, sharded or not, from PEFT's file; errors as `open_adapter`."""
    parameters = adapter_parameters(model)
    file = open_adapter(directory, parameters)
    for name, parameter in parameters.items():
        rows = file.get_slice(name)
        fill_rows(parameter, lambda start, stop: rows[start:stop])
