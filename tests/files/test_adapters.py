"""Adapters with what PEFT's settings allow beyond one rank everywhere, compared with PEFT on files that it wrote."""

import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minorca import UserError, load_model
from minorca.export.__main__ import export
from minorca.files.adapters import read_adapter_settings
from minorca.model.build import load_adapters
from minorca.model.lora import adapter_parameters
from minorca.train import __main__ as train_command
from tests.files.test_weight_names import Bytes
from tests.files.test_weights import Malicious, edit
from tests.helpers import gradients_of, relative_error

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
ALL = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"
CONFIGURATIONS = [
    {"target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    {"target_modules": ALL, "rank_pattern": {r"layers\.1\..*": 6}, "alpha_pattern": {".*mlp.(up|down)_proj": 3.5}},
    {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"^model.layers.0.self_attn.k_proj": -1, "k_proj": 2}},
    {"target_modules": ALL, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
    {"target_modules": ["up_proj"], "rank_pattern": {"proj": 9, "p_proj": 9, "layers.1.mlp.up_proj": 1}},
    {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["gate_proj"], "layers_to_transform": 0, "alpha_pattern": {"gate_proj": 1}},
    {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "up_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.o_proj"], "lora_alpha": 2.5},
]


def saved(base, directory, seed=3, **fields):
    """PEFT's model with an adapter of random numbers, and the directory to which it is saved."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(directory)
    return model.eval()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def ours(directory, adapter=None) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, torch.float32, "cpu", adapter=adapter)(TOKENS)


@pytest.mark.parametrize("fields", CONFIGURATIONS, ids=str)
def test_logits_are_pefts(fields, save_mistral, tmp_path):
    """With the adapter beside the weights, chosen by row, and merged into them."""
    directory, base = save_mistral()
    plain = logits_of(base)
    theirs = saved(base, tmp_path / "adapter", **fields)
    expected = logits_of(theirs)
    assert relative_error(plain, expected) > 1e-2
    assert relative_error(ours(directory, tmp_path / "adapter"), expected) <= 1e-5

    model = load_model(directory, torch.float32, "cpu")
    choice = load_adapters(model, {"one": tmp_path / "adapter"})
    choice.choose(torch.zeros(1, dtype=torch.int64), True)
    with torch.no_grad():
        assert relative_error(model(TOKENS), expected) <= 1e-5

    export(directory, tmp_path / "adapter", tmp_path / "merged")
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative_error(weight, merged[name]) <= 1e-6, name


@pytest.mark.parametrize("fields", CONFIGURATIONS[:3], ids=str)
def test_gradients_are_pefts(fields, save_mistral, tmp_path):
    directory, base = save_mistral()
    theirs = saved(base, tmp_path / "adapter", **fields)
    model = load_model(directory, torch.float32, "cpu", adapter=tmp_path / "adapter")
    model(TOKENS).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    theirs(TOKENS[None]).logits.square().sum().backward()
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    expected = gradients_of(trained)
    gradients = gradients_of(adapter_parameters(model))
    assert gradients.keys() == expected.keys()
    assert max(relative_error(gradient, expected[name]) for name, gradient in gradients.items()) <= 1e-4


def test_adapters_of_different_scales_by_row(save_mistral, tmp_path):
    """Each row has the numbers of its own adapter."""
    directory, _ = save_mistral(num_hidden_layers=1)
    names = ["one", "two", "three"]
    for seed, (name, fields) in enumerate(zip(names, CONFIGURATIONS)):
        saved(save_mistral(num_hidden_layers=1)[1], tmp_path / name, seed=seed, **fields)
    model = load_model(directory, torch.float32, "cpu")
    choice = load_adapters(model, {name: tmp_path / name for name in names})
    rows = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    choice.choose(rows, True)
    _, projection = next(model.projections())
    x = torch.randn(40, 64)
    with torch.no_grad():
        found = projection(x)
        for index, name in enumerate(names):
            _, alone = next(load_model(directory, torch.float32, "cpu", adapter=tmp_path / name).projections())
            assert relative_error(found[rows == index], alone(x)[rows == index]) <= 1e-5


# --------------------------------------------------------------------------------------------------------------- files


def as_bin(directory, zipped=True):
    torch.save(load_file(directory / TENSORS), directory / BIN, _use_new_zipfile_serialization=zipped)
    (directory / TENSORS).unlink()


def with_names(new_name):
    def apply(directory):
        tensors = {new_name(name): tensor for name, tensor in load_file(directory / TENSORS).items()}
        save_file(tensors, directory / TENSORS)

    return apply


FILES = {
    ".bin": as_bin,
    "old .bin": lambda directory: as_bin(directory, zipped=False),
    "with the adapter's name": with_names(lambda name: name.replace(".weight", ".default.weight")),
    "without PEFT's prefix": with_names(lambda name: name.removeprefix("base_model.model.")),
    "compiled": with_names(lambda name: name.replace("model.layers", "_orig_mod.model.layers")),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_the_same_adapter(name, save_mistral, tmp_path):
    directory, base = save_mistral()
    saved(base, tmp_path / "adapter", **CONFIGURATIONS[0])
    expected = ours(directory, tmp_path / "adapter")
    FILES[name](tmp_path / "adapter")
    assert torch.equal(ours(directory, tmp_path / "adapter"), expected)
    export(directory, tmp_path / "adapter", tmp_path / "merged")
    assert relative_error(ours(tmp_path / "merged"), expected) <= 1e-5


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_runs_no_code(zipped, save_mistral, tmp_path):
    _, base = save_mistral()
    saved(base, tmp_path, target_modules=["q_proj"])
    as_bin(tmp_path)
    tensors = torch.load(tmp_path / BIN)
    for value in (Malicious(tmp_path / "ran"), Bytes(10**11)):
        torch.save(tensors | {"x": value}, tmp_path / BIN, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=f"^{tmp_path / BIN}: cannot be read without running code"):
            read_adapter_settings(tmp_path)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, "use_dora is True, which is not supported; merge the adapter in PEFT first"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save is \['norm'\]; .*; merge the adapter in PEFT first"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; expected none; merge the adapter in PEFT first"),
    ],
    ids=str,
)
def test_what_peft_writes_and_we_do_not_compute(fields, message, save_mistral, tmp_path):
    saved(save_mistral()[1], tmp_path / "adapter", **{"target_modules": ["q_proj"]} | fields)
    with pytest.raises(UserError, match=message):
        read_adapter_settings(tmp_path / "adapter")


def test_embeddings_beside_an_adapter(save_mistral, tmp_path):
    """PEFT saves them by itself where a vocabulary was resized, and loads them in place of the base's."""
    directory, base = save_mistral()
    model = saved(base, tmp_path / "adapter", target_modules=["q_proj"])
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert relative_error(ours(directory, tmp_path / "adapter"), logits_of(model)) <= 1e-5


