"""The environment of all tests, and their fixtures."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# this test run renders rows into a cache of its own
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name

import pytest
import torch

from minorca.signals import STOPPING
from tests.fake_hub import fake_hub
from tests.helpers import ROOT, Workplace, random_mistral, save_tokenizer, write_rows

torch.set_num_threads(1)
# A shell starts background processes with SIGINT ignored, which would be inherited by the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The documents' commands come first: those that are slow keep one of two processes at work half of the time."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(autouse=True)
def signal_handlers():
    """A command that ends by a signal ignores all further ones, which the next test's processes would inherit."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, *STOPPING)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def log_level():
    """Commands set the level of the log, which is that of the next test too."""
    log = logging.getLogger("minorca")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's real weights and tokenizer, as examples/make_model.py makes them."""
    directory = ROOT / "examples" / "model"
    if not directory.exists():
        subprocess.run([sys.executable, ROOT / "examples" / "make_model.py", directory], check=True)
    return directory


def filled_with_nan(allocate):
    """The allocator, whose floating-point tensors are filled with NaN."""

    def allocate_nan(*arguments, **options):
        tensor = allocate(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Fills uninitialized memory with NaN, so that elements that a kernel does not write are detected."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled_with_nan(getattr(owner, name)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, the only one, with an empty cache."""
    with fake_hub(monkeypatch, tmp_path / "huggingface") as hub:
        yield hub


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty ~/.cache of the test's own, where the directories that GGUF files stand for are kept."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


@pytest.fixture
def save_mistral(tmp_path):
    """save_mistral(**fields): a directory in Hugging Face's layout, and transformers' model, which it holds."""

    def save(seed: int = 0, shard_size: str = "5GB", **fields):
        model = random_mistral(seed, **fields)
        directory = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(directory, max_shard_size=shard_size)
        return directory, model

    return save


@pytest.fixture
def workplace(save_mistral, tmp_path) -> Workplace:
    """A small random model with a tokenizer, and 60 rows in OpenOrca's format."""
    directory, model = save_mistral(vocab_size=260, sliding_window=24, tie_word_embeddings=True, initializer_range=0.08)
    save_tokenizer(directory)
    write_rows(tmp_path / "rows.jsonl")
    return Workplace(tmp_path, directory, model)
