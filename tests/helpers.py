"""What several tests share: small random models in Hugging Face's format, as transformers writes them, and whole runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

ROOT = Path(__file__).parent.parent


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (
        torch.linalg.vector_norm(ours.double() - theirs.double()) / torch.linalg.vector_norm(theirs.double())
    ).item()


class Calls(TorchDispatchMode):
    """Notes the calls of our operators made within it: [(operator, arguments)]."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minorca":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def random_mistral(seed: int = 0, **fields) -> MistralForCausalLM:
    """A small fp32 Mistral of transformers with random weights, norms included (ones would hide a missing weight)."""
    torch.manual_seed(seed)
    config = {
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
    model = get_peft_model(base, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **{"r": 4} | config))
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


def lines_of(output) -> list[dict]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


SAME = ("loss", "grad_norm", "lr", "tokens", "trained_tokens")  # of a step's line: what no machine's speed changes


def training(options, ranks: int = 0, faulty: tuple = (), restarts: int = 0, **popen) -> subprocess.Popen:
    """A run in processes of its own: `ranks` of torchrun, or one without it; `faulty` names the fault that tests/faulty.py makes."""
    program = [str(ROOT / "tests" / "faulty.py"), *map(str, faulty)] if faulty else ["-m", "minorca.train"]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | popen
    return subprocess.Popen([sys.executable, *(launcher if ranks else []), *program, *options], **pipes)


def torchrun(ranks: int, options: list[str]) -> None:
    process = training(options, ranks)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]


def assert_same_bits(one, two) -> None:
    """Every line of both runs once, in order, with the same floats; the same adapters."""
    from safetensors.torch import load_file

    keys = ("step", "eval_loss", *SAME)
    first, second = ([[line.get(key) for key in keys] for line in lines_of(run)] for run in (one, two))
    assert first == second
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(one, two, losses: float = 1e-5) -> None:
    """Losses, norms and counts of every line within 1e-5 relative (of the first ten steps' losses: as given), and adapters that
    tell the same."""
    from safetensors.torch import load_file

    assert [line["step"] for line in lines_of(one)] == [line["step"] for line in lines_of(two)]
    for a, b in zip(lines_of(one), lines_of(two)):
        for key in {"eval_loss", *SAME} & a.keys():
            rel = losses if key == "loss" and a["step"] <= 10 else 1e-5
            assert b[key] == pytest.approx(a[key], rel=rel), (a["step"], key)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert max(relative_error(second[name], first[name]) for name in first) < 1e-3
