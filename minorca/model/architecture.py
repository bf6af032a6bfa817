"""What a model's files say about its network: config.json (Hugging Face) or params.json (Mistral's own).

No table of models: every constant comes from the file. What a file leaves out takes the default of the reader it was
written for, and each default taken is logged.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from minorca.errors import UserError, raise_problems
from minorca.files.gguf import is_gguf
from minorca.files.hub import local_directory
from minorca.files.safe_io import find_file, quote, read_json
from minorca.model.quantization import INSTEAD

log = logging.getLogger(__name__)

# transformers' MistralConfig and LlamaConfig, whose saved files may leave out what equals these. transformers 5 reads a
# Mistral with layer_types, and saves it, as ministral.
_MISTRAL_DEFAULTS = {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0}
HF_DEFAULTS = {
    "mistral": _MISTRAL_DEFAULTS,
    "ministral": _MISTRAL_DEFAULTS,
    "llama": {"rms_norm_eps": 1e-6, "sliding_window": None, "num_key_value_heads": None, "rope_theta": 10000.0},
}
# fields that change the network, with the only values under which it is the one in network.py; null is absent
_SILU = ("silu", "swish")
HF_REQUIRED = {
    "hidden_act": _SILU,
    "hidden_activation": _SILU,
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "attn_temperature_tuning": (False, 0),
    "llama_4_scaling": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "num_local_experts": (0, 1),
}
# the kinds of rotary scaling that leave the frequencies as they are where their factor is 1
_SCALED_BY_FACTOR = ("linear", "llama3")
LAYER_TYPES = ("sliding_attention", "full_attention")
# The largest numbers that a file may hold, far over those of any model: products of sizes must fit 64 bits, and tables
# memory.
MAX_SIZE = 2**20
MAX_NUMBER = 1e30
MAX_LAYERS = 2**12
MAX_POSITIONS = 2**31


@dataclass(frozen=True)
class Architecture:
    """The constants of one Mistral network.

    Attributes:
        window: the number of keys that a query sees, itself included; None: all.
        tied: the head is the embedding.
        max_positions: the longest sequence that the model was made for; None: its file does not say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    window: int | None
    tied: bool
    max_positions: int | None = None


def model_directory(path: str | Path, weights: bool = False) -> Path:
    """A model's directory, or an adapter's: `path`, where the files of a hub id are, or what a GGUF file stands for.

    Args:
        weights: of a hub id, the model's weights are needed too.

    Raises:
        UserError: there is none, or a hub id whose files cannot be had.
    """
    directory = local_directory(path, weights)
    if directory.is_dir():
        return directory
    if is_gguf(directory):
        # settings are read without what it imports
        from minorca.files.gguf_directory import gguf_directory

        return gguf_directory(directory)
    is_file = "is a file; expected a model's directory, or a file that ends in .gguf"
    raise UserError(is_file if directory.exists() else "no such directory", path=path)


def read_architecture(path: str | Path) -> Architecture:
    """Reads config.json, or else params.json, in a model's directory.

    Raises:
        UserError: naming the file and the field that is missing, of a wrong type, or describes another network.
    """
    directory = model_directory(path)
    if find_file(directory, "config.json"):
        fields = _Fields(directory / "config.json")
        arch = _from_huggingface(fields)
        _check_heads(arch, fields.path)
        return arch
    if find_file(directory, "params.json"):
        return read_mistral_architecture(directory / "params.json")
    found = sorted(file.name for file in directory.glob("*.gguf"))
    hint = f"give the file itself, {directory / found[0]}" if found else "is it a model's directory?"
    raise UserError(f"holds neither config.json nor params.json; {hint}", path=directory)


def read_mistral_architecture(path: Path) -> Architecture:
    """Reads a params.json; errors as `read_architecture`."""
    arch = _from_mistral(_Fields(path))
    _check_heads(arch, path)
    return arch


