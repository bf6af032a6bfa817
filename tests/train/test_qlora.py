"""QLoRA: training on a base in NF4 follows PEFT and bitsandbytes, on any number of ranks, and resumes exactly."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minorca import UserError, load_model
from minorca.export import __main__ as export_command
from minorca.export.huggingface import export
from minorca.files.adapters import RECORD
from minorca.files.atomic import MANIFEST, write_manifest
from minorca.model.quantization import Quantization
from minorca.train import __main__ as train_command
from minorca.train import run
from tests.helpers import (
    ROOT,
    Workplace,
    assert_same_bits,
    assert_same_run,
    lines_of,
    relative_error,
    save_tokenizer,
    torchrun,
)
from tests.train import test_faults
from tests.train.test_resume import stop_in
from tests.train.test_train import config_of, initial_adapters, train_in_peft


class QLoRAPlace(Workplace):
    """Its runs quantize the base."""

    def __call__(self, output: str = "run", **settings) -> list[str]:
        return super().__call__(output, **{"model.quantize": "nf4"} | settings)


@pytest.fixture
def qlora(workplace, save_mistral) -> QLoRAPlace:
    """As `workplace`, with a model whose rows are made of whole blocks."""
    sizes = {"vocab_size": 260, "intermediate_size": 128, "sliding_window": 24}
    directory, model = save_mistral(**sizes, tie_word_embeddings=True, initializer_range=0.08)
    save_tokenizer(directory)
    return QLoRAPlace(workplace.path, directory, model)


def quantized_by_bitsandbytes(directory: Path, dtype: torch.dtype, double_quant: bool):
    """transformers' model, its projections in NF4."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=settings)


def follow_peft(place: Workplace, monkeypatch, **settings) -> list[float]:
    """Trains for 30 steps, and as often in PEFT with bitsandbytes; the losses must agree. Returns ours."""
    pytest.importorskip("bitsandbytes")
    options = place("followed", **{"train.steps": 30, "train.batch_tokens": 128} | settings)
    config = config_of(options)
    started = initial_adapters(monkeypatch)
    train_command.main(options)
    ours = [line["loss"] for line in lines_of(place.path / "followed")]
    dtype = getattr(torch, config.model.dtype)
    model = quantized_by_bitsandbytes(Path(config.model.path), dtype, config.model.double_quant)
    theirs, _ = train_in_peft(model, place.path / "followed" / "adapter", started, config)
    differences = torch.tensor(ours) - torch.tensor(theirs)
    assert differences.abs().max() < 1e-2 and differences.abs().mean() < 1e-3
    return ours


@pytest.mark.parametrize("double_quant", [True, False])
def test_thirty_steps_follow_peft_and_bitsandbytes(double_quant, qlora, monkeypatch):
    ours = follow_peft(qlora, monkeypatch, **{"model.double_quant": double_quant, "optim.lr": 0.003})
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.slow
def test_thirty_steps_of_smollm2(smollm2, qlora, monkeypatch):
    """The same on real weights, a row a step."""
    settings = {"model.path": smollm2, "data.seq_len": 64, "optim.lr": 1e-3}
    settings |= {"train.micro_batch_tokens": 64, "train.batch_tokens": 64}
    follow_peft(qlora, monkeypatch, **settings)


