"""A bar appears for what takes long, on a terminal alone and on the first rank alone."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers import ENVIRONMENT

# files are read slowly, and bars appear after 0.1 instead of two seconds
SLOW = """
import functools, sys, time
import tqdm, minorca.progress
real = minorca.progress.tqdm
minorca.progress.tqdm = lambda *arguments, **options: real(*arguments, **options | {"delay": 0.1, "mininterval": 0})
def slowly(owner, name):
    function = getattr(owner, name)
    def call(*arguments, **options):
        time.sleep(0.15)
        return function(*arguments, **options)
    setattr(owner, name, call)
"""
LOADING = """
from minorca.files.weights import ModelFiles
slowly(ModelFiles, "read")
from minorca.model.build import load_model
load_model(sys.argv[1], device="cpu")
"""
HASHING = """
from pathlib import Path
from minorca.files import atomic
slowly(atomic.Path, "open")
atomic.verify_manifest(Path(sys.argv[1]))
"""
EVALUATION = """
from minorca.train import __main__ as train, evaluation, precompute, checkpoint
slowly(evaluation, "batch_sums")
slowly(evaluation, "local_batch")
slowly(precompute, "local_batch")
slowly(checkpoint.Path, "rename")
train.main(sys.argv[1:])
"""
GENERATION = """
from minorca.generate import engine
from minorca.generate.engine import Engine
slowly(Engine, "step")
engine.CHUNK = 16
from minorca.generate.request import Request
from minorca.model.build import load_model
model = load_model(sys.argv[1], device="cpu")
engine = Engine(model, 1, 300, chunk=32)
for token in engine.stream(Request(list(range(3, 103)) * 2, 2)):
    print("token", flush=True)
"""


def run(script: str, *arguments, on_terminal: bool, **environment) -> str:
    """What a script writes to standard error."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW + script, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal if on_terminal else subprocess.PIPE,
    )
    os.close(terminal)
    written = b""
    if on_terminal:
        try:
            while more := os.read(controller, 4096):
                written += more
        # of Linux, once the process has ended
        except OSError:
            pass
    os.close(controller)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, (written, err)
    return (written or err or b"").decode()


@pytest.fixture
def model(save_mistral) -> Path:
    return save_mistral()[0]


def test_loading_weights(model):
    assert "loading weights: " in run(LOADING, model, on_terminal=True)
    assert run(LOADING, model, on_terminal=False) == ""


@pytest.mark.slow
def test_only_the_first_rank_has_bars(model):
    assert run(LOADING, model, on_terminal=True, RANK="1") == ""


@pytest.mark.slow
def test_checksums(tmp_path):
    from minorca.files.atomic import write_manifest

    directory = tmp_path / "files"
    directory.mkdir()
    for n in range(4):
        (directory / f"{n}.bin").write_bytes(bytes(3 * 2**20))
    write_manifest(directory)
    assert "reading checksums: " in run(HASHING, directory, on_terminal=True)
    assert run(HASHING, directory, on_terminal=False) == ""


@pytest.mark.slow
def test_a_long_prompt(model):
    assert "reading the prompt: " in run(GENERATION, model, on_terminal=True)
    assert run(GENERATION, model, on_terminal=False) == ""


@pytest.mark.slow
def test_held_out_rows(workplace):
    options = workplace(**{"data.eval": 0.3, "train.steps": 1, "train.micro_batch_tokens": 128})
    assert "held-out loss: " in run(EVALUATION, *options, on_terminal=True)


@pytest.mark.slow
def test_the_reference(workplace, tmp_path):
    rows = '{"prompt": "a", "chosen": "bcd", "rejected": "dcb"}\n' * 30
    (tmp_path / "rows.jsonl").write_text(rows)
    options = {"data.format": "preference", "train.objective": "dpo", "dpo.precompute": True, "train.steps": 1}
    assert "reference: " in run(EVALUATION, *workplace(**options), on_terminal=True)
