"""What is pushed to the hub: in one commit, with a card that is true, safe and silent about this machine."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModelForCausalLM

from minorca import UserError, load_model
from minorca.config import Config, DataConfig, ModelConfig, TrainConfig
from minorca.config_file import config_text, load_yaml
from minorca.export.__main__ import main as export
from minorca.export.card import code_block, plain, read_origin, table
from minorca.export.run_record import last_part, without_paths
from minorca.train.__main__ import main as train
from tests.fake_hub import forget
from tests.helpers import random_adapter

TOKEN = "hf_secretsecretsecret"
TOKENS = torch.arange(20)


@pytest.fixture
def writer(hub, monkeypatch):
    """The hub, with a token that may write there."""
    hub.tokens = {TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def pushed(hub, name="org/new") -> dict[str, bytes]:
    repository = hub.repositories[f"models/{name}"]
    return repository.commits[repository.refs["main"]]


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def trained(hub, workplace, **settings) -> tuple[str, Path]:
    """The base's commit, and the directory of a run on it."""
    commit = hub.put("org/base", workplace.model_path)
    options = {"model.path": "org/base", "train.steps": 2, "data.eval": 0.1, "data.limit": 40}
    train(workplace(**options | settings))
    return commit, workplace.path / "run"


def test_an_adapter_of_a_run(writer, workplace, tmp_path, monkeypatch):
    """Alone and in one commit; PEFT and this engine load it from the hub with its base, at the run's commit."""
    commit, run = trained(writer, workplace)
    scores = tmp_path / "scores.json"
    results = {"answers": {"alias": "answers", "acc,none": 0.25, "acc_stderr,none": 0.125, "acc_norm,strict": 0.5}}
    scores.write_text(json.dumps({"results": results, "n-shot": {"answers": 5}, "minorca": {}}))
    output = tmp_path / "out"
    options = ["--adapter", run / "adapter", "--adapter-only", "--output", output, "--scores", scores]
    export([*map(str, options), "--push", "org/new", "--private"])
    files = pushed(writer)
    repository = writer.repositories["models/org/new"]
    assert writer.messages == ["Export of minorca"] and len(repository.commits) == 2 and repository.private
    assert files.keys() - {".gitattributes"} == {path.name for path in output.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "minorca.json", "curves.png"} < files.keys()
    # of the run's receipt
    last = (run / "receipt.jsonl").read_text().splitlines()[-1]
    [adapter] = json.loads(files["receipt.json"])["adapters"]
    assert adapter["receipt"]["run"] == json.loads(last)["sha256"]
    card = card_of(files)
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("org/base", "adapter", "peft")
    assert "license" not in data and "language" not in data
    values = {(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.get("eval_results")}
    assert values == {("answers", "acc", 0.25), ("answers", "acc_norm (strict)", 0.5)}
    assert "| answers | 5 | acc | 0.25 ± 0.12 |" in card.text and "| rows.jsonl | read | 40 |" in card.text
    settings = load_yaml(re.findall("```yaml\n(.*?)```", card.text, re.S)[0])
    assert settings["model"]["path"] == f"org/base@{commit}" and settings["data"]["train"] == "rows.jsonl"
    assert f"--model org/base@{commit} --adapter org/new" in card.text and "vllm serve org/base" in card.text
    assert "llama" not in card.text.lower()
    for secret in (TOKEN, str(tmp_path), f"{Path.home()}/"):
        assert not [name for name, content in files.items() if secret.encode() in content], secret
    forget()
    monkeypatch.delenv("HF_TOKEN")
    writer.tokens = {""}
    theirs = AutoPeftModelForCausalLM.from_pretrained("org/new", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    ours = load_model("org/base", torch.float32, "cpu", adapter="org/new")(TOKENS)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_merged_weights(writer, workplace, tmp_path):
    """Replace the weights of another form that the repository has, and leave its other files alone."""
    commit, run = trained(writer, workplace)
    old = {"model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    writer.put("org/new", old | {"model.gguf": b"x"})
    options = ["--model", "org/base", "--adapter", run / "adapter", "--output", tmp_path / "out", "--push", "org/new"]
    export([*map(str, options)])
    files = pushed(writer)
    assert {"model.safetensors", "config.json", "notes.md", "model.gguf"} < files.keys()
    assert not old.keys() - {"notes.md"} & files.keys() and len(writer.messages) == 1
    data = card_of(files).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")
    assert json.loads(files["receipt.json"])["export"]["hub"] == [f"org/base@{commit}"]
    forget()
    merged = load_model("org/new", torch.float32, "cpu")(TOKENS)
    expected = load_model("org/base", torch.float32, "cpu", adapter=run / "adapter")(TOKENS)
    assert torch.allclose(merged, expected, atol=1e-4)


def test_an_adapter_whose_base_is_a_directory(writer, workplace, tmp_path):
    """Is not published under a name that means nothing elsewhere: --model gives the id."""
    random_adapter(workplace.model, tmp_path / "adapter", ["q"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/home/me/model"}))
    options = ["--adapter", str(tmp_path / "adapter"), "--adapter-only", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="names a directory of this machine as its base; give .* --model ORG/NAME"):
        export([*options, "--push", "org/new"])
    assert not (tmp_path / "out").exists() and "models/org/new" not in writer.repositories
    export([*options, "--push", "org/new", "--model", "org/base"])
    assert json.loads(pushed(writer)["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def at_the_commit(fault):
    return lambda method, path: fault if "/commit/" in path else None


# What is wrong with the hub, the message.
FAILURES = {
    "no permission": (lambda hub: hub.tokens.clear(), "answered 403 .*log in with hf auth login as one who may"),
    "down": (lambda hub: setattr(hub, "fail", at_the_commit(418)), "the hub answered 418"),
    "cut": (lambda hub: setattr(hub, "fail", at_the_commit(-3)), "Error"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_push_that_fails_leaves_all_here(name, writer, workplace, tmp_path):
    """The directory is complete, the hub has nothing of it, and the message has the command that pushes it."""
    random_adapter(workplace.model, tmp_path / "adapter", ["q"])
    damage, expected = FAILURES[name]
    damage(writer)
    output = tmp_path / "out"
    options = ["--model", "org/base", "--adapter", str(tmp_path / "adapter"), "--adapter-only", "--output", str(output)]
    with pytest.raises(
        UserError, match=f"the push to org/new failed: .*{expected}.*hf upload org/new {output} ."
    ) as caught:
        export([*options, "--push", "org/new"])
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in output.iterdir()}
    # all or nothing: an answer that is cut off may be to a commit that was made
    there = pushed(writer).keys() - {".gitattributes"} if "models/org/new" in writer.repositories else set()
    assert there in (set(), {path.name for path in output.iterdir()} if name == "cut" else set())


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(hub, workplace, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    options = ["--model", str(workplace.model_path), "--output", str(tmp_path / "out")]
    for more, expected in (
        (["--push", "org/new"], "--push needs a token that may write: log in with hf auth login"),
        (["--push", "new"], "--push is new; expected ORG/NAME"),
        (["--private"], "--private needs --push"),
        (["--adapter-only"], "--adapter-only needs one --adapter"),
    ):
        with pytest.raises(UserError, match=expected):
            export([*options, *more])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push needs a network"):
        export([*options, "--push", "org/new"])
    (tmp_path / "scores.json").write_text('{"results": {}}')
    with pytest.raises(UserError, match="scores.json: holds no results"):
        read_origin(str(workplace.model_path), [], False, False, [str(tmp_path / "scores.json")])
    assert not (tmp_path / "out").exists() and not hub.requests


def test_text_of_others_is_no_markup():
    """Names of data sets, tasks and columns: neither markdown nor HTML nor Jinja nor YAML."""
    hostile = "a|b\n---\n# x <script>alert(1)</script> [l](http://e) `c` {{ 7 * 7 }} ![i](u) @me"
    assert "\n" not in plain(hostile)
    assert re.sub(r"\\[\\`*_{}\[\]<>#|~&$!:@]", "", plain(hostile)).isprintable()
    assert not re.search(r"(?<!\\)[`*_{}\[\]<>#|~&$!:@]", plain(hostile))
    assert len(table(["x"], [[hostile]]).splitlines()) == 3
    fenced = code_block("```\n````\nx").splitlines()
    assert fenced[0] == fenced[-1] == "`" * 5


def test_settings_without_paths():
    commit = "a" * 40
    config = Config(
        ModelConfig("/home/me/models/base"),
        DataConfig(["~/rows.jsonl", f"org/rows@{commit}:x.jsonl", "models/org"], store="/scratch/me/store"),
        train=TrainConfig(output="/home/me/runs/a", resume="/home/me/runs/b/checkpoints/step-00000001", wandb="secret"),
    )
    text = config_text(without_paths(config))
    assert "/home" not in text and "me" not in re.split(r"\W", text) and "secret" not in text and "scratch" not in text
    assert f"org/rows@{commit}:x.jsonl" in text and last_part("models/org") == "org"
