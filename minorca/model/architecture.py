"""What a model's files say about its network: config.json (Hugging Face) or params.json (Mistral's own).

No table of models: every constant comes from the file. What a file leaves out takes the default of the reader it was
written for, and each default taken is logged.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from minorca.errors import UserError
from minorca.files.safe_io import find_file, quote, read_json

log = logging.getLogger(__name__)

# transformers' MistralConfig and LlamaConfig, whose saved files may leave out what equals these
HF_DEFAULTS = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0},
    "llama": {"rms_norm_eps": 1e-6, "sliding_window": None, "num_key_value_heads": None, "rope_theta": 10000.0},
}
# fields that change the network, with the only values under which it is the one in model.py
HF_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
# What a stranger's file may ask for, tens of times what any model does: sizes whose products fit 64 bits, and tables in memory.
LARGEST = {int: 2**20, float: 1e30}
LAYERS, POSITIONS = 2**12, 2**31


@dataclass(frozen=True)
class Architecture:
    """The constants of one Mistral network."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    window: int | None  # keys a query sees, itself included; None: all
    tied: bool  # the head is the embedding
    max_positions: int | None = None  # what the model was made for; None: its file does not say


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
        hint = f"; if it is a hub id, download it first: hf download {path} --local-dir {name}, then give --model.path or --model {name}"
    raise UserError(f"no such directory{hint}", path=path)


def read_architecture(path: str | Path) -> Architecture:
    """Reads config.json, or else params.json, in a model's directory.

    Raises:
        UserError: naming the file and the field that is missing, mistyped, or describes another network.
    """
    directory = model_directory(path)
    for name, parse in (("config.json", _from_hf), ("params.json", _from_mistral)):
        if find_file(directory, name):
            fields = _Fields(directory / name)
            arch = parse(fields)
            if arch.heads % arch.kv_heads or arch.head_dim % 2 or not 0 < arch.heads * arch.head_dim <= LARGEST[int]:
                heads = f"{arch.heads} query heads over {arch.kv_heads} key heads of size {arch.head_dim}"
                whole = f"together at most {LARGEST[int]}"
                raise UserError(
                    f"{heads}; expected a multiple of the key heads, and an even size, {whole}", path=fields.path
                )
            return arch
    raise UserError("holds neither config.json nor params.json; is it a model's directory?", path=directory)


class _Fields:
    """Typed access to one JSON file's fields; complaints name file and field."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

    def get(self, name: str, kind: type, most: float | None = None, **default):
        value = self.values.get(name, default.get("default"))
        if value is None:
            if "default" not in default:
                raise UserError(f"field {name} is missing; expected {kind.__name__}", path=self.path)
            return None
        if name not in self.values:
            log.info("%s: no %s; using the default of the format, %s", self.path, name, value)
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if kind is not bool and right:
            right = 0 < value <= (most or LARGEST[kind])
        if not right:
            expected = "bool" if kind is bool else f"a positive {kind.__name__} of at most {most or LARGEST[kind]}"
            raise UserError(f"field {name} is {quote(value)}; expected {expected}", path=self.path)
        return kind(value)

    def refuse(self, name: str, why: str):
        raise UserError(f"field {name} is {quote(self.values[name])}; {why}", path=self.path)


def _from_hf(fields: _Fields) -> Architecture:
    values = fields.values
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in HF_DEFAULTS:
        raise UserError(
            f"field model_type is {quote(kind)}; this engine runs mistral, and llama where it is the same network",
            path=fields.path,
        )
    defaults = HF_DEFAULTS[kind]
    for name, right in HF_REQUIRED.items():
        if values.get(name) is not None and values[name] != right:
            fields.refuse(name, f"a Mistral network has {right!r}")
    if values.get("quantization_config") is not None:
        fields.refuse("quantization_config", "expected unquantised weights")
    types = values.get("layer_types") or ["sliding_attention"]
    if (
        not isinstance(types, list)
        or any(one != types[0] for one in types)
        or types[0] not in ("sliding_attention", "full_attention")
    ):
        fields.refuse(
            "layer_types",
            "a Mistral network has the same attention in every layer, sliding_attention or full_attention",
        )

    # transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters object
    for name in ("rope_scaling", "rope_parameters"):
        scaling = values.get(name) or {}
        if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
            fields.refuse(name, "expected plain rotary embeddings (rope_type default)")
    theta = (values.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        values["rope_theta"] = theta
    window = fields.get(
        "sliding_window", int, POSITIONS, default=None if "sliding_window" in values else defaults["sliding_window"]
    )
    if kind == "llama" or types[0] == "full_attention":
        window = None

    heads, hidden = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    return Architecture(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size", int),
        layers=fields.get("num_hidden_layers", int, LAYERS),
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", int, default=defaults["num_key_value_heads"]) or heads,
        head_dim=fields.get("head_dim", int, default=None) or hidden // heads,
        norm_eps=fields.get("rms_norm_eps", float, default=defaults["rms_norm_eps"]),
        rope_theta=fields.get("rope_theta", float, default=defaults["rope_theta"]),
        window=window,
        tied=bool(fields.get("tie_word_embeddings", bool, default=False)),
        max_positions=fields.get("max_position_embeddings", int, POSITIONS, default=None),
    )


def _from_mistral(fields: _Fields) -> Architecture:
    values = fields.values
    for name in ("moe", "vision_encoder", "quantization", "yarn", "llama_4_scaling"):
        if values.get(name) is not None:
            fields.refuse(name, "a dense Mistral text model has none")
    for key in (
        "sliding_window",
        "_sliding_window",
    ):  # an int, a string of one, or a list of equal ones (mistral-inference)
        window = values.get(key)
        if window is not None:
            same = {
                str(w) if isinstance(w, int | str) else "" for w in (window if isinstance(window, list) else [window])
            }
            if len(same) != 1 or not next(iter(same)).isdecimal() or len(next(iter(same))) > 20:
                fields.refuse(key, "expected one whole number, the same in every layer")
            values["sliding_window"] = int(same.pop())
            break
    window = fields.get("sliding_window", int, POSITIONS, default=None)
    return Architecture(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=fields.get("dim", int),
        intermediate_size=fields.get("hidden_dim", int),
        layers=fields.get("n_layers", int, LAYERS),
        heads=fields.get("n_heads", int),
        kv_heads=fields.get("n_kv_heads", int, default=None) or fields.get("n_heads", int),
        head_dim=fields.get("head_dim", int, default=None) or fields.get("dim", int) // fields.get("n_heads", int),
        norm_eps=fields.get("norm_eps", float),
        # v0.1 (window 4096) was trained with 1e4 and v0.2 (no window) with 1e6, and neither file says so
        rope_theta=fields.get("rope_theta", float, default=1e6 if window is None else 1e4),
        window=window,
        tied=bool(fields.get("tied_embeddings", bool, default=False)),
        max_positions=fields.get("max_position_embeddings", int, POSITIONS, default=None),
    )
