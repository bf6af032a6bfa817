"""The environment of all tests, and their fixtures."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory()  # rendered rows of this run of the tests, and nobody else's
os.environ["XDG_CACHE_HOME"] = CACHE.name

import pytest
import torch

from tests.helpers import ROOT, random_mistral, save_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's real weights and tokenizer, as examples/make_model.py makes them."""
    directory = ROOT / "examples" / "model"
    if not directory.exists():
        subprocess.run([sys.executable, ROOT / "examples" / "make_model.py", directory], check=True)
    return directory


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """New memory holds NaN: what a kernel forgets to write shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):

        def allocate(*arguments, original=getattr(owner, name), **options):
            tensor = original(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, allocate)


@pytest.fixture
def save_mistral(tmp_path):
    """save_mistral(**fields) -> (directory in Hugging Face's layout, transformers' model)."""

    def save(seed: int = 0, shard_size: str = "5GB", **fields):
        model = random_mistral(seed, **fields)
        directory = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory, max_shard_size=shard_size)
        return directory, model

    return save


@pytest.fixture
def workplace(save_mistral, tmp_path):
    """A model with a tokenizer, OpenOrca-like rows, and `options(...)`: the command line of a short run on them."""
    import json
    import random

    directory, model = save_mistral(vocab_size=260, sliding_window=24, tie_word_embeddings=True, initializer_range=0.08)
    save_tokenizer(directory)
    (tmp_path / "empty.yaml").write_text("{}")  # not the quickstart
    draw = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(60):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            system = draw.choice(["", "Be brief."])
            file.write(
                json.dumps(
                    {"id": f"t0.{n}", "system_prompt": system, "question": f"Reverse {word}", "response": word[::-1]}
                )
                + "\n"
            )

    def options(output: str = "run", **settings) -> list[str]:
        settings = {
            "model.path": directory,
            "model.dtype": "float32",
            "data.train": tmp_path / "rows.jsonl",
            "data.seq_len": 128,
            "lora.rank": 4,
            "optim.lr": 0.01,
            "train.batch_tokens": 512,
            "train.micro_batch_tokens": 128,
            "train.output": tmp_path / output,
        } | settings
        return [
            "--config",
            str(tmp_path / "empty.yaml"),
            *(t for key, value in settings.items() for t in (f"--{key}", str(value))),
        ]

    options.model, options.path = model, tmp_path
    return options
