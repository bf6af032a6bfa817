"""QLoRA: training on a base in NF4 follows PEFT and bitsandbytes, on any number of ranks, and resumes exactly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minorca import UserError
from minorca.train import __main__ as train_command
from minorca.train import build
from minorca_kernels import NF4Weight
from tests.helpers import (
    Workplace,
    assert_same_bits,
    assert_same_run,
    lines_of,
    relative_error,
    save_tokenizer,
    torchrun,
)
from tests.train.test_train import config_of, initial_adapters, train_in_peft

QLORA = {"model.quantize": "nf4", "lora.dropout": 0.1}


@pytest.fixture
def qlora(workplace, save_mistral) -> Workplace:
    """As `workplace`, with a model whose rows are made of whole blocks."""
    sizes = {"vocab_size": 260, "intermediate_size": 128, "sliding_window": 24}
    directory, model = save_mistral(**sizes, tie_word_embeddings=True, initializer_range=0.08)
    save_tokenizer(directory)
    return Workplace(workplace.path, directory, model)


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
    options = place("followed", **{"train.steps": 30, "model.quantize": "nf4"} | settings)
    config = config_of(options)
    started = initial_adapters(monkeypatch)
    train_command.main(options)
    ours = [line["loss"] for line in lines_of(place.path / "followed")]
    dtype = getattr(torch, config.model.dtype)
    model = quantized_by_bitsandbytes(Path(config.model.path), dtype, config.model.double_quant)
    theirs, _ = train_in_peft(model, place.path / "followed" / "adapter", started, config)
    differences = torch.tensor(ours) - torch.tensor(theirs)
    print(config.model.dtype, differences.abs().max(), differences.mean(), differences.abs().mean())
    assert differences.abs().max() < 1e-2 and differences.abs().mean() < 1e-3
    return ours


@pytest.mark.parametrize("double_quant", [True, False])
def test_thirty_steps_follow_peft_and_bitsandbytes(double_quant, qlora, monkeypatch):
    ours = follow_peft(qlora, monkeypatch, **{"model.double_quant": double_quant, "optim.lr": 0.003})
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thirty_steps_of_smollm2(dtype, smollm2, workplace, monkeypatch):
    """The same on real weights."""
    settings = {"model.path": smollm2, "model.dtype": dtype, "train.batch_tokens": 128, "optim.lr": 1e-3}
    ours = follow_peft(workplace, monkeypatch, **settings)
    assert ours[-1] < 0.8 * ours[0]
