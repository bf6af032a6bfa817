"""What a model's files say about its network: config.json (Hugging Face) or params.json (Mistral's own).

No table of models: every constant comes from the file. What a file leaves out takes the default of the reader it was
written for, and each default taken is logged.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json

log = logging.getLogger(__name__)

# transformers' MistralConfig and LlamaConfig, whose saved files may leave out what equals these
HF_DEFAULTS = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0},
    "llama": {"rms_norm_eps": 1e-6, "sliding_window": None, "num_key_value_heads": None, "rope_theta": 10000.0},
}
# fields that change the network, with the only values under which it is the one in network.py
HF_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
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


def model_directory(path: str | Path) -> Path:
    """`path` as a directory that exists; a hub id gets the command that downloads it."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError("is a file; expected a model's directory", path=path)
    hint = ""
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        name = str(path).split("/")[1]
        download = f"hf download {path} --local-dir {name}"
        hint = f"; if it is a hub id, download it first: {download}, then give --model.path or --model {name}"
    raise UserError(f"no such directory{hint}", path=path)


def read_architecture(path: str | Path) -> Architecture:
    """Reads config.json, or else params.json, in a model's directory.

    Raises:
        UserError: naming the file and the field that is missing, of a wrong type, or describes another network.
    """
    directory = model_directory(path)
    for name, parse in (("config.json", _from_huggingface), ("params.json", _from_mistral)):
        if find_file(directory, name):
            fields = _Fields(directory / name)
            arch = parse(fields)
            _check_heads(arch, fields.path)
            return arch
    raise UserError("holds neither config.json nor params.json; is it a model's directory?", path=directory)


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
        if name in self.values:
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
    for name, right in HF_REQUIRED.items():
        if values.get(name) is not None and values[name] != right:
            fields.refuse(name, f"a Mistral network has {right!r}")
    if values.get("quantization_config") is not None:
        fields.refuse("quantization_config", "expected unquantized weights")
    attention = _attention_type(fields)

    # transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters object
    for name in ("rope_scaling", "rope_parameters"):
        scaling = values.get(name) or {}
        if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
            fields.refuse(name, "expected plain rotary embeddings (rope_type default)")
    theta = (values.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        values["rope_theta"] = theta
    default_window = None if "sliding_window" in values else defaults["sliding_window"]
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
        kv_heads=fields.optional_integer("num_key_value_heads", defaults["num_key_value_heads"]) or heads,
        head_dim=fields.optional_integer("head_dim", None) or hidden // heads,
        norm_eps=fields.number("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=fields.number("rope_theta", defaults["rope_theta"]),
        window=window,
        tied=fields.flag("tie_word_embeddings"),
        max_positions=fields.optional_integer("max_position_embeddings", None, MAX_POSITIONS),
    )


def _attention_type(fields: _Fields) -> str:
    """sliding_attention or full_attention, in every layer."""
    types = fields.values.get("layer_types") or ["sliding_attention"]
    supported = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or any(one != types[0] for one in types) or types[0] not in supported:
        fields.refuse("layer_types", f"expected the same in every layer: {' or '.join(supported)}")
    return types[0]


def _from_mistral(fields: _Fields) -> Architecture:
    values = fields.values
    for name in ("moe", "vision_encoder", "quantization", "yarn", "llama_4_scaling"):
        if values.get(name) is not None:
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
