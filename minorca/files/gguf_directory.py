"""A GGUF file's metadata as a directory in Hugging Face's layout, without weights: configuration and tokenizer.

All that reads a model's directory reads a GGUF file that way. The directory is kept in the cache, under a name that
follows from what the file says.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy

from minorca.errors import UserError
from minorca.files.atomic import publish, write_files
from minorca.files.gguf import GGUF
from minorca.files.gguf_tokenizer import tokenizer_files
from minorca.files.safe_io import cache_directory, quote

# raised where other files are made of the same metadata
VERSION = 1
ARCHITECTURES = ("llama", "mistral")
_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
# metadata of the architecture that says nothing more about the network
_SILENT = ("vocab_size", "tensor_data_layout")


def gguf_directory(path: Path) -> Path:
    """The directory that a GGUF file stands for.

    Raises:
        UserError: not a whole GGUF file, or a model with another network or tokenizer than those that are read.
    """
    stat = path.stat()
    return _directory(path, (stat.st_size, stat.st_mtime_ns))


# a command asks for it several times
@functools.lru_cache(maxsize=8)
def _directory(path: Path, changed: tuple[int, int]) -> Path:
    gguf = GGUF(path)
    digest = hashlib.sha256(gguf.data[: gguf.header_bytes]).hexdigest()
    directory = cache_directory("gguf") / f"{VERSION}-{digest[:32]}"
    if directory.is_dir():
        return directory
    files = model_files(gguf)

    try:
        publish(directory, lambda temporary: write_files(temporary, files))
    except UserError:
        # another process has been faster
        if not directory.is_dir():
            raise
    return directory


def model_files(gguf: GGUF) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files, by name.

    Raises:
        UserError: as `gguf_directory`.
    """
    files = {"config.json": _config(_Metadata(gguf)), "generation_config.json": _generation_config(gguf.metadata)}
    encoded = {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in files.items()}
    has_tokenizer = gguf.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    return encoded | (tokenizer_files(gguf) if has_tokenizer else {})


class _Metadata:
    """What a file says of its network, by keys without the architecture's name; each that is read is taken away."""

    def __init__(self, gguf: GGUF):
        self.gguf = gguf
        found = gguf.metadata
        if (kind := found.get("general.type", "model")) != "model":
            self.refuse("general.type", f"is {quote(kind)}; expected a whole model: merge an adapter, and export that")
        if found.get("split.count", 1) not in (0, 1):
            message = f"is {quote(found['split.count'])}: the file is one of several; join them with llama.cpp's"
            self.refuse("split.count", f"{message} llama-gguf-split --merge")
        self.architecture = found.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            self.refuse("general.architecture", f"is {quote(self.architecture)}; expected {' or '.join(ARCHITECTURES)}")
        prefix = f"{self.architecture}."
        self.values = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise UserError(problem, path=self.gguf.path, field=key)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.values.pop(key, default)
        if value is None:
            self.refuse(f"{self.architecture}.{key}", "is missing; expected a number")
        if type(value) not in (int, float):
            self.refuse(f"{self.architecture}.{key}", f"is {quote(value)}; expected a number, the same in every layer")
        # numbers are fp32 there: 1e-05, not 9.999999747378752e-06
        return float(str(numpy.float32(value))) if isinstance(value, float) else value

    def check_rest(self) -> None:
        """Raises UserError for what a Mistral network does not have, such as experts or scaled rotary embeddings."""
        for key, value in self.values.items():
            if key not in _SILENT and value not in (0, "none"):
                self.refuse(f"{self.architecture}.{key}", f"is {quote(value)}, which a Mistral network does not have")
        for name in self.gguf.tensors:
            if name.startswith("rope_"):
                self.refuse(name, "scales the rotary embeddings, which a Mistral network does not")


def _config(metadata: _Metadata) -> dict:
    """config.json, which `read_architecture` checks further."""
    tensors = metadata.gguf.tensors
    if "token_embd.weight" not in tensors:
        metadata.refuse("token_embd.weight", "is missing; expected the tensors of a Llama or Mistral model")
    embedding = tensors["token_embd.weight"]
    heads, hidden = metadata.take("attention.head_count"), metadata.take("embedding_length")
    head_dim = metadata.take("attention.key_length", hidden // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := metadata.take(key, head_dim)) != head_dim:
            metadata.refuse(f"{metadata.architecture}.{key}", f"is {size}; the keys have {head_dim}")
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.take("feed_forward_length"),
        "num_hidden_layers": metadata.take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.take("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.take("rope.freq_base", 10000.0),
        "sliding_window": metadata.take("attention.sliding_window", 0) or None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": metadata.take("context_length", 0) or None,
        "torch_dtype": _DTYPES.get(embedding.type, "float32"),
    }
    metadata.check_rest()
    return config


def _generation_config(metadata: dict) -> dict:
    """The ids at which llama.cpp ends a generation; those that it knows by their text have no key."""
    bos, *stops = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    ids = list(dict.fromkeys(i for i in stops if type(i) is int))
    return ({"bos_token_id": bos} if type(bos) is int else {}) | ({"eos_token_id": ids} if ids else {})
