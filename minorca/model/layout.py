"""The tensors of a Mistral network, one row each: their names here, in files and in adapters, and their shapes.

Everything that names or measures a weight reads these tables: the network, adapters, the readers and writers of
weights, the FLOP count and the export. The network stacks projections that share an input (q, k and v in one); files do
not.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from minorca.model.architecture import Architecture

# how files name tensors: Hugging Face's, Mistral's and llama.cpp's (GGUF); in this order in the tables below
Layout = Literal["huggingface", "mistral", "gguf"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_LAYERS = ("model.layers", "layers", "blk")

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
# name: the stacked projection that it is part of, and the names in files
_PROJECTIONS: dict[Target, tuple[str, tuple[str, str, str]]] = {
    "q": ("qkv", ("self_attn.q_proj", "attention.wq", "attn_q")),
    "k": ("qkv", ("self_attn.k_proj", "attention.wk", "attn_k")),
    "v": ("qkv", ("self_attn.v_proj", "attention.wv", "attn_v")),
    "o": ("o", ("self_attn.o_proj", "attention.wo", "attn_output")),
    "gate": ("gate_up", ("mlp.gate_proj", "feed_forward.w1", "ffn_gate")),
    "up": ("gate_up", ("mlp.up_proj", "feed_forward.w3", "ffn_up")),
    "down": ("down", ("mlp.down_proj", "feed_forward.w2", "ffn_down")),
}
# the projections that adapters may act on
TARGETS: tuple[Target, ...] = get_args(Target)
# the matrices of the vocabulary, of which adapters may act on or hold any
Matrix = Literal["embed", "head"]
MATRICES: tuple[Matrix, ...] = get_args(Matrix)
GROUPS = tuple(dict.fromkeys(group for group, _ in _PROJECTIONS.values()))

# module: the names in files
_LAYER_NORMS = {
    "attention_norm": ("input_layernorm", "attention_norm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
}
_OUTSIDE_LAYERS = {
    "embedding": ("model.embed_tokens", "tok_embeddings", "token_embd"),
    "norm": ("model.norm", "norm", "output_norm"),
    "head": ("lm_head", "output", "output"),
}


# matrix: its module, and PEFT's names of a low-rank update
_MATRICES: dict[Matrix, tuple[str, str, str]] = {
    "embed": ("embedding", "lora_embedding_A", "lora_embedding_B"),
    "head": ("head", "lora_A.weight", "lora_B.weight"),
}


# parts of names in files that say how a module was wrapped: by a compiler, FSDP, activation checkpointing, PEFT
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
# prefix: what stands in its place. Data parallelism, PEFT, models of text and images, models in a larger module
_PREFIXES = {
    "module.": "",
    "base_model.model.": "",
    "language_model.": "",
    "model.language_model.": "model.",
    "model.model.": "model.",
    "model.lm_head.": "lm_head.",
}


def unwrapped_name(name: str) -> str:
    """A tensor's name in files without what wrappers of the model or its modules added to it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next(filter(name.startswith, _PREFIXES), None):
        name = _PREFIXES[prefix] + name.removeprefix(prefix)
    return name


@dataclass(frozen=True)
class ProjectionSpec:
    """One projection of a layer, y [T, out] = x [T, in] W^T, as rows [start, stop) of a stacked one."""

    name: str
    group: str
    start: int
    stop: int
    in_features: int
    # the names in files, by layout
    names: tuple[str, str, str]
    # of queries and keys, whose rows have another order in Mistral's and llama.cpp's files; 0 for the other projections
    rotary_heads: int

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def huggingface_name(self) -> str:
        return self.names[0]

    @property
    def mistral_name(self) -> str:
        return self.names[1]

    def tensor_name(self, layer: int, layout: Layout) -> str:
        """The name of the weight in files."""
        index = LAYOUTS.index(layout)
        return f"{_LAYERS[index]}.{layer}.{self.names[index]}.weight"

    def mistral_lora_name(self, layer: int, matrix: str) -> str:
        """The name of the adapter's matrix "A" or "B" in mistral-finetune's files."""
        return f"layers.{layer}.{self.mistral_name}.lora_{matrix}.weight"

    def peft_name(self, layer: int, matrix: str) -> str:
        """The name of the adapter's matrix "A" or "B" in PEFT's files."""
        return f"base_model.model.model.layers.{layer}.{self.huggingface_name}.lora_{matrix}.weight"


def plain_peft_name(name: str) -> str:
    """The name that `ProjectionSpec.peft_name` or `matrix_peft_names` gives an adapter's tensor, which files may also
    call after the adapter (lora_A.default.weight) or a wrapper; other names stay as they are.
    """
    plain = unwrapped_name(name)
    if match := re.fullmatch(r"(?:model\.)?(layers\..+)\.lora_([AB])(?:\.[^.]+)?\.weight", plain):
        return f"base_model.model.model.{match[1]}.lora_{match[2]}.weight"
    if match := re.fullmatch(r"(?:model\.)?(embed_tokens|lm_head)\.(.+)", plain):
        module, part = match.groups()
        # beside trained rows, PEFT may keep the matrix that they are of
        part = "weight" if part == "token_adapter.weight" else part
        part = re.sub(r"(lora_embedding_[AB]|trainable_tokens_delta)\.[^.]+$", r"\1", part)
        part = re.sub(r"^(lora_[AB]|modules_to_save)\.[^.]+\.weight$", r"\1.weight", part)
        return f"base_model.model.{'model.' if module == 'embed_tokens' else ''}{module}.{part}"
    return name


