"""Adapters that are loaded and unloaded while the server runs, against the same adapters in `generate`."""

import json
import re
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from minorca import load_model, load_tokenizer
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.model.build import load_adapters, read_adapter
from tests.generate.test_engine import ids, run
from tests.helpers import random_adapter, random_mistral
from tests.serve.test_serve import IN_FP32, assert_error, greedy, prompt_of, save_endless, serving, talker  # noqa: F401

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An endless model, and three adapters below loras/."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_endless(directory)
    loras = directory.parent / "loras"
    for name, targets in (("one", ("q", "v", "down")), ("two", ("k", "up")), ("nested/three", ("o", "gate"))):
        random_adapter(random_mistral(vocab_size=260), loras / name, targets)
    random_adapter(random_mistral(vocab_size=260), directory.parent / "outside", ("q",))
    return directory


@pytest.fixture(scope="module")
def loras(directory):
    return directory.parent / "loras"


@pytest.fixture(scope="module")
def server(directory, loras):
    options = ("--model", directory, "--adapter", f"start={loras / 'two'}", "--slots", 2, "--runtime-adapters", loras)
    with serving(*options, program=("-c", IN_FP32)) as server:
        yield server


def load(server, name: str, path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)


def unload(server, name: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name})


def names(server) -> list[str]:
    return [model.id for model in server.client().models.list()]


def answer(server, directory, name: str, new: int = 24) -> str:
    """A greedy answer to the prompt of `expected`."""
    asked = {"model": name, "prompt": prompt_of(directory), "max_tokens": new, "temperature": 0, "logprobs": 0}
    response = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def expected(directory, adapter: Path | None, new: int = 24) -> str:
    options = {} if adapter is None else {"adapter": adapter}
    return load_tokenizer(directory).decode(greedy(directory, [prompt_of(directory)], new, **options)[0])


def test_loaded_adapters_answer_as_from_the_start(server, directory, loras):
    """One beside others, one by an absolute path, and after another had the same name and prompt."""
    assert load(server, "first", "one").status_code == 200
    assert load(server, "third", loras / "nested" / "three").status_code == 200
    assert names(server) == ["tiny", "start", "first", "third"]
    wanted = {"tiny": None, "start": loras / "two", "first": loras / "one", "third": loras / "nested" / "three"}
    texts = {name: expected(directory, adapter) for name, adapter in wanted.items()}
    assert len(set(texts.values())) == 4
    assert {name: answer(server, directory, name) for name in wanted} == texts
    assert unload(server, "first").status_code == 200
    assert names(server) == ["tiny", "start", "third"]
    assert load(server, "first", "nested/three").status_code == 200
    assert answer(server, directory, "first") == texts["third"]
    for name in ("first", "third"):
        assert unload(server, name).status_code == 200
    assert {name: answer(server, directory, name) for name in ("tiny", "start")} == {
        name: texts[name] for name in ("tiny", "start")
    }


def test_running_requests_keep_their_adapter(server, directory, loras):
    """While it is unloaded, and while another takes its name; one of them waits for a slot."""
    load(server, "busy", "one")
    asked = {"model": "busy", "prompt": prompt_of(directory), "max_tokens": 200, "temperature": 0, "stream": True}
    client = server.client()
    streams = [client.completions.create(**asked) for _ in range(3)]
    texts = [next(iter(stream)).choices[0].text for stream in streams[:2]]
    assert unload(server, "busy").status_code == 200
    assert "busy" not in names(server)
    assert load(server, "busy", "two").status_code == 200
    for i, stream in enumerate(streams):
        rest = "".join(chunk.choices[0].text for chunk in stream)
        assert (texts[i] if i < 2 else "") + rest == expected(directory, loras / "one", 200)
    assert answer(server, directory, "busy") == expected(directory, loras / "two")
    unload(server, "busy")


def write_damaged(loras: Path) -> dict[str, str]:
    """Adapters that cannot be loaded, below `loras`; the message about each."""

    def copy(name: str, change=lambda tensors: tensors, **fields) -> None:
        shutil.copytree(loras / "one", loras / name)
        save_file(change(load_file(loras / "one" / TENSORS)), loras / name / TENSORS)
        config = loras / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))

    copy("infinite", lambda tensors: {key: value * torch.inf for key, value in tensors.items()})
    copy("narrow", lambda tensors: {key: value[:, 1:].contiguous() for key, value in tensors.items()})
    copy("huge", r=2**20)
    copy("template")
    (loras / "template" / "minorca.json").write_text('{"template": "mistral-v3"}')
    copy("cut")
    (loras / "cut" / TENSORS).write_bytes((loras / "cut" / TENSORS).read_bytes()[:-9])
    head = {"base_model.model.lm_head.weight": torch.zeros(260, 64)}
    copy("head", lambda tensors: tensors | head, modules_to_save=["lm_head"])
    (loras / "empty").mkdir()
    return {
        "infinite": "infinite: .*NaN or infinite",
        "narrow": f"narrow/{TENSORS}: .*shape",
        "huge": f"huge/{TENSORS}: .*shape",
        "template": "mistral-v3 needs the control token",
        "cut": f"cut/{TENSORS}: not a whole safetensors file",
        "head": "head: trains rows or all of head",
        "empty": "empty: no adapter_config.json",
    }


