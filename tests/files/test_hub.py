"""Models and adapters of the hub: what is downloaded, which commit, without a network, and what goes wrong."""

import errno
import io
import json
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save

from minorca import UserError, load_model, load_tokenizer
from minorca.config import Config, DataConfig, ModelConfig
from minorca.data.tokenizer_files import tokenizer_paths
from minorca.files.adapters import read_adapter_settings
from minorca.files.hub import HubId, local_directory, name_of, parse_id, resolve
from minorca.generate.__main__ import main as generate
from minorca.model.architecture import read_architecture
from minorca.plan.estimate import model_of
from tests.fake_hub import forget
from tests.helpers import ENVIRONMENT, random_adapter, random_mistral, save_tokenizer

TOKENS = torch.arange(20)
# What a repository has beside what is read: pickles, scripts, other programs' weights.
NAMES = (".gitattributes", "README.md", "modeling_x.py", "training_args.bin", "model.gguf", "tf_model.h5")
OTHER = dict.fromkeys(NAMES, b"of no use")


@pytest.fixture
def model(tmp_path):
    """A directory of a model with a tokenizer, and a function that publishes it with other files."""
    directory = tmp_path / "local"
    random_mistral(vocab_size=260).save_pretrained(directory, max_shard_size="100KB")
    save_tokenizer(directory)
    return directory


