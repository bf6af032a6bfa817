"""What is pushed to the hub: in one commit, with a card that is true, safe and silent about this machine."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModelForCausalLM

from minorca import UserError, load_model
from minorca.config import Config, DataConfig, ModelConfig, TrainConfig
from minorca.config_file import config_text, load_yaml
from minorca.export.__main__ import main as export
from minorca.export.adapter import named_base
from minorca.export.card import _training, code_block, plain, read_origin, table
from minorca.export.run_commands import run_commands
from minorca.export.run_record import last_part, read_run_record, without_paths
from minorca.files.hub import HubId
from minorca.train.__main__ import main as train
from minorca.train.output import claim, write_settings
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
    # readers take some of them instead of what is pushed, and transformers the adapter's base
    names = ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    names += ["consolidated.safetensors", "params.json", "adapter_config.json", "adapter_model.safetensors"]
    old = dict.fromkeys([*names, "tokenizer.model"], b"{}")
    writer.put("org/new", old | {"model.gguf": b"x", "notes.md": b"mine"})
    options = ["--model", "org/base", "--adapter", run / "adapter", "--output", tmp_path / "out", "--push", "org/new"]
    export([*map(str, options)])
    files = pushed(writer)
    assert {"model.safetensors", "config.json", "notes.md", "model.gguf"} < files.keys()
    assert not old.keys() & files.keys() and len(writer.messages) == 1
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    data = card_of(files).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")
    assert json.loads(files["receipt.json"])["export"]["hub"] == [f"org/base@{commit}"]
    forget()
    merged = load_model("org/new", torch.float32, "cpu")(TOKENS)
    expected = load_model("org/base", torch.float32, "cpu", adapter=run / "adapter")(TOKENS)
    assert torch.allclose(merged, expected, atol=1e-4)
    # another layout, whose names come after those of the first
    options = ["--model", workplace.model_path, "--output", tmp_path / "base", "--format", "consolidated"]
    export([*map(str, options), "--push", "org/new"])
    forget()
    base = load_model("org/new", torch.float32, "cpu")(TOKENS)
    assert torch.allclose(base, load_model(workplace.model_path, torch.float32, "cpu")(TOKENS), atol=1e-4)
    files = pushed(writer).keys() - {".gitattributes"}
    assert files - {path.name for path in (tmp_path / "base").iterdir()} == {"notes.md", "model.gguf", "curves.png"}


def test_an_adapter_leaves_a_model_alone(writer, workplace, tmp_path):
    """Its repository may have the merged weights too."""
    random_adapter(workplace.model, tmp_path / "adapter", ["q"])
    model = {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.model": b"x"}
    writer.put("org/new", model | {"adapter_model.bin": b"x"})
    options = ["--model", "org/base", "--adapter", str(tmp_path / "adapter"), "--adapter-only"]
    export([*options, "--output", str(tmp_path / "out"), "--push", "org/new"])
    assert model.keys() < pushed(writer).keys() and "adapter_model.bin" not in pushed(writer)


def test_private_is_not_public(writer, workplace, tmp_path):
    """Refused before anything is written where everybody can read the repository."""
    writer.put("org/new", {"notes.md": b""})
    options = ["--model", str(workplace.model_path), "--push", "org/new", "--private"]
    with pytest.raises(UserError, match="^--private makes a private repository, and org/new is a public one"):
        export([*options, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not writer.messages
    writer.repositories["models/org/new"].private = True
    export([*options, "--output", str(tmp_path / "out")])
    assert writer.messages and writer.repositories["models/org/new"].private


def test_an_adapter_whose_base_is_a_directory(writer, workplace, tmp_path, monkeypatch):
    """Is not published under a name that means nothing elsewhere: --model gives the id, also of a base of which there
    is a directory of that name.
    """
    random_adapter(workplace.model, tmp_path / "adapter", ["q"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/home/me/model"}))
    options = ["--adapter", str(tmp_path / "adapter"), "--adapter-only", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="names a directory of this machine as its base; give .* --model ORG/NAME"):
        export([*options, "--push", "org/new"])
    assert not (tmp_path / "out").exists() and "models/org/new" not in writer.repositories
    export([*options, "--push", "org/new", "--model", "org/base"])
    assert json.loads(pushed(writer)["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", str(tmp_path / "adapter"), "--adapter-only", "--output", str(tmp_path / "here")]
    export([*options, "--push", "org/new", "--model", "org/base@v1"])
    written = json.loads(pushed(writer)["adapter_config.json"])
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", "v1")
    assert named_base("here") == HubId("org/base", "v1") and named_base("adapter") is None


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
    if name != "no permission":
        writer.put("org/new", {"adapter_model.bin": b"x"})
    output = tmp_path / "an output"
    options = ["--model", "org/base", "--adapter", str(tmp_path / "adapter"), "--adapter-only", "--output", str(output)]
    with pytest.raises(UserError, match=f"the push to org/new failed: .*{expected}") as caught:
        export([*options, "--push", "org/new"])
    again = shlex.split(str(caught.value).partition("to push again: ")[2])
    stale = ["--delete=adapter_model.bin"] if name != "no permission" else []
    assert again == ["hf", "upload", "org/new", str(output), ".", *stale]
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in output.iterdir()}
    # all or nothing: an answer that is cut off may be to a commit that was made
    there = pushed(writer).keys() if "models/org/new" in writer.repositories else set()
    assert there in (set(), {"adapter_model.bin"}, {path.name for path in output.iterdir()} if name == "cut" else set())


def test_what_cannot_be_pushed_is_refused_before_anything_is_written(hub, workplace, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    options = ["--model", str(workplace.model_path), "--output", str(tmp_path / "out")]
    for more, expected in (
        (["--push", "org/new"], "--push needs a token that may write: log in with hf auth login"),
        (["--push", "new"], "--push is new; expected ORG/NAME"),
        (["--push", "org/a--b"], "--push is org/a--b; expected ORG/NAME"),
        (["--push", "org/a."], "--push is org/a.; expected ORG/NAME"),
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


def test_the_record_of_a_run(tmp_path, monkeypatch):
    """Sources of one name stay apart, weights of the best step say so, and what is set aside is not of all steps."""
    settings = TrainConfig(output=str(tmp_path / "run"), keep_best=True, eval_every=1)
    config = Config(ModelConfig("/models/base"), DataConfig(["/a/x.jsonl", "/b/x.jsonl"], 0.1), train=settings)
    config.output.mkdir()
    rows = {"/a/x.jsonl": {"read": 20}, "/b/x.jsonl": {"read": 5}}
    write_settings(config, claim(config, False, rows=rows))
    lines = [{"step": step, "tokens": 4, "trained_tokens": 2} for step in (1, 2)]
    lines += [{"step": step, "eval_loss": loss} for step, loss in enumerate((2.0, 1.0, 1.5))]
    (config.output / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    record = read_run_record(config.output / "adapter")
    assert record and (record.steps, record.tokens) == (2, 8)
    text = "\n".join(_training(record))
    assert "| x.jsonl | read | 20 |" in text and "| x.jsonl | read | 5 |" in text
    assert "The weights are those after step 1," in text and "| last | 2 | 1.5000 |" in text
    assert read_run_record(config.output / "adapter-before-step-00000002") is None
    # a directory's name, also where it is given as .
    (config.output / "adapter").mkdir()
    monkeypatch.chdir(config.output / "adapter")
    assert read_origin("org/base@" + "a" * 40, ["."], False, False).adapter_name == "adapter"


def test_the_commands_of_a_card(workplace, tmp_path, capsys):
    """Its Python runs as it stands, whether there is a chat template or not, and whether an adapter has a tokenizer."""
    base = HubId("org/base")
    random_adapter(workplace.model, workplace.path / "adapter", ["q"])

    def run(directory, alone):
        for _, language, text in run_commands(directory, "org/new", base, alone):
            yield text
            if language == "python":
                code = text.replace("org/new", str(directory)).replace("org/base", str(workplace.model_path))
                exec(code.replace(', device_map="auto"', ""), {})

    adapter = tmp_path / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(workplace.model_path)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    template = workplace.model_path / "chat_template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    text = "\n".join([*run(workplace.model_path, False), *run(adapter, True)])
    assert "--model org/new --chat" in text and "--adapter org/new --chat" in text
    template.unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workplace.model_path / name, adapter / name)
    text = "\n".join([*run(workplace.model_path, False), *run(adapter, True)])
    assert text.count('org/new --prompt "Once upon a time" --raw') == 2 and "chat" not in text
    assert capsys.readouterr().out


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
