"""Adapters merged into quantized bases and quantized again, and what is left of their effect then."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minorca import UserError, load_model
from minorca.export.__main__ import main
from minorca.export.contents import merged_tensors
from minorca.export.effect import TOKENS, effect_of, logits_by_layer
from minorca.export.huggingface import export
from minorca.files.adapters import RECORD
from minorca.files.weights import open_model
from minorca.model.quantization import Quantization
from tests.export.test_export import adapted
from tests.helpers import relative_error

SIZES = {"intermediate_size": 128}
NF4 = Quantization()


def record(adapter, **trained_on) -> None:
    (adapter / RECORD).write_text(json.dumps({"template": "chatml"} | trained_on))


@pytest.mark.parametrize("quantization", [NF4, Quantization(double_quant=False)])
def test_merging_into_a_quantized_base(quantization, save_mistral, tmp_path):
    """The result is plain, and computes what the quantized base computes with the adapter beside it."""
    directory, theirs = save_mistral(**SIZES)
    adapted(theirs, tmp_path / "adapter")
    export(directory, None, tmp_path / "base", quantization)
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {
        key: value
        for key, value in json.loads((tmp_path / "base" / "config.json").read_text()).items()
        if key != "quantization_config"
    }
    tokens = torch.arange(40)
    with torch.no_grad():
        beside = load_model(tmp_path / "base", torch.float32, "cpu", tmp_path / "adapter")(tokens)
        merged = load_model(tmp_path / "merged", torch.float32, "cpu")(tokens)
        unquantized = load_model(directory, torch.float32, "cpu", tmp_path / "adapter")(tokens)
        assert relative_error(merged, beside) < 1e-5 and relative_error(unquantized, beside) > 1e-2
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert relative_error(theirs(tokens[None]).logits[0], merged) < 1e-5


def test_values_are_rounded_before_the_update_is_added(save_mistral, tmp_path):
    """Of a bf16 base: W + scale B A in fp32, W the values that the quantized model multiplies by, in bf16."""
    directory, theirs = save_mistral(**SIZES)
    adapted(theirs, tmp_path / "adapter")
    theirs.to(torch.bfloat16).save_pretrained(directory)
    export(directory, None, tmp_path / "base", NF4)
    export(tmp_path / "base", None, tmp_path / "values")
    for base in ("base", "values"):
        export(tmp_path / base, tmp_path / "adapter", tmp_path / f"{base}-merged")
    found, expected = (load_file(tmp_path / f"{base}-merged" / "model.safetensors") for base in ("base", "values"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


# what an adapter was trained on, what it is merged into -> what is said
BASES = {
    "quantized, unquantized": (
        {"quantize": "nf4"},
        None,
        r"was trained on nf4 with double quantization, and the model has unquantized weights; write the base of its "
        r"training, python -m minorca.export --model \S+ --quantize nf4 --output BASE, and merge it into BASE",
    ),
    "unquantized, quantized": (
        {},
        NF4,
        "was trained on unquantized weights, and the .*; merge it into the unquantized",
    ),
    "with and without double quantization": (
        {"quantize": "nf4", "double_quant": False},
        NF4,
        "nf4 without .* has nf4 with .*--model UNQUANTIZED --quantize nf4 --no-double-quant --output BASE",
    ),
    "an unknown one": ({"quantize": "fp8"}, None, "quantize is 'fp8', double_quant True; expected nf4"),
}


@pytest.mark.parametrize("name", BASES)
def test_another_quantizers_base_is_refused(name, save_mistral, tmp_path):
    directory, theirs = save_mistral(**SIZES)
    adapted(theirs, tmp_path / "adapter")
    trained_on, quantization, complaint = BASES[name]
    record(tmp_path / "adapter", **trained_on)
    if quantization:
        export(directory, None, tmp_path / "base", quantization)
        directory = tmp_path / "base"
    with pytest.raises(UserError, match=complaint):
        export(directory, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_advice_gives_the_base_of_training(save_mistral, tmp_path):
    """The commands that the error names merge the adapter."""
    directory, theirs = save_mistral(**SIZES)
    adapted(theirs, tmp_path / "adapter")
    record(tmp_path / "adapter", quantize="nf4", double_quant=False)
    with pytest.raises(UserError) as error:
        export(directory, tmp_path / "adapter", tmp_path / "merged")
    command = re.search(r"minorca.export (.*) --output BASE", str(error.value))
    assert command
    main([*command[1].split(), "--output", str(tmp_path / "base")])
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_the_logits_layer_by_layer(save_mistral):
    """Are those of the whole model."""
    directory, theirs = save_mistral(**SIZES, sliding_window=8, num_hidden_layers=3, tie_word_embeddings=True)
    source = open_model(directory)
    weights = {tensor.name: tensor.make for tensor in merged_tensors(source, None, {})}
    found = logits_by_layer(source.arch, torch.arange(40), weights)
    with torch.no_grad():
        assert relative_error(found, theirs(torch.arange(40)[None]).logits[0]) < 1e-5


def test_the_share_of_an_effect(save_mistral):
    """1 of the merged weights themselves, 0 of the base, a half between; None where nothing changes."""
    directory, theirs = save_mistral(**SIZES)
    arch = open_model(directory).arch
    base = {tensor.name: tensor.make() for tensor in merged_tensors(open_model(directory), None, {})}
    changed = {name: 1.001 * value if "o_proj" in name else value for name, value in base.items()}
    between = {name: (base[name] + changed[name]) / 2 for name in base}

    def share(*models: dict) -> float | None:
        weights = ({name: lambda v=value: v for name, value in model.items()} for model in models)
        return effect_of(*(logits_by_layer(arch, torch.arange(TOKENS) % 128, each) for each in weights)).share

    assert share(base, changed, changed) == pytest.approx(1) and share(base, changed, base) == 0
    assert share(base, changed, between) == pytest.approx(0.5, abs=0.01)
    assert share(base, base, changed) is None


def test_what_is_left_is_printed(save_mistral, tmp_path, capsys):
    """As the definition says, of whole models: the projection of the change of the logits."""
    directory, theirs = save_mistral(**SIZES)
    adapted(theirs, tmp_path / "adapter")
    export(directory, None, tmp_path / "base", NF4)
    options = ["--adapter", str(tmp_path / "adapter"), "--quantize", "nf4"]
    main(["--model", str(tmp_path / "base"), *options, "--output", str(tmp_path / "again")])
    printed = re.search(
        r"quantizing again keeps (-?\d+)% of the adapter's change of the logits", capsys.readouterr().out
    )
    assert printed
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ids = torch.randint(128, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, merged, again = (
            load_model(tmp_path / name, torch.float32, "cpu")(ids).double() for name in ("base", "merged", "again")
        )
    change = merged - base
    share = ((again - base) * change).sum() / change.square().sum()
    assert int(printed[1]) == pytest.approx(100 * share.item(), abs=1)
    assert open_model(tmp_path / "again").quantization == NF4


def test_quantizing_what_is_quantized(save_mistral, tmp_path):
    directory, _ = save_mistral(**SIZES)
    export(directory, None, tmp_path / "base", NF4)
    with pytest.raises(UserError, match="base: is already stored in nf4 with double quantization"):
        export(tmp_path / "base", None, tmp_path / "again", NF4)
    with pytest.raises(UserError, match="double_quant is false, which needs quantize nf4"):
        main(["--model", str(directory), "--output", str(tmp_path / "out"), "--no-double-quant"])
    assert not (tmp_path / "again").exists() and not (tmp_path / "out").exists()
