"""A finished run, and the command that replays it."""

import json
import shutil
from pathlib import Path

import pytest

from minorca.replay import __main__ as command
from minorca.train import __main__ as train_command
from tests.helpers import Workplace, random_mistral, save_tokenizer, without_curves, write_rows

SETTINGS = {
    "train.steps": 10,
    "train.checkpoint_every": 3,
    "train.keep": 3,
    "lora.dropout": 0.1,
    "data.eval": 0.1,
    "train.eval_every": 4,
    "train.batch_tokens": 256,
}


@pytest.fixture(scope="module", autouse=True)
def curves():
    with without_curves():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """As `workplace`, with a model that can be quantized, and pairs of answers."""
    path = tmp_path_factory.mktemp("place")
    sizes = {"vocab_size": 260, "intermediate_size": 128, "num_hidden_layers": 1, "sliding_window": 24}
    model = random_mistral(**sizes, initializer_range=0.08)
    model.save_pretrained(path / "model")
    save_tokenizer(path / "model")
    write_rows(path / "rows.jsonl")
    with (path / "pairs.jsonl").open("w") as file:
        for line in (path / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            pair = {"system": "", "question": row["question"], "chosen": row["response"], "rejected": "no"}
            file.write(json.dumps(pair) + "\n")
    return Workplace(path, path / "model", model)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """A finished run, which tests do not change."""
    train_command.main(place("finished", **SETTINGS))
    return place.path / "finished"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def replay(capsys):
    """replay(path, *options): what is printed."""

    def replayed(*options) -> str:
        capsys.readouterr()
        command.main(list(map(str, options)))
        return capsys.readouterr().out

    return replayed