def _check_heads(arch: Architecture, path: Path) -> None:
    if arch.heads % arch.kv_heads or arch.head_dim % 2 or not 0 < arch.heads * arch.head_dim <= MAX_SIZE:
        raise UserError(
            f"{arch.heads} query heads, {arch.kv_heads} key/value heads of size {arch.head_dim}; expected a multiple "
            f"of the key/value heads, an even size, and a product of at most {MAX_SIZE}",
            path=path,
        )


class _Fields:
    """Typed access to one JSON file's fields; errors name file and field, and defaults that are used are logged."""

    def __init__(self, path: Path):
        self.path = path
        self.values = read_json(path)

    def integer(self, name: str, maximum: int = MAX_SIZE) -> int:
        return self._required(name, self.optional_integer(name, None, maximum), "int")

    def optional_integer(self, name: str, default: int | None, maximum: int = MAX_SIZE) -> int | None:
        value = self._value(name, default)
        if value is None:
            return None
        if type(value) is not int or not 0 < value <= maximum:
            self.refuse(name, f"expected a positive int of at most {maximum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._required(name, self._value(name, default), "float")
        if type(value) not in (int, float) or not 0 < value <= MAX_NUMBER:
            self.refuse(name, f"expected a positive float of at most {MAX_NUMBER}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._value(name, False)
        if value is not None and type(value) is not bool:
            self.refuse(name, "expected bool")
        return bool(value)

    def _value(self, name: str, default):
        if self.values.get(name) is not None:
            return self.values[name]
        if default is not None:
            log.info("%s: no %s; using the default of the format, %s", self.path, name, default)
        return default

    def _required(self, name: str, value, kind: str):
        if value is None:
            raise UserError(f"is missing; expected {kind}", path=self.path, field=name)
        return value

    def refuse(self, name: str, expected: str) -> NoReturn:
        raise UserError(f"is {quote(self.values[name])}; {expected}", path=self.path, field=name)


def _from_huggingface(fields: _Fields) -> Architecture:
    values = fields.values
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in HF_DEFAULTS:
        message = f"is {quote(kind)}; expected mistral, or llama, which is supported where it is the same network"
        raise UserError(message, path=fields.path, field="model_type")
    defaults = HF_DEFAULTS[kind]
    raise_problems(
        UserError(
            f"is {quote(values[name])}; a Mistral network has {' or '.join(map(repr, right)) or 'none'}",
            path=fields.path,
            field=name,
        )
        for name, right in HF_REQUIRED.items()
        if values.get(name) is not None and values[name] not in right
    )
    if values.get("quantization_config") is not None:
        _check_quantization(fields)
    attention = _attention_type(fields)
    values["rope_theta"] = _rope_theta(fields, attention)
    # null is a value here: no window, and as many key/value heads as query heads
    default_window, default_kv_heads = (
        None if name in values else defaults[name] for name in ("sliding_window", "num_key_value_heads")
    )
    window = fields.optional_integer("sliding_window", default_window, MAX_POSITIONS)
    if kind == "llama" or attention == "full_attention":
        window = None

    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    return Architecture(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers", MAX_LAYERS),
        heads=heads,
        kv_heads=fields.optional_integer("num_key_value_heads", default_kv_heads) or heads,
        head_dim=fields.optional_integer("head_dim", None) or hidden // heads,
        norm_eps=fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=fields.number("rope_theta", defaults["rope_theta"]),
        window=window,
        tied=fields.flag("tie_word_embeddings"),
        max_positions=fields.optional_integer("max_position_embeddings", None, MAX_POSITIONS),
    )


def _check_quantization(fields: _Fields) -> None:
    """Raises UserError unless quantization_config is that of weights in bitsandbytes' NF4."""
    settings = fields.values["quantization_config"]
    if not isinstance(settings, dict):
        fields.refuse("quantization_config", f"expected an object; {INSTEAD}")
    # what transformers' BitsAndBytesConfig takes for a field that is absent, and what is supported
    supported = {
        "quant_method": ("bitsandbytes", "bitsandbytes"),
        "load_in_4bit": (False, True),
        "bnb_4bit_quant_type": ("fp4", "nf4"),
        "bnb_4bit_quant_storage": ("uint8", "uint8"),
    }
    for name, (default, right) in supported.items():
        value = default if settings.get(name) is None else settings[name]
        if value != right:
            raise UserError(
                f"has {name} {quote(value)}; of quantized weights, bitsandbytes' nf4 is supported, with {name} "
                f"{right!r}; {INSTEAD}",
                path=fields.path,
                field="quantization_config",
            )


def _attention_type(fields: _Fields) -> str | None:
    """sliding_attention or full_attention, in every layer; None where the file does not say."""
    types = fields.values.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or not types or any(one != types[0] for one in types) or types[0] not in LAYER_TYPES:
        fields.refuse("layer_types", f"expected the same in every layer: {' or '.join(LAYER_TYPES)}")
    return types[0]


def _rope_theta(fields: _Fields, attention: str | None) -> float | None:
    """The base of the rotary embeddings, wherever the file gives it; None where it does not.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters object, which may hold an
    object for each type of layer.
    """
    values = fields.values
    found = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict):
            fields.refuse(name, "expected an object")
        by_type = {f"{name}.{kind}": rope[kind] for kind in LAYER_TYPES if kind in rope}
        if attention and by_type:
            by_type = {f"{name}.{attention}": rope.get(attention)}
        for place, settings in (by_type or {name: rope}).items():
            if not isinstance(settings, dict) or not _is_plain(settings):
                fields.refuse(name, "expected plain rotary embeddings (rope_type default), the same in every layer")
            found[f"{place}.rope_theta"] = settings.get("rope_theta")
    found = {place: theta for place, theta in found.items() if theta is not None}
    if any(theta != next(iter(found.values())) for theta in found.values()):
        message = ", ".join(f"{place} {quote(theta)}" for place, theta in found.items())
        # transformers 4 reads the first of the two, transformers 5 the second
        raise UserError(f"gives different bases of rotary embeddings ({message}); keep the right one", path=fields.path)
    return next(iter(found.values()), None)


def _is_plain(rope: dict) -> bool:
    """Whether rotary settings change nothing beside the base."""
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type"))
    if rope.get("partial_rotary_factor", 1) != 1 or "llama_4_scaling_beta" in rope:
        return False
    # without a kind, a factor has no meaning that all readers share
    return kind == "default" or (kind in (None, *_SCALED_BY_FACTOR) and rope.get("factor", 1) == 1)


def _from_mistral(fields: _Fields) -> Architecture:
    values = fields.values
    for name in ("moe", "vision_encoder", "multimodal", "quantization", "yarn", "llama_4_scaling", "use_biases"):
        if values.get(name) not in (None, False):
            fields.refuse(name, "a dense Mistral text model has none")
    # an int, a string of one, or a list of equal ones (mistral-inference)
    for key in ("sliding_window", "_sliding_window"):
        window = values.get(key)
        if window is not None:
            windows = window if isinstance(window, list) else [window]
            same = {str(w) if isinstance(w, int | str) else "" for w in windows}
            text = same.pop() if len(same) == 1 else ""
            if not text.isdecimal() or len(text) > 20:
                fields.refuse(key, "expected one integer, the same in every layer")
            values["sliding_window"] = int(text)
            break
    window = fields.optional_integer("sliding_window", None, MAX_POSITIONS)
    heads = fields.integer("n_heads")
    hidden = fields.integer("dim")
    return Architecture(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("hidden_dim"),
        layers=fields.integer("n_layers", MAX_LAYERS),
        heads=heads,
        kv_heads=fields.optional_integer("n_kv_heads", None) or heads,
        head_dim=fields.optional_integer("head_dim", None) or hidden // heads,
        norm_eps=fields.number("norm_eps"),
        # v0.1 (window 4096) was trained with 1e4 and v0.2 (no window) with 1e6, and neither file says so
        rope_theta=fields.number("rope_theta", 1e6 if window is None else 1e4),
        window=window,
        tied=fields.flag("tied_embeddings"),
        max_positions=fields.optional_integer("max_position_embeddings", None, MAX_POSITIONS),
    )
