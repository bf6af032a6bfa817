"""Several adapters merged: compared with PEFT's functions on whole deltas, and with its own merges by *_svd."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from minorca import UserError, load_model, load_tokenizer
from minorca.export.__main__ import main
from minorca.export.contents import read_contents
from minorca.export.merging import METHODS, Merge, WeightedAdapter, drop, elect, parse_merge, sum_of, trim
from minorca.files.adapters import RECORD
from minorca.model.lora import seed_of
from tests.data.test_tokenizer import byte_level
from tests.files.test_adapters import saved
from tests.files.test_mistral_lora import write_lora
from tests.files.test_weights import as_consolidated
from tests.helpers import ENVIRONMENT, relative_error, save_tokenizer

TOKENS = torch.randint(128, (40,), generator=torch.Generator().manual_seed(1))
ALL = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
# adapters of other ranks, targets and scales
ADAPTERS = {
    "a": {"target_modules": ALL},
    "b": {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 7, "lora_alpha": 3, "use_rslora": True},
    "c": {"target_modules": ALL, "r": 2, "alpha_pattern": {"v_proj": 32}, "rank_pattern": {"layers.1.*": 5}},
}


@pytest.fixture
def adapters(save_mistral, tmp_path):
    """A model's directory, and PEFT's model of it with three random adapters, which lie in a, b and c."""
    # no projection has fewer than 64 singular values
    directory, base = save_mistral(num_key_value_heads=4)
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        base = saved(base, tmp_path / name, seed=seed, **fields).unload()
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "a"), "a")
    for name in ("b", "c"):
        model.load_adapter(str(tmp_path / name), name)
    return directory, model.eval()


def export(directory, output, *options) -> dict[str, Tensor]:
    main(["--model", str(directory), "--output", str(output), *map(str, options)])
    return load_file(output / "model.safetensors")


def options(path, weights: dict[str, float], *more) -> list[str]:
    return [
        *(word for name, weight in weights.items() for word in ("--adapter", f"{path / name}={weight}")),
        *map(str, more),
    ]


def deltas_of(model, name: str) -> dict[str, Tensor]:
    """PEFT's deltas of an adapter, by the names of Hugging Face's tensors."""
    return {
        f"{module.removeprefix('base_model.model.')}.weight": layer.get_delta_weight(name).detach()
        for module, layer in model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


WEIGHTS = {"a": 1.0, "b": -0.5, "c": 0.7}
IN_PEFT = {"linear": "svd", "ties": "ties_svd"}


@pytest.mark.parametrize("method", IN_PEFT)
def test_pefts_weighted_adapters(method, adapters, tmp_path):
    """PEFT's merge on whole deltas, with no singular value left out, gives the same weights and logits."""
    directory, model = adapters
    density = ["--density", 0.3] if method == "ties" else []
    found = export(directory, tmp_path / "out", *options(tmp_path, WEIGHTS, "--merge", method, *density))
    base = load_file(directory / "model.safetensors")
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "merged", IN_PEFT[method], svd_rank=64, density=0.3
    )
    deltas = deltas_of(model, "merged")
    assert len(deltas) == 14
    for name, weight in base.items():
        if name in deltas:
            assert relative_error(found[name] - weight, deltas[name]) < 1e-4, name
        else:
            assert torch.equal(found[name], weight)
    model.set_adapter("merged")
    with torch.no_grad():
        ours = load_model(tmp_path / "out", torch.float32, "cpu")(TOKENS)
        assert relative_error(ours, model(TOKENS[None]).logits[0]) < 1e-4


FUNCTIONS = {
    "linear": lambda deltas, weights, density: merge_utils.task_arithmetic(deltas, weights),
    "ties": merge_utils.ties,
    "dare": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.2, 0.9, 1.0])