def test_it_resumes_to_the_same_bits_and_its_base_does_not_change(qlora, tmp_path, monkeypatch):
    settings = {"lora.dropout": 0.1, "train.steps": 6, "train.checkpoint_every": 2}
    models = []
    build_all = run.build

    def build(*arguments, **options):
        learner = build_all(*arguments, **options)
        models.append(learner.model)
        return learner

    monkeypatch.setattr(run, "build", build)
    train_command.main(qlora("whole", **settings))
    stop_in(4, qlora("stopped", **settings), monkeypatch)
    train_command.main(qlora("stopped", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    untrained = load_model(qlora.model_path, torch.float32, "cpu", quantize="nf4")
    before = dict(untrained.named_parameters())
    for model in models:
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen.keys() == before.keys() and sum("codes" in name for name in frozen) == 8
        assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())


def test_a_run_keeps_its_quantizer(qlora, workplace):
    """Another base is another run, and the adapter says what it was trained on."""
    settings = {"train.steps": 2, "train.output": workplace.path / "run"}
    train_command.main(qlora(**settings))
    record = json.loads((workplace.path / "run" / "adapter" / RECORD).read_text())
    assert (record["quantize"], record["double_quant"]) == ("nf4", True)
    for key, changed in (("quantize", "none"), ("double_quant", "false")):
        with pytest.raises(UserError, match=f"model.{key} was .* in the checkpoint and is .* now; set it back"):
            train_command.main(qlora(**settings, **{f"model.{key}": changed}))


def test_a_checkpoint_from_before_means_unquantized(workplace, tmp_path):
    """And without the keys of a later version it is resumed."""
    train_command.main(workplace(**{"train.steps": 2}))
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    values = json.loads(state.read_text())
    assert values["run"].pop("model.double_quant") is True and values["run"].pop("model.quantize") == "none"
    state.write_text(json.dumps(values))
    (state.parent / MANIFEST).unlink()
    write_manifest(state.parent)
    train_command.main(workplace(**{"train.steps": 4}))
    assert lines_of(tmp_path / "run")[-1]["step"] == 4


def test_a_directory_in_four_bits_is_trained_as_its_original(qlora, tmp_path):
    """The bits are the same, whether bitsandbytes' format was read or the original was quantized."""
    settings = {"train.steps": 4}
    train_command.main(qlora("original", **settings))
    export(qlora.model_path, None, tmp_path / "four-bits", Quantization())
    train_command.main(qlora("stored", **settings, **{"model.path": tmp_path / "four-bits", "model.quantize": "none"}))
    assert_same_bits(tmp_path / "original", tmp_path / "stored")
    records = [(tmp_path / name / "adapter" / RECORD).read_text() for name in ("original", "stored")]
    assert records[0] == records[1]
    full = {"train.full": True, "lora.rank": 16, "model.path": tmp_path / "four-bits", "model.quantize": "none"}
    with pytest.raises(UserError, match="stored in .* and train.full trains weights in fp32; give the unquantized"):
        train_command.main(qlora("full", **full))


def test_what_a_run_and_a_dry_run_print(qlora, capsys, caplog):
    """The numbers of values and the bytes of 4-bit weights."""
    caplog.set_level("INFO")
    train_command.main([*qlora(**{"train.steps": 1}), "--dry-run"])
    model = load_model(qlora.model_path, torch.float32, "cpu", quantize="nf4")
    frozen = sum(parameter.nbytes for parameter in model.parameters())
    assert f"{frozen / 1e9:.2f} GB of nf4 and float32 weights" in capsys.readouterr().out
    train_command.main(qlora(**{"train.steps": 1}))
    dense = sum(parameter.numel() for parameter in qlora.model.parameters())
    trained = int(re.findall(r"([\d,]+) trained;", caplog.text)[-1].replace(",", ""))
    assert f"{dense + trained:,} parameters, {trained:,} trained" in caplog.text


def test_the_tutorials_configuration(qlora, tmp_path):
    """Its run on a small model: rows of rendered text, all of which is trained, four a step."""
    rows = [{"text": f"<s>[INST] Say {n} [/INST] {n * 'ab '}</s>"} for n in range(1, 41)]
    (tmp_path / "guanaco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smaller = {"path": qlora.model_path, "train": tmp_path / "guanaco.jsonl", "template": "chatml", "seq_len": 128}
    options = ["--config", str(ROOT / "configs" / "mistral-7b-guanaco-qlora.yaml")]
    options += [f"--{'model' if key == 'path' else 'data'}.{key}={value}" for key, value in smaller.items()]
    train = {"batch_tokens": 512, "micro_batch_tokens": 128, "steps": 2, "output": tmp_path / "run"}
    train_command.main([*options, *(f"--train.{key}={value}" for key, value in train.items())])
    steps = lines_of(tmp_path / "run")
    assert [step["lr"] for step in steps] == [2e-4, 2e-4]
    assert all(step["trained_tokens"] == step["tokens"] - 4 for step in steps)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 16, 0.1)
    assert config["target_modules"] == [f"{name}_proj" for name in ("q", "k", "v", "o", "gate")]


# 3 micro-batches a step, so that in every step one of two ranks has a micro-batch less than the other
RANKED = {"train.steps": 12, "train.batch_tokens": 384, "optim.lr": 0.003}


def test_one_sharded_rank_gives_the_same(qlora, tmp_path):
    """FSDP2 leaves codes and scales as they are, in forward and backward."""
    settings = {"train.steps": 3, "parallel.activation_checkpointing": "full"}
    train_command.main(qlora("whole", **settings))
    train_command.main(qlora("sharded", **settings, **{"parallel.shard": "fsdp"}))
    assert_same_run(tmp_path / "whole", tmp_path / "sharded", losses=1e-6)


@pytest.mark.slow
def test_any_number_of_ranks_gives_one_ranks_losses(qlora, tmp_path):
    """Two and four, sharded and whole, with and without double quantization."""
    cases = ((2, "fsdp", True), (4, "fsdp", False), (4, "none", True))
    for double_quant in (True, False):
        train_command.main(qlora(f"one-{double_quant}", **RANKED, **{"model.double_quant": double_quant}))
    for ranks, shard, double_quant in cases:
        name = f"{ranks}-{shard}-{double_quant}"
        torchrun(ranks, qlora(name, **RANKED, **{"model.double_quant": double_quant, "parallel.shard": shard}))
        assert_same_run(tmp_path / f"one-{double_quant}", tmp_path / name, losses=1e-6)


@pytest.mark.slow
def test_a_kill_at_every_point_of_a_step_and_a_save(qlora, tmp_path):
    test_faults.test_a_kill_at_every_point_of_a_step_and_a_save(0, qlora, tmp_path)


def test_new_tokens_beside_a_quantized_base(qlora, tmp_path, caplog, capsys):
    """Trained on it, merged into it by the commands that the run names, and quantized again: the embedding is dense
    throughout.
    """
    caplog.set_level("INFO")
    settings = {"train.steps": 2, "train.new_tokens": ["<|a|>", "<|b|>", "<|c|>"]}
    train_command.main(qlora(**settings))
    run = tmp_path / "run"
    adapter, base = run / "adapter", run / "base"
    (commands,) = [text.partition("merge it for them: ")[2] for text in caplog.messages if "merge it for" in text]
    for command in commands.split(" && "):
        export_command.main(shlex.split(command)[3:])
    export(base, adapter, tmp_path / "again", Quantization())
    assert "of the adapter's change of the logits" in capsys.readouterr().out
    ids = torch.arange(261)
    with torch.no_grad():
        beside = load_model(base, torch.float32, "cpu", adapter)(ids)
        merged = load_model(run / "merged", torch.float32, "cpu")(ids)
        again = load_model(tmp_path / "again", torch.float32, "cpu")(ids)
    assert merged.shape == again.shape == (261, 261)
    assert relative_error(merged, beside) < 1e-5