def test_tensors_must_agree_with_the_settings(save_mistral, tmp_path):
    """A rank other than the pattern's; half of a pair; a layer that no setting leaves out."""
    directory, base = save_mistral()
    saved(base, tmp_path, target_modules=["q_proj"], rank_pattern={"layers.1.*": 3})
    path = tmp_path / TENSORS
    tensors = load_file(path)
    edit(tmp_path / "adapter_config.json", rank_pattern={"q_proj": 2})
    with pytest.raises(
        UserError, match=r"layers.0.self_attn.q_proj.lora_A.weight has shape \[4, 64\]; expected \[2, 64\]"
    ):
        ours(directory, tmp_path)
    edit(tmp_path / "adapter_config.json", rank_pattern={"layers.1.*": 3})
    first = {name: tensor for name, tensor in tensors.items() if "layers.0" in name}
    save_file(first, path)
    with pytest.raises(UserError, match="missing tensor .*layers.1.self_attn.q_proj.lora_A.weight"):
        ours(directory, tmp_path)
    edit(tmp_path / "adapter_config.json", layers_to_transform=[0])
    assert ours(directory, tmp_path).isfinite().all()
    save_file({name: tensor for name, tensor in first.items() if "lora_A" in name}, path)
    with pytest.raises(UserError, match="missing tensor .*layers.0.self_attn.q_proj.lora_B.weight"):
        ours(directory, tmp_path)


def test_patterns_take_no_longer_than_their_length(save_mistral, tmp_path):
    """Python's regular expressions would take longer than the universe has existed."""
    saved(save_mistral()[1], tmp_path, target_modules=["q_proj"])
    edit(tmp_path / "adapter_config.json", alpha_pattern={f"(([a-z._0-9]+)+)+{n}": 1 for n in range(100)})
    assert not read_adapter_settings(tmp_path).parts


def test_two_adapters_in_one_file(save_mistral, tmp_path):
    saved(save_mistral()[1], tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / TENSORS)
    other = {name.replace(".weight", ".other.weight"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | other, tmp_path / TENSORS)
    with pytest.raises(UserError, match=f"{TENSORS}: .* are both .*; remove one"):
        read_adapter_settings(tmp_path)


def test_training_starts_from_uniform_adapters(workplace, tmp_path):
    """One with patterns is refused; a pattern that chooses every layer is no obstacle."""
    settings = {"train.steps": 1, "lora.alpha": 6, "lora.targets": "[q]"}
    pattern: dict[str, Any] = {"target_modules": r".*layers\.\d\.self_attn\.q_proj"}
    base = saved(workplace.model, tmp_path / "all", **pattern).unload()
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == pattern["target_modules"]
    train_command.main(workplace("one", **settings, **{"lora.init": tmp_path / "all"}))
    for name, fields in {"alpha": {"alpha_pattern": {"layers.1.*": 3}}, "layers": {"layers_to_transform": [1]}}.items():
        base = saved(base, tmp_path / name, target_modules=["q_proj"], **fields).unload()
        with pytest.raises(UserError, match="lora.init is .*rank or scale is not the same in every layer.*merge it"):
            train_command.main(workplace(f"from {name}", **settings, **{"lora.init": tmp_path / name}))