def test_pefts_functions(method, density, adapters, tmp_path, monkeypatch):
    """On the deltas of every tensor; what dare keeps is drawn by seed, position and tensor, as documented."""
    directory, model = adapters
    chosen = [] if method == "linear" else ["--density", density]
    chosen += ["--seed", 5] if method.startswith("dare") else []
    found = export(directory, tmp_path / "out", *options(tmp_path, WEIGHTS, "--merge", method, *chosen))
    base, deltas = load_file(directory / "model.safetensors"), {name: deltas_of(model, name) for name in WEIGHTS}
    for name, weight in base.items():
        acting = [adapter for adapter in WEIGHTS if name in deltas[adapter]]
        if not acting:
            assert torch.equal(found[name], weight)
            continue
        seeds = iter(seed_of(5, list(WEIGHTS).index(adapter), name) for adapter in acting)

        def bernoulli(probabilities, seeds=seeds):
            drawn = torch.rand(probabilities.shape, generator=torch.Generator().manual_seed(next(seeds)))
            return (drawn < probabilities).float()

        monkeypatch.setattr("peft.utils.merge_utils.torch.bernoulli", bernoulli)
        of = [deltas[adapter][name] for adapter in acting]
        expected = FUNCTIONS[method](of, torch.tensor([WEIGHTS[adapter] for adapter in acting]), density)
        assert relative_error(found[name] - weight, expected) < 1e-5, name


def test_the_functions_keep_what_they_say():
    """Of equal values at the border all are kept; of dare the mean stays; elected signs follow the sum."""
    delta = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    kept = trim(delta.clone(), 0.3)
    assert int(kept.count_nonzero()) == 1500
    assert kept.abs()[kept != 0].min() > delta.abs()[kept == 0].max()
    assert torch.equal(trim(torch.ones(10), 0.3), torch.ones(10)) and not trim(torch.ones(10), 0.01).any()
    ones = drop(torch.ones(1000, 1000), 0.3, 1)
    assert ones.unique().tolist() == [0, pytest.approx(1 / 0.3)] and float(ones.mean()) == pytest.approx(1, abs=0.01)
    values = [torch.tensor([1.0, 1.0, 0.0, -1.0]), torch.tensor([2.0, -3.0, 0.0, 1.0])]
    assert elect(values, [1.0, 1.0]).tolist() == [1.5, -3.0, 0.0, 1.0]
    assert sum_of(values, [2.0, 1.0]).tolist() == [4.0, -1.0, 0.0, -1.0]


