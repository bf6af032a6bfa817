"""Shared by several tests: small random models in Hugging Face's format, written by transformers, and whole runs."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

ROOT = Path(__file__).parent.parent


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| in the 2-norm, computed in fp64."""
    norm = torch.linalg.vector_norm
    return float((norm(ours.double() - theirs.double()) / norm(theirs.double())).detach())


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of each parameter; every one must have a gradient."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert gradients.keys() == parameters.keys()
    return gradients


class Calls(TorchDispatchMode):
    """Records the calls of our operators in its block, as (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minorca":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def random_mistral(seed: int = 0, **fields) -> MistralForCausalLM:
    """transformers' Mistral, small, in fp32, with random weights, norms included (ones would hide a missing weight)."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    } | fields
    model = MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def random_adapter(base, directory, targets, **config):
    """PEFT's model around `base` with a random adapter (B too, which PEFT starts at zero), saved to `directory`."""
    from peft import LoraConfig, get_peft_model

    names = [f"{target}_proj" for target in targets]
    fields: dict[str, Any] = {"r": 4} | config
    model = get_peft_model(base, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(directory)
    return model.eval()


def save_tokenizer(directory) -> None:
    """A byte-level tokenizer.json with ChatML's tokens (258 ids) and no merges, beside a model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')


def write_rows(path: Path) -> None:
    """60 rows in OpenOrca's format."""
    draw = random.Random(0)
    with path.open("w") as file:
        for n in range(60):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            system = draw.choice(["", "Be brief."])
            row = {"id": f"t0.{n}", "system_prompt": system, "question": f"Reverse {word}", "response": word[::-1]}
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def without_curves():
    """Within it no run draws curves.png, which takes longer than a few steps of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minorca.train.metrics.draw", lambda output: None)
        yield


@dataclass(frozen=True)
class Workplace:
    """A model and rows to train on; called, it gives the command line of a short run on them.

    Attributes:
        path: the directory of rows.jsonl and of the runs' outputs.
        model_path: the model's directory, with a tokenizer.
        model: transformers' model with the same weights.
    """

    path: Path
    model_path: Path
    model: MistralForCausalLM

    def __call__(self, output: str = "run", **settings) -> list[str]:
        settings = {
            "model.path": self.model_path,
            "model.dtype": "float32",
            "data.train": self.path / "rows.jsonl",
            "data.seq_len": 128,
            "lora.rank": 4,
            "optim.lr": 0.01,
            "train.batch_tokens": 512,
            "train.micro_batch_tokens": 128,
            "train.output": self.path / output,
        } | settings
        return [f"--{key}={value}" for key, value in settings.items()]


def lines_of(output) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.005)


# the keys of a step's line that do not depend on the machine's speed
SAME = ("loss", "grad_norm", "lr", "tokens", "trained_tokens")


# of processes that tests start
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
}


def training(options, ranks: int = 0, faulty: tuple = (), restarts: int = 0, **popen) -> subprocess.Popen:
    """Starts a run in processes of its own: `ranks` of torchrun, or one process without torchrun where `ranks` is 0.

    Args:
        faulty: the fault to inject, as (point, count); see tests/faulty.py.
        popen: further arguments of `subprocess.Popen`.
    """
    program = [str(ROOT / "tests" / "faulty.py"), *map(str, faulty)] if faulty else ["-m", "minorca.train"]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen([sys.executable, *(launcher if ranks else []), *program, *options], **pipes | popen)


def torchrun(ranks: int, options: list[str]) -> None:
    process = training(options, ranks)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]


def evaluate_on_two_ranks(options) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minorca.evaluate"]
    run = [sys.executable, *launcher, *map(str, options)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def trained_by(run: Path) -> dict[str, Tensor]:
    """What a finished run leaves: its adapter, or all weights."""
    from safetensors.torch import load_file

    adapter = run / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run / "model" / "model.safetensors")


def assert_same_bits(one, two) -> None:
    """Both runs have the same lines in the same order, with equal floats, and bit-identical adapters or weights."""
    keys = ("step", "eval_loss", *SAME)
    first, second = ([[line.get(key) for key in keys] for line in lines_of(run)] for run in (one, two))
    assert first == second
    first, second = map(trained_by, (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(one, two, losses: float = 1e-5) -> None:
    """Losses, norms and counts of every line agree within 1e-5, relative, and the adapters or weights within 1e-3.

    Args:
        losses: the relative tolerance of the first ten steps' losses.
    """
    assert [line["step"] for line in lines_of(one)] == [line["step"] for line in lines_of(two)]
    for a, b in zip(lines_of(one), lines_of(two)):
        for key in {"eval_loss", *SAME} & a.keys():
            rel = losses if key == "loss" and a["step"] <= 10 else 1e-5
            assert b[key] == pytest.approx(a[key], rel=rel), (a["step"], key)
    first, second = map(trained_by, (one, two))
    assert max(relative_error(second[name], first[name]) for name in first) < 1e-3
