"""The table of kernels: what is measured becomes a page, a figure and the rows of docs/benchmarks.md."""

import json
import shutil
import subprocess

import pytest
import torch

from benchmarks.plot import plot
from benchmarks.serve_chats import wrong_answers
from benchmarks.table import kernel_targets, page, with_kernels
from minorca import load_model, load_tokenizer, render_chat
from minorca.generate import generate
from tests.helpers import ROOT
from tests.kernels.test_compiled import run


def test_the_table_of_kernels_is_generated():
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    assert "<!-- kernels -->" in document
    assert document == with_kernels(document, ROOT / "benchmarks" / "results"), "python -m benchmarks.table --docs"


@pytest.mark.slow
def test_the_load_finds_answers_of_other_chats(smollm2):
    """And none where each chat has its own."""
    tok = load_tokenizer(smollm2)
    model = load_model(smollm2, torch.float32, "cpu")
    chats = []
    for text in ("Name two colors.", "What is the capital of France?"):
        chats.append([{"role": "user", "content": text}])
        [ids] = generate(model, [render_chat(tok, chats[-1])], 24, stop_ids=tok.stop_ids)
        chats[-1].append({"role": "assistant", "content": tok.decode(ids)})
    assert not any(wrong_answers(model, tok, chat) for chat in chats)
    chats[0][-1], chats[1][-1] = chats[1][-1], chats[0][-1]
    assert [wrong_answers(model, tok, chat) for chat in chats] == [[chat[-1]["content"]] for chat in chats]


def test_kernels(tmp_path):
    """On the CPU, tiny: every case of ours runs, is right, and is shown; only a GPU's figures reach the docs."""
    folder = tmp_path / "results" / "machine-2000-01-01"
    run("-m", "benchmarks.kernels", "--smoke", "--output", folder, check=True, stderr=subprocess.PIPE)
    result = json.loads((folder / "kernels.json").read_text())
    rows = [row for row in result["rows"] if row["provider"] == "ours"]
    assert rows and all(row.get("wrong") is False and row["seconds"]["median"] > 0 for row in rows)
    assert "## Kernels" in page(folder) and plot(folder).stat().st_size
    assert "No GPU" in kernel_targets(folder.parent)

    # made up: no GPU is here
    gpu = result | {"machine": {"device": "a GPU"}, "device_type": "cuda", "smoke": False}
    forward, _, backward, _, *_ = rows
    gpu["rows"] = [row | {"shape": "8192 x 4096", "reached": 0.5} for row in (forward, backward)]
    shutil.copytree(folder, newer := tmp_path / "results" / "gpu-2000-01-02")
    (newer / "kernels.json").write_text(json.dumps(gpu))
    table = kernel_targets(folder.parent)
    assert "a GPU" in table and table.count("**50.0%**") == 2 and "gpu-2000-01-02" in table