def test_what_dare_keeps_follows_from_the_seed(adapters, tmp_path):
    directory, _ = adapters
    chosen = options(tmp_path, {"a": 1, "c": 1}, "--merge", "dare")
    one, same, other = (
        export(directory, tmp_path / name, *chosen, "--seed", seed) for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_one_adapter_is_what_it_was(adapters, tmp_path):
    """To the bit, with the weight 1; a sum does not depend on the layout that is written; half a weight, half a
    delta."""
    directory, _ = adapters
    plain = export(directory, tmp_path / "plain", "--adapter", tmp_path / "a")
    weighted = export(directory, tmp_path / "weighted", "--adapter", f"{tmp_path / 'a'}=1")
    half = export(directory, tmp_path / "half", "--adapter", f"{tmp_path / 'a'}=0.5")
    base = load_file(directory / "model.safetensors")
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert relative_error(2 * (half[name] - base[name]), plain[name] - base[name]) < 1e-5
    both = options(tmp_path, WEIGHTS, "--merge", "ties")
    direct = export(directory, tmp_path / "direct", *both)
    main(["--model", str(directory), "--output", str(tmp_path / "there"), *both, "--format", "consolidated"])
    back = export(tmp_path / "there", tmp_path / "back")
    assert all(torch.equal(back[name], direct[name]) for name in direct)


def test_adapters_of_both_formats(save_mistral, tmp_path):
    """One of PEFT's and one of mistral-finetune's, in the sum of their logits' weights."""
    directory, base = save_mistral()
    saved(base, tmp_path / "peft", **ADAPTERS["a"])
    as_consolidated(directory)
    updates = write_lora(directory, tmp_path / "lora", 0.7)
    main(["--model", str(directory), "--adapter", str(tmp_path / "peft"), "--output", str(tmp_path / "one")])
    main(["--model", str(tmp_path / "one"), "--output", str(tmp_path / "there"), "--format", "consolidated"])
    tensors = load_file(tmp_path / "there" / "consolidated.safetensors")
    save_file(
        {name: value + updates.get(name, 0) for name, value in tensors.items()},
        tmp_path / "there" / "consolidated.safetensors",
    )
    both = ["--adapter", str(tmp_path / "peft"), "--adapter", str(tmp_path / "lora")]
    main(["--model", str(directory), *both, "--output", str(tmp_path / "both")])
    with torch.no_grad():
        ours, expected = (load_model(tmp_path / name, torch.float32, "cpu")(TOKENS) for name in ("both", "there"))
    assert relative_error(ours, expected) < 1e-5


def test_a_mapped_file_is_not_changed(save_mistral, tmp_path):
    """Weights of a .bin in fp32 are read from the file's own pages: merging twice adds once."""
    directory, base = save_mistral()
    saved(base, tmp_path / "a", **ADAPTERS["a"])
    expected = export(directory, tmp_path / "out", "--adapter", tmp_path / "a")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    tensors = read_contents(directory, tmp_path / "a").tensors
    for _ in range(2):
        assert all(torch.equal(tensor.make(), expected[tensor.name]) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------- options


def test_options():
    """A weight follows the last =, unless a directory is named so."""
    assert parse_merge([]) is None
    one = parse_merge(["x"])
    assert one == Merge((WeightedAdapter("x"),)) and str(one) == "x"
    several = parse_merge(["x/a", "y=b=-0.25"], "ties", 0.2)
    assert several == Merge((WeightedAdapter("x/a"), WeightedAdapter("y=b", -0.25)), "ties", 0.2)
    assert str(several) == "x/a and -0.25 x y=b by ties, density 0.2"
    assert str(parse_merge(["x", "y"], "dare", seed=3)) == "x and y by dare, density 0.5, seed 3"


def test_a_directory_with_the_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    merge = parse_merge(["lr=0.1", "lr=0.1=2"])
    assert merge and merge.adapters == (WeightedAdapter("lr=0.1"), WeightedAdapter("lr=0.1", 2.0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["x=y"],), "--adapter is x=y, with the weight 'y'; expected DIR=NUMBER"),
        ((["x=nan"],), "--adapter is x=nan, with the weight 'nan'"),
        ((["=1"],), "--adapter is =1"),
        ((["x"], "ties", 0.0), "--density is 0; expected a number over 0, at most 1"),
        ((["x"], "ties", 1.5), "--density is 1.5; expected a number over 0, at most 1"),
        ((["x"], None, 0.5), "--density changes nothing in a linear merge; give --merge ties or dare"),
        ((["x"], "ties", None, 3), "--seed changes nothing without --merge dare or dare_ties"),
        (([], "ties"), "--merge needs --adapter"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_merge(*arguments)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(directory, path, *chosen) -> str:
    with pytest.raises(UserError) as error:
        export(directory, path / "out", *chosen)
    assert not (path / "out").exists()
    return str(error.value)


def test_two_adapters_of_one_vocabulary(save_mistral, tmp_path):
    """Rows of embedding and head cannot be merged, nor weighted; those of one adapter come along."""
    directory, base = save_mistral()
    for name in ("a", "b"):
        fields = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}
        base = saved(base, tmp_path / name, seed=ord(name), **fields).unload()
    saved(base, tmp_path / "c", target_modules=["q_proj", "k_proj"])
    both = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b"]
    message = refused(directory, tmp_path, *both)
    assert message.startswith(f"{tmp_path / 'b'}: trains embedding or head, as {tmp_path / 'a'} does")
    assert "cannot be weighted; give it without =0.5" in refused(
        directory, tmp_path, "--adapter", f"{tmp_path / 'a'}=0.5", "--adapter", tmp_path / "c"
    )
    alone = export(directory, tmp_path / "alone", "--adapter", tmp_path / "a")
    found = export(directory, tmp_path / "found", "--adapter", tmp_path / "c", "--adapter", tmp_path / "a")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], alone[name])


def test_an_adapter_of_nan(adapters, tmp_path):
    directory, _ = adapters
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    message = refused(directory, tmp_path, "--adapter", tmp_path / "a", "--adapter", tmp_path / "b")
    assert message.startswith(f"{tmp_path / 'b'}: ") and "contains NaN or infinite values; did training div" in message


