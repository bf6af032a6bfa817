"""What a run reports: the time of its phases, its settings, and the same to TensorBoard and Weights & Biases."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from minorca import UserError
from minorca.model.architecture import read_architecture
from minorca.train import __main__ as train_command
from minorca.train import loop, metrics
from tests.helpers import lines_of

SHORT = {"train.steps": 6, "train.checkpoint_every": 2, "data.eval": 0.1, "train.eval_every": 3}


def test_a_steps_phases_are_its_time(workplace, tmp_path):
    """The phases add up to the step; a checkpoint counts for the step after it."""
    train_command.main(workplace(**SHORT))
    steps = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    for line in steps:
        inside = sum(line[f"{phase}_seconds"] for phase in ("data", "forward", "backward", "optimizer"))
        assert all(line[f"{phase}_seconds"] > 0 for phase in ("data", "forward", "backward", "optimizer"))
        assert inside == pytest.approx(line["seconds"], rel=0.2, abs=0.002)
    assert [line["step"] for line in steps if line["checkpoint_seconds"] > 0] == [3, 5]
    assert [line["step"] for line in steps if line["evaluation_seconds"] > 0] == [1, 4]


def test_tensorboard_has_the_lines(workplace, tmp_path):
    train_command.main(workplace(**SHORT))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = lines_of(tmp_path / "run")
    for key in ("loss", "grad_norm", "lr", "tokens_per_second", "forward_seconds", "eval_loss"):
        expected = [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected


def test_an_evaluation_that_is_no_number_is_null(workplace, tmp_path, monkeypatch):
    """JSON has no NaN."""
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"eval_loss": float("nan")})
    train_command.main(workplace(**SHORT))
    assert [line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [None] * 3


def test_weights_and_biases_has_the_lines(workplace, tmp_path, monkeypatch):
    """With a stand-in for the package, which would send them to a service."""
    logged = []
    started = {}

    def log(values, step):
        logged.append({"step": step, **values})

    def finish():
        logged.append("finished")

    def init(**options):
        started.update(options)
        return SimpleNamespace(log=log, finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train_command.main(workplace(**SHORT, **{"train.wandb": "orca"}))
    assert started["project"] == "orca" and started["config"]["lora"]["rank"] == 4
    lines = lines_of(tmp_path / "run")
    assert logged == [*({key: value for key, value in line.items() if value is not None} for line in lines), "finished"]


def test_weights_and_biases_must_be_installed(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="train.wandb is orca, and the package is not installed; pip install wandb"):
        train_command.main(workplace(**SHORT, **{"train.wandb": "orca"}))


def test_a_profile_is_a_trace_and_what_holds_memory(workplace, tmp_path):
    train_command.main([*workplace(**SHORT), "--profile"])
    with gzip.open(tmp_path / "run" / "profile" / "trace-rank0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("ProfilerStep#")] == ["ProfilerStep#2"]
    assert {"minorca::attention", "[memory]"} <= set(names)
    memory = (tmp_path / "run" / "profile" / "memory-rank0.txt").read_text()
    assert "the most this process has held" in memory
    # the embedding
    assert "x torch.float32 [260, 64]" in memory


def test_what_a_start_prints(workplace, tmp_path, caplog):
    """The model, the number of trained values, memory, the steps, and the checkpoint from which the run resumes."""
    caplog.set_level("INFO")
    train_command.main(workplace(**SHORT))
    first = caplog.text
    for expected in (
        "hidden_size=64",
        "window=24",
        "7,424 trained",
        "1 rank on cpu, each with 0.00 GB of weights (whole) in ",
        "6 steps, ",
    ):
        assert expected in first
    assert f"{tmp_path / 'run'}: no checkpoint; starting at step 1" in first
    assert "tokens/s; data " in first and f"done: {tmp_path / 'run' / 'adapter'}" in first
    caplog.clear()
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    train_command.main(workplace(**SHORT))
    assert "resumed from" in caplog.text and "step-00000006, written by torch " in caplog.text


@pytest.mark.parametrize("full", [False, True])
def test_flops_are_those_that_are_computed(full, save_mistral):
    """Of a forward and a backward of transformers' model with adapters, or whole, as torch counts its matrix products.

    Attention is counted separately: unlike ours, eager attention also computes masked pairs.
    """
    directory, model = save_mistral(vocab_size=64)
    arch = read_architecture(directory)
    length = 24
    rank = 4
    for parameter in model.parameters():
        parameter.requires_grad_(full)
    adapters = []
    for layer in () if full else model.model.layers:
        for linear in (
            *(getattr(layer.self_attn, f"{x}_proj") for x in "qkvo"),
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        ):
            a = torch.randn(rank, linear.in_features, requires_grad=True)
            b = torch.randn(linear.out_features, rank, requires_grad=True)
            linear.register_forward_hook(lambda module, inputs, output, a=a, b=b: output + inputs[0] @ a.T @ b.T)
            adapters += [a, b]
    # requires a gradient, as the input of every layer but the first does
    hidden = torch.randn(1, length, arch.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    products = counter.get_total_flops() - _eager_attention(arch, length)
    ours = metrics.training_flops(arch, sum(a.numel() for a in adapters), [length], trained=length, full=full)
    pairs = 3.5 * 4 * arch.heads * arch.head_dim * arch.layers * length * (length + 1) // 2
    assert ours - pairs == products


def _eager_attention(arch, length: int) -> int:
    """FLOPs of two products of every query with every key, masked or not, and of twice as many in backward."""
    return 3 * 2 * 2 * length**2 * arch.heads * arch.head_dim * arch.layers
