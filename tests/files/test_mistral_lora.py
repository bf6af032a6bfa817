"""mistral-finetune's adapters, compared with W + scale B A on Mistral's own files, whose logits transformers gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minorca import UserError, load_model
from minorca.compare.sides import open_side
from minorca.export.__main__ import main as export_command
from minorca.files.adapters import adapter_paths, read_adapter_settings
from minorca.files.safe_io import read_json
from minorca.model.build import load_adapters
from minorca.train import __main__ as train_command
from tests.files.test_weights import as_consolidated, edit
from tests.helpers import relative_error, save_tokenizer

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
ALL = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"] + [f"feed_forward.w{n}" for n in (1, 2, 3)]
# query heads and key/value heads of other counts, and of another size than hidden / heads
SHAPES = [{}, {"head_dim": 32, "sliding_window": 8}, {"num_attention_heads": 8, "num_key_value_heads": 2}]


def consolidated(save_mistral, **fields):
    """A model's directory in Mistral's layout, and its tensors."""
    directory, _ = save_mistral(**fields)
    as_consolidated(directory)
    return directory, load_file(directory / "consolidated.safetensors")


def write_lora(
    base, directory, scale: float | None = 2.0, rank: int = 4, names=ALL, dtype=torch.float32, **lora
) -> dict[str, Tensor]:
    """A random adapter as mistral-finetune writes it; returns what it adds to each weight, in Mistral's order."""
    generator = torch.Generator().manual_seed(3)
    tensors, updates = {}, {}
    for name, weight in load_file(base / "consolidated.safetensors").items():
        module = name.removesuffix(".weight")
        if any(module.endswith(f".{projection}") for projection in names):
            a = (0.2 * torch.randn(rank, weight.shape[1], generator=generator)).to(dtype)
            b = (0.2 * torch.randn(weight.shape[0], rank, generator=generator)).to(dtype)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            updates[name] = (2.0 if scale is None else scale) * (b.float() @ a.float())
    directory.mkdir()
    save_file(tensors, directory / "lora.safetensors")
    section = {"enable": True, "rank": rank, "dropout": 0.0, "scaling": scale} | lora
    params = json.loads((base / "params.json").read_text())
    params = params | ({} if scale is None else {"lora": section}) | {"moe": None}
    (directory / "params.json").write_text(json.dumps(params))
    return updates


def logits(directory, adapter=None) -> Tensor:
    with torch.no_grad():
        return load_model(directory, torch.float32, "cpu", adapter=adapter)(TOKENS)


def expected_logits(base, tensors, updates, directory) -> Tensor:
    """Of the base into whose tensors the updates were added, in Mistral's files."""
    shutil.copytree(base, directory)
    merged = {name: value + updates[name] if name in updates else value for name, value in tensors.items()}
    save_file(merged, directory / "consolidated.safetensors")
    return logits(directory)