def test_what_cannot_be_loaded(server, directory, loras):
    """Is a 400 that names the file as the client named its directory, and leaves the server as it was."""
    for path, message in write_damaged(loras).items():
        error = assert_error(load(server, "bad", path))
        assert error["param"] == "lora_path" and re.search(message, error["message"]), error
    assert names(server) == ["tiny", "start"]
    assert answer(server, directory, "start") == expected(directory, loras / "two")


def test_only_directories_below_the_one_that_was_given(server, directory, loras):
    (loras / "link").symlink_to(directory.parent / "outside")
    (loras / "loop").symlink_to(loras / "loop")
    (loras / "inside").symlink_to(loras / "one")
    outside = (
        [".", "", "..", "../outside", "one/../../outside", directory.parent / "outside", loras, "/", "/etc", "link"]
        + ["link/../outside", "loop", "nowhere", f"one/{TENSORS}", "a\0b", "a" * 5000, "~", "//", "/dev/zero"]
        + [f"{loras}-other", f"{loras}/../outside", "/proc/self/cwd"]
    )
    for path in outside:
        error = assert_error(load(server, "bad", path))
        assert error["param"] == "lora_path" and "below that of --runtime-adapters" in error["message"], path
    assert load(server, "good", "inside").status_code == 200
    unload(server, "good")
    assert names(server) == ["tiny", "start"]


def test_names(server):
    for name in ("tiny", "start"):
        assert assert_error(load(server, name, "one"))["param"] == "lora_name"
    for name in ("nobody", "tiny"):
        assert assert_error(unload(server, name), 404)["param"] == "lora_name"
    for body in (
        {},
        {"lora_name": "", "lora_path": "one"},
        {"lora_name": "a" * 257, "lora_path": "one"},
        {"lora_name": 1, "lora_path": "one"},
        {"lora_name": "a"},
    ):
        assert_error(httpx.post(f"{server.url}/v1/load_lora_adapter", json=body))
    for body in (b'{"lora_name": "\\ud800", "lora_path": "one"}', b'{"lora_name": "a", "lora_path": "\\ud800"}'):
        headers = {"Content-Type": "application/json"}
        assert_error(httpx.post(f"{server.url}/v1/load_lora_adapter", content=body, headers=headers))
    assert names(server) == ["tiny", "start"]


def test_without_the_option_there_is_no_such_path(talker, loras):  # noqa: F811
    with serving("--model", talker) as server:
        assert_error(load(server, "one", loras / "one"), 404)
        assert_error(unload(server, "talker"), 404)


# -------------------------------------------------------------------------------------------------------------- engine


@pytest.fixture
def engine(directory, loras):
    model = load_model(directory, torch.float32, "cpu")
    return Engine(model, 2, 200, load_adapters(model, {"one": loras / "one"}))


def test_an_engines_adapters_come_and_go_between_steps(engine, directory, loras):
    """A request that runs meanwhile has the bits of an engine in which nothing changes."""
    prompt = prompt_of(directory)
    (alone,) = run(engine, Request(prompt, 40, logprobs=0))
    running = Request(prompt, 40, logprobs=0)
    engine.add(running)
    tokens = [token for _ in range(5) for token in engine.step()]
    engine.add_adapter("two", read_adapter(engine.model, loras / "two", "cpu"))
    tokens += [token for _ in range(5) for token in engine.step()]
    engine.remove_adapter("one")
    while engine.busy:
        tokens += engine.step()
    assert [(token.id, token.logprob) for token in tokens] == [(token.id, token.logprob) for token in alone]
    assert engine.adapters == ["two"]
    (theirs,) = greedy(directory, [prompt], 20, adapter=loras / "two")
    assert ids(run(engine, Request(prompt, 20, adapter="two"))[0]) == theirs
    engine.remove_adapter("two")
    assert all(projection.row_lora is None for _, projection in engine.model.projections())


def test_an_engines_adapter_in_use_stays_and_names_are_not_used_again(engine, directory, loras):
    engine.add(Request(prompt_of(directory), 5, adapter="one"))
    for _ in range(2):
        with pytest.raises(ValueError, match="uses the adapter one"):
            engine.remove_adapter("one")
        engine.step()
    while engine.busy:
        engine.step()
    engine.remove_adapter("one")
    with pytest.raises(ValueError, match=r"\['one'\]"):
        engine.add_adapter("one", read_adapter(engine.model, loras / "two", "cpu"))
    assert engine.adapters == []


def test_an_adapter_that_does_not_fit_changes_nothing(engine, directory, loras, monkeypatch):
    loras_by_place = read_adapter(engine.model, loras / "two", "cpu")
    (before,) = run(engine, Request(prompt_of(directory), 20, adapter="one"))

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("minorca.model.row_lora.RowLoRA.beside", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.add_adapter("two", loras_by_place)
    monkeypatch.undo()
    assert engine.adapters == ["one"]
    assert ids(run(engine, Request(prompt_of(directory), 20, adapter="one"))[0]) == ids(before)
    engine.add_adapter("two", loras_by_place)
    assert engine.adapters == ["one", "two"]