@pytest.mark.parametrize("format", ["hf", "consolidated", "gguf"])
def test_values_that_the_bases_dtype_does_not_hold(format, save_mistral, tmp_path):
    """Of fp16, for which a weight is too large: not written as infinite."""
    directory, theirs = save_mistral()
    theirs.half().save_pretrained(directory)
    saved(theirs.float(), tmp_path / "a", target_modules=ALL).unload()
    adapter = f"--adapter={tmp_path / 'a'}=1e7"
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S+ contains NaN or infinite values .*, in float16; give"):
        main([f"--model={directory}", adapter, f"--output={tmp_path / 'out'}", f"--format={format}"])
    assert not list(tmp_path.glob("out*"))


def test_bases_tokenizers_and_templates(save_mistral, tmp_path, caplog):
    """Another base's quantization and a tokenizer with other ids are refused by name; another template is said."""
    directory, base = save_mistral(vocab_size=512)
    save_tokenizer(directory)
    for seed, name in enumerate("abc"):
        base = saved(base, tmp_path / name, seed=seed, target_modules=["q_proj"]).unload()
    chosen = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b"]
    (tmp_path / "b" / RECORD).write_text(json.dumps({"template": "chatml", "quantize": "nf4"}))
    message = refused(directory, tmp_path, *chosen)
    assert message.startswith(f"{tmp_path / 'b'}: was trained on nf4 with double quantization, and the model has unq")

    (tmp_path / "b" / RECORD).write_text(json.dumps({"template": "none"}))
    (tmp_path / "a" / RECORD).write_text(json.dumps({"template": "chatml"}))
    export(directory, tmp_path / "out", *chosen)
    assert f"{tmp_path / 'a'} with chatml, {tmp_path / 'b'} with none" in caplog.text
    assert (tmp_path / "out" / "chat_template.jinja").exists()

    byte_level(tmp_path / "b")
    export(directory, tmp_path / "with", *chosen)
    assert load_tokenizer(tmp_path / "with").encode("the quick") == load_tokenizer(tmp_path / "b").encode("the quick")
    save_tokenizer(tmp_path / "c")
    export(directory, tmp_path / "same as the model's", *chosen, "--adapter", tmp_path / "c")
    byte_level(tmp_path / "a", None, added_tokens={"<new>": 295})
    message = refused(directory, tmp_path / "c", *chosen)
    assert f"its tokenizer gives other ids than that of {tmp_path / 'a'}; merge adapters of one tokenizer" in message


# -------------------------------------------------------------------------------------------------------------- memory

SHARD = 40_000_000
# Runs the command with smaller shards, and prints by how much the process's own memory grew: not the pages of files
# that it has mapped, nor what a first run has loaded.
MEASURED = f"""
import sys, threading, time
import minorca.export.__main__ as command
import minorca.files.tensor_files as tensor_files

def own() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.002)

tiny, model, output, *options = sys.argv[1:]
command.main(["--model", tiny, "--output", output + "-tiny"])
tensor_files.FILE_BYTES = {SHARD}
start = peak = own()
threading.Thread(target=watch, daemon=True).start()
command.main(["--model", model, "--output", output, *options])
print("grew by", peak - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout, method", [("hf", "ties"), ("consolidated", "linear")])
def test_two_shards_at_most_are_in_memory(layout, method, save_mistral, tmp_path):
    """Of a model of six, with two adapters merged and their effect measured; its largest tensor is to a shard as a 7B
    model's. Mistral's layout is one file."""
    tiny, _ = save_mistral()
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 1024}
    directory, base = save_mistral(num_hidden_layers=40, initializer_range=0.02, **sizes)
    base.to(torch.bfloat16).save_pretrained(directory)
    for seed, name in enumerate("ab"):
        base = saved(base, tmp_path / name, seed=seed, target_modules=ALL).unload()
    chosen = options(tmp_path, {"a": 0.01, "b": 0.01}, "--merge", method, "--format", layout)
    command = [str(tiny), str(directory), str(tmp_path / "out"), *chosen]
    # what is freed goes back to the system at once: measured is what is in use
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    program = [sys.executable, "-c", MEASURED, *command]
    done = subprocess.run(program, env=ENVIRONMENT | malloc, capture_output=True, text=True, check=True)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written > 5 * SHARD
    assert 0 < int(done.stdout.split()[-1]) < 2 * SHARD, done.stdout