@pytest.mark.parametrize("fields", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [2.0, 0.7, None])
def test_logits_are_those_of_the_merged_weights(fields, scale, save_mistral, tmp_path):
    """Beside the weights, chosen by row, and merged; on Mistral's files and on Hugging Face's."""
    base, tensors = consolidated(save_mistral, **fields)
    updates = write_lora(base, tmp_path / "lora", scale)
    expected = expected_logits(base, tensors, updates, tmp_path / "expected")
    assert len(updates) == 14 and relative_error(logits(base), expected) > 1e-2
    assert relative_error(logits(base, tmp_path / "lora"), expected) <= 1e-5

    model = load_model(base, torch.float32, "cpu")
    load_adapters(model, {"one": tmp_path / "lora"}).choose(torch.zeros(1, dtype=torch.int64), True)
    with torch.no_grad():
        assert relative_error(model(TOKENS), expected) <= 1e-5

    export_command(["--model", str(base), "--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "merged")])
    assert relative_error(logits(tmp_path / "merged"), expected) <= 1e-5
    export_command(["--model", str(base), "--output", str(tmp_path / "huggingface")])
    assert relative_error(logits(tmp_path / "huggingface", tmp_path / "lora"), expected) <= 1e-5


def test_the_order_of_rows_matters(save_mistral, tmp_path):
    """The same B in Hugging Face's order gives other logits."""
    base, tensors = consolidated(save_mistral)
    updates = write_lora(base, tmp_path / "lora", names=["attention.wq", "attention.wk"])
    expected = expected_logits(base, tensors, updates, tmp_path / "expected")
    path = tmp_path / "lora" / "lora.safetensors"
    wrong = {
        name: value.view(-1, 8, 2, 4).transpose(1, 2).reshape(-1, 4).contiguous() if "lora_B" in name else value
        for name, value in load_file(path).items()
    }
    assert relative_error(logits(base, tmp_path / "lora"), expected) <= 1e-5
    save_file(wrong, path)
    assert relative_error(logits(base, tmp_path / "lora"), expected) > 1e-2


def test_the_default_scale_is_said_once(save_mistral, tmp_path, caplog):
    base, _ = consolidated(save_mistral)
    write_lora(base, tmp_path / "lora", None, rank=8)
    settings = read_adapter_settings(tmp_path / "lora")
    read_adapter_settings(tmp_path / "lora")
    assert (settings.rank, settings.scale) == (8, 2.0)
    assert caplog.text.count("no lora.scaling; using 2.0, as mistral-inference does") == 1


def test_an_adapter_of_some_projections(save_mistral, tmp_path):
    base, tensors = consolidated(save_mistral)
    updates = write_lora(base, tmp_path / "lora", names=["attention.wq", "feed_forward.w2"], dtype=torch.bfloat16)
    expected = expected_logits(base, tensors, updates, tmp_path / "expected")
    assert relative_error(logits(base, tmp_path / "lora"), expected) <= 1e-5
    assert read_adapter_settings(tmp_path / "lora").targets == ("q", "down")


def test_training_starts_from_one(workplace, tmp_path):
    """And the result is an adapter in PEFT's format."""
    as_consolidated(workplace.model_path)
    write_lora(workplace.model_path, tmp_path / "lora", 1.5)
    settings = {"lora.alpha": 6, "lora.init": tmp_path / "lora", "train.steps": 1}
    train_command.main(workplace(**settings, **{"optim.lr": 1e-9}))
    trained, start = (
        load_model(workplace.model_path, torch.float32, "cpu", adapter=path)(TOKENS)
        for path in (tmp_path / "run" / "adapter", tmp_path / "lora")
    )
    assert relative_error(trained, start) < 1e-5
    other = {"lora.alpha": 8, "lora.init": tmp_path / "lora", "train.steps": 1}
    with pytest.raises(UserError, match=r"lora.alpha is 8.0?, and the adapter of lora.init, .* has 6.0"):
        train_command.main(workplace("other", **other))


def test_a_side_of_a_comparison(save_mistral, tmp_path):
    """Results are kept by both files; the base must be named."""
    base, _ = consolidated(save_mistral, vocab_size=260)
    save_tokenizer(base)
    write_lora(base, tmp_path / "lora")
    assert open_side("A", str(tmp_path / "lora"), str(base), None).adapter == tmp_path / "lora"
    with pytest.raises(UserError, match="lora: does not name its base; give it with --model DIR"):
        open_side("A", str(tmp_path / "lora"), None, None)
    assert [path.name for path in adapter_paths(tmp_path / "lora")] == ["lora.safetensors", "params.json"]


# ---------------------------------------------------------------------------------------------------------- bad files

A = "layers.1.attention.wq.lora_A.weight"
FIRST = "layers.0.attention.wk.lora_A.weight"


def change(**tensors):
    """A function of an adapter's directory that replaces tensors, or removes those that are None."""

    def apply(directory):
        found = load_file(directory / "lora.safetensors")
        for name, value in tensors.items():
            found.pop(name, None)
            if value is not None:
                found[name] = value
        save_file(found, directory / "lora.safetensors")

    return apply


def params(**fields):
    return lambda directory: edit(directory / "params.json", **fields)


def section(**fields):
    def apply(directory):
        edit(directory / "params.json", lora=read_json(directory / "params.json")["lora"] | fields)

    return apply


def whole_checkpoint(directory):
    (directory / "lora.safetensors").rename(directory / "consolidated.safetensors")


BAD = {
    "a missing tensor": (change(**{A: None}), f"lora.safetensors: missing tensor {A}"),
    "another rank in a tensor": (
        change(**{A: torch.zeros(3, 64)}),
        rf"lora.safetensors: {A} has shape \[3, 64\]; expected \[4, 64\]",
    ),
    "another rank in params.json": (section(rank=8), r"lora_A.weight has shape \[4, 64\]; expected \[8, 64\]"),
    "integers": (change(**{A: torch.zeros(4, 64, dtype=torch.int8)}), f"{A} is I8; expected a floating-point type"),
    "no axes": (change(**{A: torch.zeros(())}), rf"{A} has shape \[\]; expected"),
    "no axes and no rank": (
        lambda directory: (section(rank=None)(directory), change(**{FIRST: torch.zeros(())})(directory)),
        rf"{FIRST} has shape \[\]; expected",
    ),
    "a rank of no rows": (
        lambda directory: (section(rank=None)(directory), change(**{FIRST: torch.zeros(0, 64)})(directory)),
        rf"{FIRST} has shape \[0, 64\]; expected \[4, 64\]",
    ),
    "a whole model's tensors": (
        change(**{"tok_embeddings.weight": torch.zeros(4, 4)}),
        "unexpected tensor tok_embeddings.weight; expected lora_A and .*: give a whole checkpoint as the model",
    ),
    "experts": (
        change(**{"layers.0.feed_forward.experts.0.w1.lora_A.weight": torch.zeros(4, 4)}),
        "unexpected tensor layers.0.feed_forward.experts.0.w1.lora_A.weight",
    ),
    "a layer too many": (
        change(**{"layers.2.attention.wq.lora_A.weight": torch.zeros(4, 64)}),
        "unexpected tensor layers.2.attention.wq.lora_A.weight",
    ),
    "a whole checkpoint alone": (
        whole_checkpoint,
        "no adapter_config.json; expected .* or lora.safetensors of mistral-finetune; a whole model is given as the",
    ),
    "no params.json": (
        lambda directory: (directory / "params.json").unlink(),
        "lora: no params.json; lora.safetensors needs it for the number of heads and the scale: copy the one",
    ),
    "other heads": (params(n_heads=3, n_kv_heads=3), "has shape .*; expected"),
    "an odd head size": (params(head_dim=1), "params.json: .* an even size"),
    "a negative scale": (section(scaling=-1), "params.json: lora.scaling is -1; expected a positive number"),
    "a huge scale": (section(scaling=1e300), "lora.scaling is 1e.300; expected a positive number of at most"),
    "a rank of text": (section(rank="4"), "lora.rank is '4'; expected a positive int"),
    "a rank of zero": (section(rank=0), "lora.rank is 0; expected a positive int"),
    "a section of text": (params(lora="yes"), "params.json: lora is 'yes'; expected an object with rank and scaling"),
    "a mixture of experts": (params(moe={"num_experts": 8}), "params.json: moe is .*dense Mistral"),
    "no safetensors": (
        lambda directory: (directory / "lora.safetensors").write_bytes(b"\x80\x04N."),
        "lora.safetensors: not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(name, save_mistral, tmp_path):
    """One line that names the file and the tensor or field."""
    base, _ = consolidated(save_mistral)
    write_lora(base, tmp_path / "lora")
    spoil, complaint = BAD[name]
    spoil(tmp_path / "lora")
    with pytest.raises(UserError, match=complaint) as error:
        logits(base, tmp_path / "lora")
    assert len(error.value.problems) == 1 and str(tmp_path / "lora") in str(error.value)


def test_an_adapter_of_another_model(save_mistral, tmp_path):
    base, _ = consolidated(save_mistral)
    other, _ = consolidated(save_mistral, num_hidden_layers=3)
    write_lora(other, tmp_path / "lora")
    with pytest.raises(UserError, match="unexpected tensor .*; was it made for another model"):
        logits(base, tmp_path / "lora")


def test_a_file_of_a_model_that_was_trained_whole(save_mistral, tmp_path):
    """Its lora section says that there was no adapter, so that rank and scale are those of mistral-inference."""
    base, tensors = consolidated(save_mistral)
    updates = write_lora(base, tmp_path / "lora", 2.0, enable=False)
    section(rank=64, scaling=9.0)(tmp_path / "lora")
    expected = expected_logits(base, tensors, updates, tmp_path / "expected")
    assert relative_error(logits(base, tmp_path / "lora"), expected) <= 1e-5