def peft_name_of_mistral_lora(name: str) -> str | None:
    """PEFT's name of a tensor of mistral-finetune's adapters (layers.0.attention.wq.lora_A.weight); None for others."""
    match = re.fullmatch(r"(layers\.\d{1,9})\.(.+)\.lora_([AB])\.weight", name)
    names = {mistral_name: huggingface_name for _, (huggingface_name, mistral_name, _) in _PROJECTIONS.values()}
    if not match or match[2] not in names:
        return None
    return f"base_model.model.model.{match[1]}.{names[match[2]]}.lora_{match[3]}.weight"


def matrix_module(matrix: Matrix) -> str:
    """The network's module of a matrix of the vocabulary."""
    return _MATRICES[matrix][0]


def matrix_peft_names(matrix: Matrix) -> dict[str, str]:
    """The names in PEFT's files of what may be trained of it: the `whole`, some `rows`, `A` and `B` of an update."""
    module, a, b = _MATRICES[matrix]
    prefix = f"base_model.model.{_OUTSIDE_LAYERS[module][0]}"
    parts = {"whole": "weight", "rows": "token_adapter.trainable_tokens_delta", "A": a, "B": b}
    return {part: f"{prefix}.{name}" for part, name in parts.items()}


def adapted_by(peft_name: str) -> tuple[int, Target | Matrix] | None:
    """The layer and the projection whose adapter a tensor of PEFT's files belongs to, of a matrix of the vocabulary 0
    and its name; None for other tensors.
    """
    for matrix in MATRICES:
        parts = matrix_peft_names(matrix)
        if peft_name in (parts["A"], parts["B"]):
            return 0, matrix
    match = re.fullmatch(r"base_model\.model\.model\.layers\.(\d{1,9})\.(.+)\.lora_[AB]\.weight", peft_name)
    targets: dict[str, Target] = {names[0]: target for target, (_, names) in _PROJECTIONS.items()}
    return (int(match[1]), targets[match[2]]) if match and match[2] in targets else None


def module_name(layer: int, projection: Target | Matrix) -> str:
    """Hugging Face's name of a layer's projection, or of a matrix of the vocabulary."""
    if projection == "embed" or projection == "head":
        return _OUTSIDE_LAYERS[matrix_module(projection)][0]
    return f"model.layers.{layer}.{_PROJECTIONS[projection][1][0]}"


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a model's files, [rows] or [rows, columns].

    Attributes:
        rotary_heads: the number of query or key heads, where the file orders the rows of each for rotary pairs
            (2i, 2i + 1), as Mistral's and llama.cpp's do, instead of Hugging Face's (i, i + D/2); else 0.
    """

    name: str
    rows: int
    columns: int | None = None
    rotary_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows,) if self.columns is None else (self.rows, self.columns)


def projections(arch: Architecture) -> dict[str, tuple[ProjectionSpec, ...]]:
    """The stacked projections of a layer, each with its parts in order."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    attended, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    # in, out, heads with rotary embeddings
    sizes = {
        "q": (hidden, attended, arch.heads),
        "k": (hidden, kv, arch.kv_heads),
        "v": (hidden, kv, 0),
        "o": (attended, hidden, 0),
        "gate": (hidden, inner, 0),
        "up": (hidden, inner, 0),
        "down": (inner, hidden, 0),
    }
    stacked: dict[str, tuple[ProjectionSpec, ...]] = dict.fromkeys(GROUPS, ())
    for name, (group, names) in _PROJECTIONS.items():
        in_features, out_features, rotary_heads = sizes[name]
        start = stacked[group][-1].stop if stacked[group] else 0
        stop = start + out_features
        spec = ProjectionSpec(name, group, start, stop, in_features, names, rotary_heads)
        stacked[group] = (*stacked[group], spec)
    return stacked


def outside_name(module: str, layout: Layout) -> str:
    """The name of the weight of "embedding", "norm" or "head" in files."""
    return f"{_OUTSIDE_LAYERS[module][LAYOUTS.index(layout)]}.weight"


def source_tensors(arch: Architecture, layout: Layout) -> dict[str, list[SourceTensor]]:
    """Module of the network -> the tensors of the files that its weight stacks, in order."""
    index = LAYOUTS.index(layout)

    def outside(module: str, rows: int, columns: int | None = None) -> dict[str, list[SourceTensor]]:
        return {module: [SourceTensor(outside_name(module, layout), rows, columns)]}

    def norm(layer: int, module: str) -> dict[str, list[SourceTensor]]:
        name = f"{_LAYERS[index]}.{layer}.{_LAYER_NORMS[module][index]}.weight"
        return {f"layers.{layer}.{module}": [SourceTensor(name, arch.hidden_size)]}

    def stacked(layer: int, *groups: str) -> dict[str, list[SourceTensor]]:
        return {f"layers.{layer}.{group}": [projection(layer, spec) for spec in table[group]] for group in groups}

    def projection(layer: int, spec: ProjectionSpec) -> SourceTensor:
        rotary_heads = 0 if layout == "huggingface" else spec.rotary_heads
        return SourceTensor(spec.tensor_name(layer, layout), spec.out_features, spec.in_features, rotary_heads)

    table = projections(arch)
    tensors = outside("embedding", arch.vocab_size, arch.hidden_size)
    for layer in range(arch.layers):
        tensors |= norm(layer, "attention_norm") | stacked(layer, "qkv", "o")
        tensors |= norm(layer, "mlp_norm") | stacked(layer, "gate_up", "down")
    tensors |= outside("norm", arch.hidden_size)
    if not arch.tied:
        tensors |= outside("head", arch.vocab_size, arch.hidden_size)
    return tensors
