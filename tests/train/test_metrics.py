"""What a run tells: where its time went, what it is, and the same to those who watch elsewhere."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minorca import UserError
from minorca.train import __main__ as train_command
from minorca.train import loop, metrics
from tests.helpers import lines_of

SHORT = {"train.steps": 6, "train.checkpoint_every": 2, "data.eval": 0.1, "train.eval_every": 3}


def test_a_steps_phases_are_its_time(workplace, tmp_path):
    """What is done in a step adds up to it; a checkpoint counts for the step after it."""
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
        told = [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
        assert [(event.step, event.value) for event in events.Scalars(key)] == told


def test_an_evaluation_that_is_no_number_is_null(workplace, tmp_path, monkeypatch):
    """JSON has no NaN."""
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"eval_loss": float("nan")})
    train_command.main(workplace(**SHORT))
    assert [line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [None] * 3


def test_weights_and_biases_has_the_lines(workplace, tmp_path, monkeypatch):
    """By the names of its package; the package itself talks to a service."""
    told, started = [], {}

    def init(**options):
        started.update(options)
        return SimpleNamespace(
            log=lambda values, step: told.append({"step": step, **values}), finish=lambda: told.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train_command.main(workplace(**SHORT, **{"train.wandb": "orca"}))
    assert started["project"] == "orca" and started["config"]["lora"]["rank"] == 4
    assert told == [
        {name: value for name, value in line.items() if value is not None} for line in lines_of(tmp_path / "run")
    ] + ["finished"]


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
    assert "the most this process has held" in memory and "x torch.float32 [260, 64]" in memory  # the embedding


def test_what_a_start_prints(workplace, tmp_path, caplog):
    """The model as its files resolve, what is trained, its memory, the rows, and what was found to go on from."""
    caplog.set_level("INFO")
    train_command.main(workplace(**SHORT))
    first = caplog.text
    for said in (
        "hidden_size=64",
        "window=24",
        "7,424 trained",
        "1 rank on cpu, each with 0.00 GB of weights (whole) in ",
        "6 steps, ",
    ):
        assert said in first
    assert f"{tmp_path / 'run'}: no checkpoint; starting at step 1" in first
    assert "tokens/s; data " in first and f"done: {tmp_path / 'run' / 'adapter'}" in first
    caplog.clear()
    (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    train_command.main(workplace(**SHORT))
    assert "resumed from" in caplog.text and "step-00000006, written by torch " in caplog.text


def test_flops_are_those_that_are_computed(save_mistral):
    """Of one forward and backward of a model with adapters, as torch counts matrix products; attention apart, which it cannot see."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MistralForCausalLM

    from minorca.model.architecture import read_architecture

    directory, model = save_mistral(vocab_size=64)
    arch, length, rank = read_architecture(directory), 24, 4
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters = []
    for layer in model.model.layers:
        for linear in (
            *(getattr(layer.self_attn, f"{x}_proj") for x in "qkvo"),
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        ):
            a, b = (
                torch.randn(rank, linear.in_features, requires_grad=True),
                torch.randn(linear.out_features, rank, requires_grad=True),
            )
            linear.register_forward_hook(lambda module, inputs, output, a=a, b=b: output + inputs[0] @ a.T @ b.T)
            adapters += [a, b]
    assert isinstance(model, MistralForCausalLM)
    hidden = torch.randn(
        1, length, arch.hidden_size, requires_grad=True
    )  # as if there were a layer before: its gradient is counted
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    products = counter.get_total_flops() - _eager_attention(arch, length)
    ours = metrics.training_flops(arch, sum(a.numel() for a in adapters), [length], trained=length)
    pairs = 3.5 * 4 * arch.heads * arch.head_dim * arch.layers * length * (length + 1) // 2
    assert ours - pairs == products


def _eager_attention(arch, length: int) -> int:
    """Two products of every query with every key, masked or not, forward, and twice as much backward."""
    return 3 * 2 * 2 * length**2 * arch.heads * arch.head_dim * arch.layers
