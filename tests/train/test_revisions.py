"""Runs on models, adapters and rows of the hub: they record commits, and resume with the same."""

import json

import pytest

from minorca import UserError
from minorca.config import Config, DataConfig, ModelConfig, TrainConfig
from minorca.config_file import load_yaml
from minorca.data.sources import at_commit
from minorca.train.__main__ import main as train
from minorca.train.output import claim
from minorca.train.revisions import pin
from tests.fake_hub import forget
from tests.helpers import SAME, lines_of, random_adapter, random_mistral

# The learning rate of a step does not follow from how many there are.
CONSTANT = {"optim.schedule": "constant"}


def settings_of(output) -> dict:
    return load_yaml((output / "config.yaml").read_text())


def test_a_run_resumes_with_the_commits_it_began_with(hub, workplace):
    """Though the branch has moved to other weights; and what it writes says which commit."""
    first = hub.put("org/name", workplace.model_path)
    train(workplace(**{"model.path": "org/name", "train.steps": 2} | CONSTANT))
    output = workplace.path / "run"
    assert settings_of(output)["model"]["path"] == f"org/name@{first}"
    written = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/name", first)
    other = random_mistral(5, vocab_size=260, sliding_window=24, tie_word_embeddings=True)
    other.save_pretrained(workplace.path / "other")
    (workplace.path / "other" / "tokenizer.json").write_bytes((workplace.model_path / "tokenizer.json").read_bytes())
    second = hub.put("org/name", workplace.path / "other")
    forget()
    train(workplace(**{"model.path": "org/name", "train.steps": 4} | CONSTANT))
    train(workplace("straight", **{"train.steps": 4} | CONSTANT))
    resumed, straight = (
        [{key: line.get(key) for key in SAME} for line in lines_of(workplace.path / name) if "loss" in line]
        for name in ("run", "straight")
    )
    assert resumed == straight and settings_of(output)["model"]["path"] == f"org/name@{first}"
    # a commit or a branch that the settings name now is meant
    for revision in (second, "main"):
        forget()
        with pytest.raises(UserError, match="model.safetensors's sha256 was"):
            train(workplace(**{"model.path": f"org/name@{revision}", "train.steps": 6} | CONSTANT))
    # a run that has no checkpoint yet begins with what is there now
    train(workplace("new", **{"model.path": "org/name", "train.steps": 1}))
    assert settings_of(workplace.path / "new")["model"]["path"] == f"org/name@{second}"


def test_a_model_and_a_data_set_of_one_name(hub, workplace):
    """Each goes on at its own commit."""
    model = hub.put("org/name", workplace.model_path)
    rows = hub.put("org/name", {"train.jsonl": b"{}"}, kind="datasets")
    settings = TrainConfig(output=str(workplace.path / "run"))
    given = Config(ModelConfig("org/name"), DataConfig("org/name", ["org/name:train.jsonl"]), train=settings)
    config, revisions = pin(given)
    assert (config.model.path, config.data.train) == (f"org/name@{model}", f"org/name@{rows}")
    assert config.data.eval == [f"org/name@{rows}:train.jsonl"]
    config.output.mkdir()
    claim(config, False, revisions)
    (config.output / "checkpoints" / "step-00000001").mkdir()
    hub.put("org/name", {"config.json": b"{}"})
    hub.put("org/name", {"train.jsonl": b"{ }"}, kind="datasets")
    forget()
    assert pin(given) == (config, revisions)


def test_adapters_to_start_from(hub, workplace):
    random_adapter(workplace.model, workplace.path / "adapter", ["q", "v"])
    commit = hub.put("org/adapter", workplace.path / "adapter", "v1")
    options = {"lora.targets": "[q, v]", "lora.alpha": 8, "train.steps": 1}
    losses = []
    for name, init in (("a", "org/adapter@v1"), ("b", workplace.path / "adapter")):
        train(workplace(name, **options, **{"lora.init": init}))
        losses.append([line["loss"] for line in lines_of(workplace.path / name) if "loss" in line])
    assert losses[0] == losses[1] and settings_of(workplace.path / "a")["lora"]["init"] == f"org/adapter@{commit}"


@pytest.mark.slow
def test_rows_of_a_revision(hub, workplace, monkeypatch):
    """`datasets` reads them at the commit; the run records it."""
    rows = (workplace.path / "rows.jsonl").read_bytes()
    first = hub.put("org/rows", {"train.jsonl": rows, "README.md": b""}, kind="datasets")
    # it may have been imported offline
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(workplace.path / "datasets"))
    train(workplace(**{"data.train": "org/rows:train.jsonl", "train.steps": 1}))
    hub.put("org/rows", {"train.jsonl": rows[:2000].rpartition(b"\n")[0], "README.md": b""}, kind="datasets")
    forget()
    train(workplace(**{"data.train": "org/rows:train.jsonl", "train.steps": 2}))
    output = workplace.path / "run"
    assert settings_of(output)["data"]["train"] == f"org/rows@{first}:train.jsonl"
    straight = workplace("straight", **{"train.steps": 2})
    train(straight)
    names = ("run", "straight")
    resumed, local = ([line["loss"] for line in lines_of(workplace.path / name) if "loss" in line] for name in names)
    assert resumed == local
    with pytest.raises(UserError, match="org/rows@v9.*no revision v9"):
        train(workplace("other", **{"data.train": "org/rows@v9"}))


def test_only_hub_ids_are_looked_up(hub, workplace, monkeypatch):
    monkeypatch.chdir(workplace.path)
    for name in ("rows.jsonl", "./rows", "*.jsonl", "nowhere.jsonl", "/a/b"):
        assert at_commit(name) is None
    assert not hub.requests
