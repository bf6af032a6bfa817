"""Every layout of weights gives the same numbers, and errors in files name the file and the key."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from minorca import UserError, load_model
from minorca.files import weights
from minorca.model.architecture import Architecture, read_architecture
from minorca.model.build import build_model
from minorca.model.layout import source_tensors
from tests.helpers import random_mistral, relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(0))
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))


def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, dtype, "cpu")(TOKENS)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes) -> None:
    """Sets fields of a JSON file; a value of ... removes the field."""
    values = read(path) | changes
    write(path, {key: value for key, value in values.items() if value is not ...})


# ----------------------------------------------------------------------------------------- layouts, against one another


def as_bin(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def as_bin_shards(directory: Path) -> None:
    """As written by transformers 4, for example those of Mistral-7B-OpenOrca."""
    tensors = load_file(directory / "model.safetensors")
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write(directory / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    (directory / "model.safetensors").unlink()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in Mistral's order, from Hugging Face's.

    The inverse of transformers' conversion script: w.view(heads, size / 2, 2, columns).transpose(1, 2).
    """
    size = len(weight) // heads
    order = [
        head * size + pair + half * (size // 2) for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def as_consolidated(directory: Path, dtype: torch.dtype = torch.float32, **params) -> None:
    """Mistral's own layout from Hugging Face's; `params` are fields of params.json (... removes one)."""
    config = read(directory / "config.json")
    tensors = load_file(directory / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    native = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    if "lm_head.weight" in tensors:
        native["output.weight"] = tensors["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        native |= {
            f"{ours}.attention.wq.weight": interleaved(tensors[f"{theirs}.self_attn.q_proj.weight"], heads),
            f"{ours}.attention.wk.weight": interleaved(tensors[f"{theirs}.self_attn.k_proj.weight"], kv_heads),
            f"{ours}.attention.wv.weight": tensors[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attention.wo.weight": tensors[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.feed_forward.w1.weight": tensors[f"{theirs}.mlp.gate_proj.weight"],
            f"{ours}.feed_forward.w2.weight": tensors[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.feed_forward.w3.weight": tensors[f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.attention_norm.weight": tensors[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": tensors[f"{theirs}.post_attention_layernorm.weight"],
        }
    fields = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "sliding_window": config["sliding_window"],
        "tied_embeddings": config["tie_word_embeddings"],
    }
    write(directory / "params.json", fields)
    edit(directory / "params.json", **params)
    native = {name: tensor.to(dtype).contiguous() for name, tensor in native.items()}
    save_file(native, directory / "consolidated.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "config.json").unlink()


def as_hub_cache(directory: Path) -> None:
    """As in Hugging Face's cache: a directory of symbolic links into ../../blobs."""
    blobs = directory.parent / "models--cache" / "blobs"
    snapshot = directory.parent / "models--cache" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    directory.rmdir()
    directory.symlink_to(snapshot)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [as_bin, as_bin_shards, as_consolidated, as_hub_cache])
def test_every_layout_is_the_same_model(layout, tied, save_mistral):
    """Logits are bit-identical to those from plain safetensors; a wrong permutation of q or k would change them."""
    directory, _ = save_mistral(sliding_window=9, tie_word_embeddings=tied)
    expected = logits(directory)
    layout(directory)
    assert torch.equal(logits(directory), expected)


@pytest.mark.parametrize("shard_size", ["20KB", "60KB"])
def test_shards_with_an_index(shard_size, save_mistral):
    directory, _ = save_mistral()
    sharded, _ = save_mistral(shard_size=shard_size)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(sharded), logits(directory))


def test_a_head_saved_beside_the_embedding_it_is_tied_to(save_mistral):
    """.bin files of tied models contain both names; their tensors must be equal."""
    directory, _ = save_mistral(tie_word_embeddings=True)
    expected = logits(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert torch.equal(logits(directory), expected)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match=f"{file}: lm_head.weight differs from model.embed_tokens.weight"):
        logits(directory)


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_files_of_any_float_type_are_rounded_once(held, loaded, save_mistral, tmp_path):
    directory, theirs = save_mistral()
    theirs.to(held).save_pretrained(directory)
    theirs.to(loaded).save_pretrained(tmp_path / "rounded")
    found = logits(directory, loaded)
    assert found.dtype == loaded and torch.equal(found, logits(tmp_path / "rounded", loaded))


@pytest.mark.parametrize("layout", [None, as_consolidated], ids=["hf", "consolidated"])
def test_ranks_copy_their_own_rows_in_blocks(layout, save_mistral, monkeypatch):
    """The shards of five ranks make up the whole, though shards and blocks end within heads and tensors."""
    monkeypatch.setattr(weights, "BLOCK_ROWS", 7)
    directory, theirs = save_mistral(vocab_size=129)
    if layout:
        layout(directory)
    arch = read_architecture(directory)
    shards = []

    def shard(_, module, mesh):
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, torch.nn.Parameter(own, requires_grad=False))

    def local(parameter: torch.Tensor) -> torch.Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.to_local()

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    try:
        for place in range(5):
            # this process, rank 0, at that place of the mesh
            mesh = DeviceMesh("cpu", torch.arange(5).roll(place))
            model = distribute_module(build_model(arch, torch.float32), mesh, shard)
            weights.load_weights(model.to_empty(device="cpu"), weights.open_model(directory))
            shards.append({name: local(parameter) for name, parameter in model.named_parameters()})
    finally:
        dist.destroy_process_group()
    for module, tensors in source_tensors(arch, "huggingface").items():
        whole = torch.cat([theirs.state_dict()[tensor.name] for tensor in tensors])
        name = next(name for name in (f"{module}.base.weight", f"{module}.weight") if name in shards[0])
        assert torch.equal(torch.cat([shard[name] for shard in shards]), whole), name


SAMPLED_LOAD = """
import logging, sys, threading, torch
from minorca import load_model

def anonymous() -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
before, seen, done = anonymous(), [], threading.Event()
sampler = threading.Thread(target=lambda: [seen.append(anonymous()) for _ in iter(lambda: done.wait(0.0005), True)])
sampler.start()
model = load_model(sys.argv[1], torch.bfloat16, "cpu")
done.set()
sampler.join()
print(max(seen) - before, sum(p.nbytes for p in model.parameters()), len(seen))
"""


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_loading_takes_the_memory_of_the_model_alone(layout, tmp_path):
    """And logs its speed. Of 236 MB, one stacked projection is more than half: a second copy of it would be noticed."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    config_directory(tmp_path, MISTRAL | sizes | {"vocab_size": 128, "head_dim": 64})
    arch = read_architecture(tmp_path)
    header, size = {}, 0
    for tensors in source_tensors(arch, "mistral" if layout == "native" else "huggingface").values():
        for tensor in tensors:
            end = size + 2 * torch.Size(tensor.shape).numel()
            header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [size, end]}
            size = end
    text = json.dumps(header).encode()
    with (tmp_path / ("consolidated.safetensors" if layout == "native" else FILE)).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # a sparse file of zeros
        file.truncate(8 + len(text) + size)

    command = [sys.executable, "-c", SAMPLED_LOAD, tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    logged, figures = output.splitlines()
    peak, model, samples = map(int, figures.split())
    assert model == size and samples > 10 and model * 0.95 < peak < model * 1.15
    found = re.fullmatch(r"minorca.files.weights model: (\S+) GB in (\S+) s, (\S+) GB/s", logged)
    assert found, logged
    gigabytes, seconds, speed = map(float, found.groups())
    assert gigabytes == round(size / 1e9, 2)
    # both are rounded
    assert size / 1e9 / (speed + 0.06) <= seconds + 0.006
    assert (speed - 0.06) * (seconds - 0.006) <= size / 1e9


# ------------------------------------------------------------------------------------------------------- configurations

# config.json of Mistral-7B-v0.1
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
LATER = {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}
NEMO = LATER | {
    "head_dim": 128,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
    "max_position_embeddings": 128000,
}
# config.json of SmolLM2-135M
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
# params.json of Mistral-7B-v0.3
PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
}
V01 = Architecture(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e4, 4096, False, 32768)
V02 = Architecture(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e6, None, False, 32768)
V03 = Architecture(32768, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e6, None, False, 32768)
# as transformers 5 writes it
PLAIN = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
KNOWN = {
    "v0.1": (MISTRAL, V01),
    "v0.1 by transformers 5": (MISTRAL | PLAIN, V01),
    "v0.1 by transformers 4": (MISTRAL | {"rope_scaling": None, "head_dim": None}, V01),
    "v0.2": (MISTRAL | LATER, V02),
    "v0.3": (MISTRAL | LATER | {"vocab_size": 32768}, V03),
    "OpenOrca": (
        MISTRAL | {"vocab_size": 32002, "eos_token_id": 32000},
        Architecture(32002, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e4, 4096, False, 32768),
    ),
    "Nemo": (MISTRAL | NEMO, Architecture(131072, 5120, 14336, 40, 32, 8, 128, 1e-5, 1e6, None, False, 128000)),
    "SmolLM2": (SMOLLM2, Architecture(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, None, True, 8192)),
}


def config_directory(directory: Path, values: dict, name: str = "config.json") -> Path:
    write(directory / name, {key: value for key, value in values.items() if value is not ...})
    return directory


@pytest.mark.parametrize("name", KNOWN)
def test_configurations_of_known_models(name, tmp_path):
    values, expected = KNOWN[name]
    assert read_architecture(config_directory(tmp_path, values)) == expected


@pytest.mark.parametrize(
    "changes, theta, window",
    [
        ({}, 1e6, None),
        # the files of v0.2 and v0.1 have no rope_theta
        ({"rope_theta": ...}, 1e6, None),
        ({"rope_theta": ..., "sliding_window": 4096}, 1e4, 4096),
        ({"sliding_window": "4096"}, 1e6, 4096),
        ({"sliding_window": [4096] * 32}, 1e6, 4096),
        ({"_sliding_window": 1024}, 1e6, 1024),
        ({"sliding_window": None, "_sliding_window": None, "moe": None}, 1e6, None),
    ],
    ids=str,
)
def test_configurations_in_mistrals_layout(changes, theta, window, tmp_path):
    directory = config_directory(tmp_path, PARAMS | changes, "params.json")
    assert read_architecture(directory) == Architecture(32768, 4096, 14336, 32, 32, 8, 128, 1e-5, theta, window, False)


def test_both_spellings_of_rope_give_the_same_logits(save_mistral):
    """transformers 5 writes rope_parameters, 4 wrote rope_theta; theta differs from the default."""
    directory, _ = save_mistral(rope_theta=123456.0)
    expected = logits(directory)
    assert read(directory / "config.json")["rope_parameters"]["rope_theta"] == 123456.0
    edit(directory / "config.json", rope_parameters=..., rope_theta=123456.0, rope_scaling=None)
    assert torch.equal(logits(directory), expected)
    edit(directory / "config.json", rope_theta=...)
    assert not torch.equal(logits(directory), expected)


def test_a_llama_of_the_same_shape_is_the_same_network(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_error(logits(tmp_path), theirs(TOKENS[None]).logits[0]) <= 1e-5


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "NaN"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 5}, "32 query heads, 5 key/value heads"),
        ({"head_dim": 127}, "of size 127"),
    ],
    ids=str,
)
def test_another_network_is_refused_by_its_field(changes, field, tmp_path):
    config_directory(tmp_path, MISTRAL | changes)
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json: .*{field}"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"moe": {"num_experts_per_tok": 2, "num_experts": 8}}, "moe"),
        ({"vision_encoder": {"hidden_size": 1024}}, "vision_encoder"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"sliding_window": [4096, 1024]}, "sliding_window"),
        ({"sliding_window": []}, "sliding_window"),
        ({"sliding_window": "all"}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"norm_eps": ...}, "norm_eps"),
        ({"n_layers": 32.0}, "n_layers is 32.0; expected a positive int"),
        ({"n_kv_heads": 7}, "32 query heads, 7 key/value heads"),
    ],
    ids=str,
)
def test_another_network_in_mistrals_layout_is_refused_by_its_field(changes, field, tmp_path):
    config_directory(tmp_path, PARAMS | changes, "params.json")
    with pytest.raises(UserError, match=f"^{tmp_path}/params.json: .*{field}"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"a": 1,\n"b": }', "line 2: not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        (b"\xff\xfe", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "cannot be read"),
    ],
    ids=["syntax", "list", "bytes", "deep", "long number"],
)
def test_a_configuration_that_is_no_json_object(text, complaint, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json.*{complaint}"):
        read_architecture(tmp_path)


# ---------------------------------------------------------------------------------------------------------- bad weights


def set_tensor(name: str, change):
    """An edit of model.safetensors: replaces a tensor by `change(tensor or None)`; None removes it."""

    def apply(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors.get(name))
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)

    return apply


def set_bytes(change, convert=lambda directory: None, file: str = "model.safetensors"):
    def apply(directory: Path) -> None:
        convert(directory)
        (directory / file).write_bytes(change((directory / file).read_bytes()))

    return apply


def in_bin(apply):
    def converted(directory: Path) -> None:
        apply(directory)
        as_bin(directory)

    return converted


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_last_row(tensor):
    return tensor[:-1].clone()


def as_integers(tensor):
    return tensor.to(torch.int8)


def as_fp8(tensor):
    return tensor.to(torch.float8_e4m3fn)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4943162336\n"
FILE, BIN, NORM = "model.safetensors", "pytorch_model.bin", "model.norm.weight"
EXTRA, BIAS = "model.layers.2.mlp.extra.weight", "model.layers.0.self_attn.q_proj.bias"
BAD_WEIGHTS = {
    "missing tensor": (set_tensor(Q1, lambda t: None), "", Q1),
    "unexpected tensor": (set_tensor(EXTRA, lambda t: torch.ones(3)), FILE, EXTRA),
    "a bias": (set_tensor(BIAS, lambda t: torch.ones(64)), FILE, BIAS),
    "wrong shape": (set_tensor(Q0, without_last_row), FILE, rf"{Q0} has shape \[63, 64\]; .*\[64, 64\]"),
    "a vector for a matrix": (set_tensor(Q0, lambda t: t[0].clone()), FILE, rf"{Q0} has shape \[64\]; .*\[64, 64\]"),
    "integers": (set_tensor(Q0, as_integers), FILE, f"{Q0} is I8"),
    "fp8": (set_tensor(Q0, as_fp8), FILE, f"{Q0} is F8_E4M3"),
    "truncated": (set_bytes(truncated), FILE, "not a whole safetensors file"),
    "cut by a byte": (set_bytes(lambda data: data[:-1]), FILE, "not a whole safetensors file"),
    "empty": (set_bytes(lambda data: b""), FILE, "not a whole safetensors file"),
    "pointer": (set_bytes(lambda data: LFS), FILE, "Git LFS pointer"),
    "page": (set_bytes(lambda data: b"\n<!DOCTYPE html><html>404</html>"), FILE, "is a web page"),
    "bin: missing tensor": (in_bin(set_tensor(NORM, lambda t: None)), "", NORM),
    "bin: wrong shape": (in_bin(set_tensor(Q0, without_last_row)), BIN, rf"{Q0} has shape \[63, 64\]"),
    "bin: integers": (in_bin(set_tensor(Q0, as_integers)), BIN, f"{Q0} is torch.int8"),
    "bin: fp8": (in_bin(set_tensor(Q0, as_fp8)), BIN, f"{Q0} is torch.float8_e4m3fn"),
    "bin: truncated": (set_bytes(truncated, as_bin, BIN), BIN, "cannot be read"),
    "bin: empty": (set_bytes(lambda data: b"", as_bin, BIN), BIN, "cannot be read"),
    "bin: pointer": (set_bytes(lambda data: LFS, as_bin, BIN), BIN, "Git LFS pointer"),
    "bin: page": (set_bytes(lambda data: b"<html></html>", as_bin, BIN), BIN, "is a web page"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_by_file_and_key(name, save_mistral):
    break_it, file, complaint = BAD_WEIGHTS[name]
    directory, _ = save_mistral()
    break_it(directory)
    with pytest.raises(UserError, match=f"^{directory / file}: .*{complaint}"):
        logits(directory)


def index_of(change):
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        write(path, change(read(path)))

    return apply


def pointing(name: str, file):
    return index_of(lambda index: index | {"weight_map": index["weight_map"] | {name: file}})


def stray_duplicate(directory: Path) -> None:
    """Another shard contains a tensor a second time, with other values."""
    shards = sorted(directory.glob("model-*.safetensors"))
    holder = directory / read(directory / "model.safetensors.index.json")["weight_map"][Q0]
    other = next(shard for shard in shards if shard != holder)
    save_file(load_file(other) | {Q0: torch.zeros(64, 64)}, other)


def not_in_the_index(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    weight_map = read(path)["weight_map"]
    del weight_map[Q0]
    write(path, {"weight_map": weight_map})


def missing_shard(directory: Path) -> None:
    next(directory.glob("model-00002-of-*.safetensors")).unlink()


def truncated_shard(directory: Path) -> None:
    shard = next(directory.glob("model-00002-of-*.safetensors"))
    shard.write_bytes(truncated(shard.read_bytes()))


INDEX, SHARD = "model.safetensors.index.json", r"model-0000\d-of-0000\d.safetensors"
BAD_INDICES = {
    "parent directory": (pointing(Q0, "../weights.safetensors"), INDEX, "'../weights.safetensors'"),
    "absolute path": (pointing(Q0, "/etc/hostname"), INDEX, "'/etc/hostname'"),
    "deeper directory": (pointing(Q0, "sub/weights.safetensors"), INDEX, "'sub/weights.safetensors'"),
    "dots": (pointing(Q0, ".."), INDEX, r"'\.\.'"),
    "zero byte": (pointing(Q0, "a\0b"), INDEX, r"'a\\x00b'"),
    "not text": (pointing(Q0, 3), INDEX, "the file 3"),
    "missing file": (pointing(Q0, "model-9.safetensors"), INDEX, "model-9.safetensors, which is not in"),
    "key that no file contains": (pointing(EXTRA, "model-00001-of-00006.safetensors"), SHARD, EXTRA),
    "no map": (index_of(lambda index: {"metadata": {}}), INDEX, "weight_map"),
    "map of another kind": (index_of(lambda index: {"weight_map": [Q0]}), INDEX, "weight_map"),
    "stray duplicate": (stray_duplicate, SHARD, f"duplicate tensor {Q0}, which is also in {SHARD}"),
    "tensor the index leaves out": (not_in_the_index, SHARD, f"{Q0}, which the index does not name"),
    "missing shard": (missing_shard, INDEX, "names the file model-00002-of-.*, which is not in"),
    "truncated shard": (truncated_shard, SHARD, "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_indices_are_refused_by_file_and_key(name, save_mistral):
    break_it, file, complaint = BAD_INDICES[name]
    directory, _ = save_mistral(shard_size="60KB")
    assert len(list(directory.glob("model-*-of-00006.safetensors"))) == 6
    break_it(directory)
    with pytest.raises(UserError, match=f"^{directory}/{file}: .*{complaint}"):
        logits(directory)


def test_an_index_that_names_the_wrong_shard(save_mistral):
    directory, _ = save_mistral(shard_size="60KB")
    weight_map = read(directory / INDEX)["weight_map"]
    wrong = next(file for file in weight_map.values() if file != weight_map[Q0])
    pointing(Q0, wrong)(directory)
    with pytest.raises(UserError, match=f"^{directory / wrong}: missing tensor {Q0}"):
        logits(directory)


class Malicious:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_bin_does_not_run(old_format, save_mistral, tmp_path):
    directory, _ = save_mistral()
    tensors = load_file(directory / "model.safetensors")
    as_bin(directory)
    malicious = tensors | {Q0: Malicious(tmp_path / "ran")}
    torch.save(malicious, directory / BIN, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match=f"^{directory / BIN}: cannot be read") as caught:
        logits(directory)
    assert not (tmp_path / "ran").exists()
    # torch's own message advises how to run it
    assert not re.search("weights_only|trust", str(caught.value))
    # without the restriction it runs
    torch.load(directory / BIN, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": 1}, {"a": [torch.ones(1)]}], ids=str)
def test_a_bin_of_something_else(value, save_mistral):
    directory, _ = save_mistral()
    as_bin(directory)
    torch.save(value, directory / BIN)
    with pytest.raises(UserError, match=f"^{directory / BIN}: expected a dictionary of tensors"):
        logits(directory)


def test_a_directory_without_weights(save_mistral):
    directory, _ = save_mistral()
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"^{directory}: no weights; expected model.safetensors"):
        logits(directory)


@pytest.mark.parametrize(
    "path, complaint",
    [
        ("mistralai/Mistral-7B-v0.1", "hf download mistralai/Mistral-7B-v0.1"),
        ("./nowhere", "no such directory$"),
        (__file__, "is a file"),
    ],
)
def test_a_path_that_is_no_directory(path, complaint):
    with pytest.raises(UserError, match=complaint):
        load_model(path, device="cpu")


def test_reading_leaves_the_files_alone(save_mistral):
    """fp32 tensors of .bin files are memory-mapped; writes to the model must not reach the file."""
    directory, _ = save_mistral()
    as_bin(directory)
    before = (directory / BIN).read_bytes()
    model = load_model(directory, torch.float32, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (directory / BIN).read_bytes() == before
    assert random_mistral().state_dict()[Q0].equal(torch.load(directory / BIN)[Q0])