def files_of(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def logits(path, **options):
    return load_model(path, torch.float32, "cpu", **options)(TOKENS)


def tensors_of(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    shards = [load(content) for name, content in files.items() if name.endswith(".safetensors")]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def pickled(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize("form", ["shards", "shards and more", "numbered", "single", "consolidated", "pickle"])
def test_what_is_read_is_downloaded_and_nothing_else(form, hub, model):
    files = files_of(model)
    shards = {name for name in files if name.startswith("model")}
    weights = {name: files[name] for name in shards}
    tensors = tensors_of(files)
    consolidated = {"consolidated.safetensors": b"the same again", "consolidated.safetensors.index.json": b"{}"}
    pickles = {"pytorch_model.bin": b"the same again", "pytorch_model.bin.index.json": b"{}"}
    wanted = {
        "shards": weights,
        "shards and more": weights,
        "numbered": {name: files[name] for name in shards if not name.endswith(".json")},
        "single": {"model.safetensors": save(tensors, {"format": "pt"})},
        "consolidated": {"consolidated.safetensors": save(tensors, {"format": "pt"})},
        "pickle": {"pytorch_model.bin": pickled(tensors)},
    }[form]
    unwanted = OTHER | {"model-of-another.safetensors": b"", "pytorch_model-of-another.bin": b""}
    if form in ("shards and more", "single", "numbered"):
        unwanted |= consolidated | pickles
    if form == "single":
        unwanted |= weights
    if form == "consolidated":
        unwanted["pytorch_model.bin"] = b"the same again"
    rest = {name: content for name, content in files.items() if name not in shards}
    hub.put("org/name", rest | unwanted | wanted)
    read = load_tokenizer("org/name").encode("a")
    # before weights are read, nothing is downloaded that could not be refused with them
    assert sorted(hub.downloaded()) == sorted(rest)
    assert torch.equal(logits("org/name"), logits(model)) and read == load_tokenizer(model).encode("a")
    assert sorted(hub.downloaded()) == sorted(rest | wanted)


def test_a_plan_needs_no_weights(hub, model):
    hub.put("org/name", model)
    _, arch = model_of(Config(ModelConfig("org/name"), DataConfig("rows.jsonl")))
    assert arch == read_architecture(model) and not [name for name in hub.downloaded() if "safetensors" in name]


def test_every_file_of_a_tokenizer_is_downloaded(hub, tmp_path):
    """All that its reader finds in a directory, it finds in the hub's cache."""
    directory = tmp_path / "local"
    (directory / "additional_chat_templates").mkdir(parents=True)
    names = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1", "tekken.json"]
    names += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]
    names += ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"]
    for name in names:
        (directory / name).write_text("{}")
    hub.put("org/name", directory)
    assert sorted(tokenizer_paths(local_directory("org/name"))) == sorted(tokenizer_paths(directory)) == sorted(names)


def test_an_existing_directory_comes_before_the_hub(hub, model, tmp_path, monkeypatch):
    hub.put("org/name", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "org/name")
    assert logits("org/name").shape == (20, 260) and not hub.requests
    assert parse_id("org/name") is None and parse_id("org/other@v1") == HubId("org/other", "v1")


@pytest.mark.parametrize(
    "path", ["name", "/org/name", "./org/name", "org/name/more", "org/..", "org/name@../x", "a b/c"]
)
def test_what_is_no_hub_id(path, hub):
    assert parse_id(path) is None
    with pytest.raises(UserError, match="no such directory$"):
        load_tokenizer(path)
    assert not hub.requests


def test_branches_tags_and_commits(hub, model):
    """Each its own weights. A branch that moves does so for the next process, not for this one."""
    files = files_of(model)
    random_mistral(1, vocab_size=260).save_pretrained(model.parent / "other")
    other = files_of(model.parent / "other") | {"tokenizer.json": files["tokenizer.json"]}
    first = hub.put("org/name", files)
    hub.repositories["models/org/name"].refs["v1"] = first
    load_tokenizer("org/name")
    second = hub.put("org/name", other)
    here, there = logits(model), logits(model.parent / "other")
    assert torch.equal(logits("org/name"), here) and not torch.equal(here, there)
    forget()
    for revision, expected in (
        ("", there),
        ("@main", there),
        ("@v1", here),
        (f"@{first}", here),
        (f"@{second}", there),
    ):
        assert torch.equal(logits(f"org/name{revision}"), expected)
    assert name_of("org/name@v1") == "name"


def test_a_commit_in_the_cache_needs_no_request(hub, model):
    commit = hub.put("org/name", model)
    expected = logits("org/name")
    hub.requests.clear()
    forget()
    assert torch.equal(logits(f"org/name@{commit}"), expected) and not hub.requests


def offline(monkeypatch):
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_without_a_network_the_cache_is_read(hub, model, monkeypatch, caplog):
    """Where it is complete; else the error says what the cache has, and how to get the rest."""
    first = hub.put("org/name", model)
    expected = logits("org/name")
    second = hub.put("org/name", model, "next")
    load_tokenizer("org/name@next")
    hub.requests.clear()
    offline(monkeypatch)
    with caplog.at_level("INFO", "minorca"):
        assert torch.equal(logits("org/name"), expected)
    assert f"org/name: commit {first} of the cache" in caplog.text and not hub.requests
    with pytest.raises(UserError) as caught:
        load_tokenizer("org/name@v2")
    message = str(caught.value)
    assert message.startswith("org/name@v2: the hub's cache lacks v2, and HF_HUB_OFFLINE is set; it has ")
    assert f"main ({first})" in message and "hf download org/name --revision v2" in message
    with pytest.raises(UserError, match=rf"has not all files of next, .*next \({second}\)"):
        load_model("org/name@next")
    with pytest.raises(
        UserError, match="org/other: no such directory, not in the hub's cache .*hf download org/other;"
    ):
        load_model("org/other")


def test_a_hub_that_is_down_is_not_needed(hub, model, caplog, monkeypatch):
    commit = hub.put("org/name", model)
    expected = logits("org/name")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    for fault in (lambda *_: 500, lambda *_: 503, lambda *_: 0, lambda *_: time.sleep(2)):
        forget()
        hub.fail = fault
        assert torch.equal(logits("org/name"), expected)
    assert caplog.text.count("Could not reach the Hub") == 4 and resolve(HubId("org/name")) == commit


def hide(hub):
    hub.repositories["models/org/name"].private = True


def refused(status):
    """The hub says which commit, and refuses to give its files."""
    return lambda method, path: status if "/tree/" in path else None


# What is asked for, what is wrong with the hub, the message.
FAULTS = {
    "no repository": ("org/nothing", lambda hub: None, "no such directory, and the hub has none of that name"),
    "private": ("org/name", hide, "the hub has none of that name, or it is private: .*hf auth login"),
    "gated": ("org/name", lambda hub: hub.gated.add("org/name"), "gated: accept its terms at http.*hf auth login"),
    "no revision": ("org/name@v9", lambda hub: None, "no revision v9; expected a branch, a tag, or a commit"),
    "down": ("org/name", lambda hub: setattr(hub, "fail", lambda *_: 503), "the hub cannot be reached"),
    "no access": (
        "org/name",
        lambda hub: setattr(hub, "fail", refused(403)),
        "answered 403 Forbidden; the token",
    ),
    "expired token": ("org/name", lambda hub: setattr(hub, "fail", refused(401)), "answered 401 Unauth.*log in again"),
    "too many": (
        "org/name",
        lambda hub: setattr(hub, "fail", refused(409)),
        "the hub answered 409 Conflict; try again",
    ),
    "no id": ("org/na--me", lambda hub: None, "not an id that the hub can have"),
    "other": ("org/name", lambda hub: setattr(hub, "fail", lambda *_: 418), "the hub answered 418"),
    "cut": ("org/name", lambda hub: setattr(hub, "fail", lambda *_: -5), "the hub cannot be reached"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_is_a_line(name, hub, model):
    path, damage, expected = FAULTS[name]
    hub.put("org/name", model)
    damage(hub)
    with pytest.raises(UserError, match=f"^{path}: .*{expected}") as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and len(caught.value.problems) == 1


def test_the_page_of_a_gated_data_set(hub):
    hub.put("org/rows", {"train.jsonl": b"{}"}, kind="datasets")
    hub.gated.add("org/rows")
    with pytest.raises(UserError, match=f"no such file.* accept its terms at {hub.url}/datasets/org/rows, then"):
        resolve(HubId("org/rows"), "dataset")


@pytest.mark.parametrize("settings", [{}, {"config.json": b"{}"}])
def test_a_repository_of_other_files(settings, hub):
    """GGUF files are read from paths; an empty directory is not mistaken for a missing one."""
    hub.put("org/name", {"README.md": b"", "b.Q4_K_M.gguf": b"GGUF", "a.F16.gguf": b"GGUF"} | settings, "v1")
    command = r"hf download org/name --revision v1 a.F16.gguf --local-dir \."
    with pytest.raises(UserError, match=rf"^org/name@v1: on the hub it has no weights that can be read.*: {command}$"):
        local_directory("org/name@v1", weights=True)
    hub.put("org/other", {"README.md": b""})
    with pytest.raises(UserError, match="^org/other: on the hub it has no files of a model.*; it has README.md$"):
        load_tokenizer("org/other")
    assert not [name for name in hub.downloaded() if name.endswith(".gguf")]


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_the_first_rank_alone_shows_a_bar(rank, shown, hub, model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    hub.put("org/name", model)
    download, bars = huggingface_hub.snapshot_download, []

    def noted(*arguments, **options):
        with options["tqdm_class"](total=1, file=Terminal()) as bar:
            bars.append(bool(bar.disable))
        return download(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    monkeypatch.setenv("RANK", rank)
    # a push without a terminal turns them off
    huggingface_hub.utils.enable_progress_bars()
    local_directory("org/name")
    assert bars == [not shown]


def test_a_download_that_breaks_off_goes_on(hub, model, monkeypatch):
    """Nothing half-written is taken for a file, in this process or the next."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.put("org/name", model)
    hub.fail = lambda method, path: -3000 if method == "GET" and path.endswith(".safetensors") else None
    with pytest.raises(UserError, match=r"^org/name: no such directory, and it could not be downloaded \(.*try again"):
        load_model("org/name")
    assert not list((model.parent / "huggingface").rglob("*.safetensors"))
    hub.fail = lambda method, path: None
    assert torch.equal(logits("org/name"), logits(model))


def test_a_full_disk(hub, model, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.put("org/name", model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="the hub's cache cannot be written .*No space left.*set HF_HOME"):
        load_model("org/name")


def test_an_index_may_not_name_what_is_elsewhere(hub, model):
    """Its names are those of files in the repository, and of nothing that lies on this machine."""
    (model.parent / "secret.safetensors").write_bytes(b"x")
    index = {"weight_map": {"a": "../secret.safetensors", "b": "*.py", "c": 5, "d": "modeling_x.py"}}
    files = {name: data for name, data in files_of(model).items() if not name.endswith(".safetensors")}
    hub.put("org/name", files | OTHER | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(UserError, match="names the file"):
        load_model("org/name")
    assert "README.md" not in hub.downloaded()


def test_two_processes_download_a_file_once(hub, model):
    """As the ranks of one machine: huggingface_hub locks each file."""
    hub.put("org/name", model)
    code = "from minorca.files.hub import local_directory; print(local_directory('org/name'))"
    environment = ENVIRONMENT | {"HF_ENDPOINT": hub.url, "HF_HOME": constants.HF_HUB_CACHE.removesuffix("/hub")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    assert ended[0] == ended[1] and not ended[0][1]
    assert sorted(hub.downloaded()) == sorted(set(hub.downloaded())) != []


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_adapters(suffix, hub, model, tmp_path, capsys):
    """Their own files alone; the model's weights are downloaded for the model."""
    random_adapter(random_mistral(vocab_size=260), tmp_path / "adapter", ["q", "v"])
    files = files_of(tmp_path / "adapter") | OTHER
    if suffix == "bin":
        files["adapter_model.bin"] = pickled(load(files.pop("adapter_model.safetensors")))
    hub.put("org/adapter", files | {"model.safetensors": b"the same, merged"})
    hub.put("org/name", model)
    assert read_adapter_settings("org/adapter").rank == 4
    assert sorted(hub.downloaded()) == ["adapter_config.json", f"adapter_model.{suffix}"]
    adapter = tmp_path / "adapter"
    assert torch.equal(logits("org/name", adapter="org/adapter"), logits(model, adapter=adapter))
    said = []
    for options in (["--model", "org/name", "--adapter", "org/adapter"], ["--model", model, "--adapter", adapter]):
        generate([*map(str, options), "--prompt", "abc", "--raw", "--max-new-tokens", "8"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "\n"
