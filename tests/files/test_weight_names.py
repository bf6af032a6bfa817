"""Weights under other names than the network's: of tensors, as wrappers of a model write them, and of files."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from minorca import UserError
from tests.files.test_weights import BIN, FILE, NORM, Q0, as_bin, as_consolidated, edit, logits, write


def renamed(directory, new_name):
    tensors = load_file(directory / FILE)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, directory / FILE)


def in_modules(wrapper):
    """Wraps every projection, as layer.q_proj.WRAPPER.weight."""
    return lambda name: name.replace("_proj.", f"_proj.{wrapper}.")


def in_blocks(wrapper):
    return lambda name: name.replace("mlp.", f"{wrapper}.mlp.")


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "data parallel and compiled": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: in_blocks("_fsdp_wrapped_module")(f"_fsdp_wrapped_module.{name}"),
    "checkpointed": in_blocks("_checkpoint_wrapped_module"),
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT's layers": lambda name: in_modules("base_layer")(f"base_model.model.{name}"),
    "text and images, old": lambda name: f"language_model.{name}",
    "text and images, new": lambda name: name.replace("model.", "model.language_model."),
    "in a module": lambda name: f"model.{name}",
    "one layer alone": lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_a_model_are_unwrapped(name, save_mistral, caplog):
    """The logits are those of the plain names; it is logged once."""
    directory, _ = save_mistral()
    expected = logits(directory)
    renamed(directory, WRAPPED[name])
    with caplog.at_level(logging.INFO):
        assert torch.equal(logits(directory), expected)
    assert [record.message for record in caplog.records if "read without the prefixes" in record.message] != []
    assert sum("read without the prefixes" in record.message for record in caplog.records) == 1


def test_a_model_saved_without_its_head(save_mistral):
    """MistralModel's own names; the head is the embedding, or missing."""
    directory, theirs = save_mistral(tie_word_embeddings=True)
    expected = logits(directory)
    theirs.model.save_pretrained(directory)
    edit(directory / "config.json", architectures=["MistralForCausalLM"])
    assert "embed_tokens.weight" in load_file(directory / FILE)
    assert torch.equal(logits(directory), expected)
    edit(directory / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="missing tensor lm_head.weight"):
        logits(directory)


def test_wrapped_names_in_mistrals_layout(save_mistral):
    directory, _ = save_mistral()
    expected = logits(directory)
    as_consolidated(directory)
    tensors = load_file(directory / "consolidated.safetensors")
    tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors | {"rope.freqs": torch.ones(8)}, directory / "consolidated.safetensors")
    assert torch.equal(logits(directory), expected)


def test_other_names_are_shown(save_mistral):
    """The one that is most like the missing one; two that come to one tensor; an adapter among the weights."""
    directory, _ = save_mistral()
    tensors = load_file(directory / FILE)
    renamed(directory, lambda name: name.replace("model.layers.", "transformer.h."))
    missing = "model.layers.0.input_layernorm.weight"
    with pytest.raises(
        UserError, match=f"missing tensor {missing} .and 17 more.; found transformer.h.0.input_layernorm"
    ):
        logits(directory)
    save_file(tensors | {f"module.{NORM}": tensors[NORM].clone()}, directory / FILE)
    with pytest.raises(UserError, match=f"{FILE}: .*module.{NORM}.* are both {NORM}; remove one"):
        logits(directory)
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_file(tensors | {lora: torch.ones(4, 64)}, directory / FILE)
    with pytest.raises(
        UserError, match=f"{lora} belongs to an adapter: a PEFT model was saved whole; merge the adapter"
    ):
        logits(directory)


# ---------------------------------------------------------------------------------------------------------- other files


def as_old_bin(directory):
    """As PyTorch wrote it before 1.6: not a zip file."""
    as_bin(directory)
    torch.save(torch.load(directory / BIN), directory / BIN, _use_new_zipfile_serialization=False)


def as_pth(directory):
    as_consolidated(directory)
    torch.save(load_file(directory / "consolidated.safetensors"), directory / "consolidated.00.pth")
    (directory / "consolidated.safetensors").unlink()


def numbered(stem, convert=lambda directory: None, index=False):
    """Two files, with an index or without."""

    def apply(directory):
        convert(directory)
        tensors = load_file(directory / f"{stem}.safetensors")
        (directory / f"{stem}.safetensors").unlink()
        names, weight_map = list(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        if index:
            write(directory / f"{stem}.safetensors.index.json", {"weight_map": weight_map})

    return apply


FILES = {
    "old .bin": as_old_bin,
    ".pth": as_pth,
    "consolidated, index": numbered("consolidated", as_consolidated, index=True),
    "consolidated, numbers": numbered("consolidated", as_consolidated),
    "numbers": numbered("model"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_the_same_model(name, save_mistral):
    directory, _ = save_mistral()
    expected = logits(directory)
    FILES[name](directory)
    assert torch.equal(logits(directory), expected)


class Bytes:
    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def test_an_old_bin_that_asks_for_memory(save_mistral):
    """In its dictionary, or as the size of a storage; and one that is cut short."""
    directory, _ = save_mistral()
    as_old_bin(directory)
    path = directory / BIN
    data = path.read_bytes()
    torch.save(torch.load(path) | {Q0: Bytes(10**11)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=f"^{path}: cannot be read without running code"):
        logits(directory)
    size = (64 * 64).to_bytes(2, "little")
    assert data.count(b"M" + size) > 2
    path.write_bytes(data.replace(b"M" + size, b"J" + (2**31 - 1).to_bytes(4, "little"), 1))
    with pytest.raises(UserError, match=f"^{path}: cannot be read without running code"):
        logits(directory)
    for cut in (40, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=f"^{path}: cannot be read"):
            logits(directory)


def test_parts_of_tensors_are_refused(save_mistral):
    """consolidated.00.pth and consolidated.01.pth each hold a part of every tensor."""
    directory, _ = save_mistral()
    as_pth(directory)
    (directory / "consolidated.01.pth").write_bytes(b"")
    with pytest.raises(UserError, match="consolidated.00.pth: is one of several parts .* convert them"):
        logits(directory)


def test_numbers_that_are_not_complete(save_mistral):
    directory, _ = save_mistral()
    numbered("model")(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: expected each of 00002 files once"):
        logits(directory)


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "ggml-model-q4_0.gguf", "tf_model.h5", "pytorch_model.fp16.bin"]
)
def test_weights_under_another_name_are_shown(name, save_mistral):
    directory, _ = save_mistral()
    (directory / FILE).rename(directory / name)
    with pytest.raises(UserError, match=f"no weights; expected model.safetensors.*; found {name}, which is not read"):
        logits(directory)
