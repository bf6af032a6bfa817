"""Whatever is changed of a run, of what was made of it or of its scores is named: by its file, and by line or key."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minorca import UserError, receipts
from minorca.config_file import load_yaml
from minorca.export.adapter import export_adapter
from minorca.export.huggingface import export
from minorca.files.atomic import MANIFEST, write_manifest
from minorca.model.quantization import parse_quantization
from minorca.receipts import CHAIN, FILE, make_line, read_lines
from minorca.replay import __main__ as command
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, metrics, receipt
from tests.replay.conftest import SETTINGS


class Forgery:
    """A change of files, which is undone; `told` is what the message must contain."""

    def __init__(self):
        self.before: dict[Path, bytes] = {}
        self.told: list[str] = []

    def write(self, path: Path, content: bytes | str) -> None:
        self.before.setdefault(path, path.read_bytes())
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def undo(self) -> None:
        for path, content in self.before.items():
            path.write_bytes(content)


def flip_bit(forgery: Forgery, path: Path, draw: random.Random, names: str | None = None) -> None:
    """Flips a bit of a file; in a file of tensors, of a number."""
    content = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
    content[draw.randrange(first, len(content))] ^= 1 << draw.randrange(8)
    forgery.write(path, bytes(content))
    forgery.told = [names or str(path)]


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A finished run that was stopped once, its model exported, and scores."""
    output = place.path / "forged"
    for settings in ({"train.steps": 4}, {"train.steps": 7, "optim.lr": 0.005}):
        train_command.main(place("forged", **SETTINGS | settings))
    folder = tmp_path_factory.mktemp("made")
    export(place.model_path, output / "adapter", folder / "merged")
    written = {
        "results": {task: {"acc,none": 0.25, "acc_stderr,none": 0.01} for task in ("one", "two")},
        "groups": {"both": {"acc,none": 0.25}},
        "n-shot": {"one": 0, "two": 5},
        "suites": {"seed": {"averages": [{"name": "x", "value": 0.5}]}},
    }
    of_weights = receipts.of_weights([place.model_path / "model.safetensors"], [output / "adapter"])
    written["receipt"] = receipts.of_scores(written, of_weights)
    (folder / "scores.json").write_text(json.dumps(written, indent=2))
    return place, output, folder


def forge_row(forgery, made, draw):
    place, output, _ = made
    path = place.path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    n = draw.randrange(len(lines))
    row = json.loads(lines[n])
    key = draw.choice(["question", "response", "system_prompt"])
    row[key] = row[key][:1] + draw.choice("xyz") + row[key][1:]
    lines[n] = json.dumps(row) + "\n"
    forgery.write(path, "".join(lines))
    forgery.told = [f"{path}, line {n + 1}: "]
    return output


def forge_order_of_rows(forgery, made, draw):
    place, output, _ = made
    path = place.path / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    n = draw.randrange(len(lines) - 1)
    lines[n : n + 2] = reversed(lines[n : n + 2])
    forgery.write(path, "".join(lines))
    forgery.told = [f"{path}, line {n + 1}: "]
    return output


def forge_base(forgery, made, draw):
    flip_bit(forgery, made[0].model_path / "model.safetensors", draw, "the base's model.safetensors's sha256")
    return made[1]


def forge_adapter(forgery, made, draw):
    flip_bit(forgery, made[1] / "adapter" / "adapter_model.safetensors", draw)
    return draw.choice([made[1], made[1] / "adapter"])


def forge_adapter_receipt(forgery, made, draw):
    path = made[1] / "adapter" / FILE
    receipt = json.loads(path.read_text())
    receipt["identity"][draw.choice(["optim.lr", "train.seed", "lora.alpha"])] = draw.random()
    forgery.write(path, json.dumps(receipt))
    forgery.told = [f"{path}: "]
    return draw.choice([made[1], made[1] / "adapter"])


def forge_checkpoint(forgery, made, draw):
    """Half of the time with its manifest too."""
    directory = draw.choice(checkpoint.published(made[1] / "checkpoints"))
    names = [path for path in sorted(directory.iterdir()) if path.suffix == ".safetensors"]
    flip_bit(forgery, draw.choice(names), draw)
    if draw.random() < 0.5:
        rewrite_manifest(forgery, directory)
    return made[1]


def rewrite_manifest(forgery: Forgery, directory: Path) -> None:
    before = (directory / MANIFEST).read_bytes()
    (directory / MANIFEST).unlink()
    write_manifest(directory)
    forgery.before[directory / MANIFEST] = before


def forge_setting(forgery, made, draw):
    path = made[1] / "config.yaml"
    values = load_yaml(path.read_text())
    section, key = draw.choice(
        [("optim", "lr"), ("optim", "eps"), ("lora", "alpha"), ("train", "seed"), ("train", "keep"), ("data", "limit")]
    )
    values[section][key] = (values[section][key] or 1) * draw.randint(2, 9)
    if key == "seed":
        values[section][key] = draw.randint(1, 99)
    forgery.write(path, json.dumps(values))
    forgery.told = [f"{path}: {section}.{key} is "]
    return made[1]


def forge_score(forgery, made, draw):
    """A number of a run's metrics, or a line of them removed."""
    path = made[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    n = draw.randrange(len(lines))
    if draw.random() < 0.2:
        del lines[n]
    else:
        values = json.loads(lines[n])
        key = draw.choice([key for key in values if isinstance(values[key], float)])
        values[key] += draw.uniform(0.01, 0.5)
        lines[n] = json.dumps(values) + "\n"
    forgery.write(path, "".join(lines))
    # past the last, there is none
    forgery.told = [f"{path}, line {n + 1}: " if n < len(lines) else f"{path}: lines {n + 1} to "]
    return made[1]


def forge_line_of_the_chain(forgery, made, draw):
    path = made[1] / CHAIN
    lines = path.read_bytes().splitlines(keepends=True)
    n = draw.randrange(len(lines))
    how = draw.choice(["change", "seal", "remove", "repeat", "move"])
    where = n + 1
    if how in ("change", "seal"):
        values = json.loads(lines[n])
        seal = values.pop("sha256")
        values["step"] += 1
        if how == "change":
            lines[n] = json.dumps(values | {"sha256": seal}).encode() + b"\n"
        else:
            lines[n] = make_line(values, values["previous"]).raw
            where = n + 2
    elif how == "remove":
        del lines[n]
    elif how == "repeat":
        lines.insert(n, lines[n])
        where = n + 2
    else:
        n = draw.randrange(len(lines) - 1)
        lines[n : n + 2] = reversed(lines[n : n + 2])
        where = n + 1
    forgery.write(path, b"".join(lines))
    # the last line is what receipt.json names
    forgery.told = [f"{path}, line {where}: " if where <= len(lines) else f"{made[1] / 'adapter' / FILE}: run names"]
    return made[1]


def forge_setting_of_the_chain(forgery, made, draw):
    """With every line sealed anew: the checkpoints, or config.yaml, or receipt.json tell."""
    path = made[1] / CHAIN
    lines, _ = read_lines(path)
    forged, previous = b"", None
    for line in lines:
        values = {key: value for key, value in line.values.items() if key not in ("previous", "sha256")}
        if values["kind"] == "start":
            key = draw.choice(["train.seed", "lora.alpha", "data.seq_len"])
            values["settings"] = values["settings"] | {key: 7}
            values["identity"] = values["identity"] | {key: 7}
        new = make_line(values, previous)
        forged, previous = forged + new.raw, new.values["sha256"]
    forgery.write(path, forged)
    forgery.told = [f"{made[1] / 'config.yaml'}: {key} is "]
    return made[1]


def forge_evaluation(forgery, made, draw):
    path = made[2] / "scores.json"
    written = json.loads(path.read_text())
    place = draw.choice(["results/one/acc,none", "results/two/acc_stderr,none", "groups/both/acc,none", "n-shot"])
    *parts, key = place.split("/")
    if draw.random() < 0.3:
        place, written["receipt"]["base"] = "receipt", {}
    elif parts:
        written[parts[0]][parts[1]][key] += draw.uniform(0.01, 0.5)
    else:
        written[key] = {}
    forgery.write(path, json.dumps(written))
    forgery.told = [f"{path}: {place} "]
    return path


def forge_export(forgery, made, draw):
    path = made[2] / "merged" / draw.choice(["model.safetensors", "config.json", "tokenizer.json"])
    flip_bit(forgery, path, draw)
    return made[2] / "merged"


FORGERIES: list[Callable] = [
    forge_row,
    forge_order_of_rows,
    forge_base,
    forge_adapter,
    forge_adapter_receipt,
    forge_checkpoint,
    forge_setting,
    forge_score,
    forge_line_of_the_chain,
    forge_setting_of_the_chain,
    forge_evaluation,
    forge_export,
]


def check(made, seed: int) -> None:
    draw, forgery = random.Random(seed), Forgery()
    forge = FORGERIES[seed % len(FORGERIES)]
    path = forge(forgery, made, draw)
    try:
        command.main([str(path)])
        message = "nothing was found"
    except UserError as error:
        message = str(error.problems[0])
    finally:
        forgery.undo()
    assert all(told in message for told in forgery.told), (seed, forge.__name__, forgery.told, message)


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_every_forgery_is_named(count, made):
    _, output, folder = made
    honest = [output, output / "adapter", folder / "merged", folder / "scores.json"]
    for path in honest:
        command.main([str(path)])
    for seed in range(count):
        check(made, seed)
    for path in honest:
        command.main([str(path)])


def test_another_number_of_rows_than_digests_are_for(place, monkeypatch):
    """Where a digest is of several rows, one more or less moves all that follow."""
    monkeypatch.setattr(receipt, "BLOCKS", 20)
    train_command.main(place("blocks", **SETTINGS | {"train.steps": 1}))
    path = place.path / "rows.jsonl"
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    command.main([str(place.path / "blocks")])
    for n, forged in ((55, [*lines, lines[0].replace("Reverse", "Mirror")]), (9, lines[:10])):
        path.write_text("".join(forged))
        try:
            with pytest.raises(UserError, match=rf"rows.jsonl: has {n} rows to train on; the run had 54"):
                command.main([str(place.path / "blocks")])
        finally:
            path.write_text(content)


def test_a_line_that_is_changed_while_the_run_goes_on(place, monkeypatch):
    """In place, before a checkpoint: the receipt has it as it is in the file by then."""
    path, record_step = place.path / "meanwhile" / "metrics.jsonl", metrics.Record.step

    def step(record, number, *rest):
        record_step(record, number, *rest)
        if number == 2:
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(content.replace(b'"loss": 5', b'"loss": 4', 1))
            assert path.read_bytes() != content

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Record, "step", step)
        train_command.main(
            place("meanwhile", **SETTINGS | {"train.steps": 4, "data.eval": "null", "train.eval_every": 0})
        )
    message = "metrics.jsonl, lines 1 to 3: is not as the run wrote it, as step-00000003/state.json says"
    with pytest.raises(UserError, match=message):
        command.main([str(place.path / "meanwhile")])


def test_a_score_that_is_there_twice(made, tmp_path):
    """Python takes the last, other parsers the first."""
    path = tmp_path / "scores.json"
    text = (made[2] / "scores.json").read_text()
    path.write_text(text.replace('"acc,none": 0.25', '"acc,none": 0.9, "acc,none": 0.25', 1))
    assert json.loads(path.read_text()) == json.loads(text)
    with pytest.raises(UserError, match="scores.json: is not JSON .duplicate key 'acc,none'"):
        command.main([str(path)])


def test_a_file_that_was_added_and_is_loaded(made, tmp_path):
    """transformers prefers some of them to those that are in the receipt; a card is nobody's weights."""
    merged = shutil.copytree(made[2] / "merged", tmp_path / "merged")
    (merged / "README.md").write_text("A card.")
    command.main([str(merged)])
    for name in ("adapter_model.safetensors", "added_tokens.json", "model.safetensors.index.json", "more/b.jinja"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name}: is not in receipt.json"):
            command.main([str(merged)])
        (merged / name).unlink()


def test_an_adapter_on_another_base_than_that_of_its_training(made, place, tmp_path):
    """Merged into it, or evaluated on it; but a base that was exported from the right one is right."""
    output, other = made[1], tmp_path / "other"
    shutil.copytree(place.model_path, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    export(other, output / "adapter", tmp_path / "wrong")
    message = "base, model.safetensors, is '[0-9a-f]{64}'; the adapter was trained on a base with '[0-9a-f]{64}'"
    with pytest.raises(UserError, match=f"wrong/receipt.json: {message}"):
        command.main([str(tmp_path / "wrong")])
    # an adapter that was exported says so too
    export_adapter(output / "adapter", tmp_path / "adapter")
    written: dict = {"results": {}}
    of_weights = receipts.of_weights([other / "model.safetensors"], [tmp_path / "adapter"])
    written["receipt"] = receipts.of_scores(written, of_weights)
    (tmp_path / "scores.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=f"scores.json: {message}"):
        command.main([str(tmp_path / "scores.json")])
    export(place.model_path, None, tmp_path / "nf4", parse_quantization("nf4"))
    train_command.main(place("nf4", **SETTINGS | {"train.steps": 1, "model.quantize": "nf4"}))
    export(tmp_path / "nf4", place.path / "nf4" / "adapter", tmp_path / "right")
    command.main([str(tmp_path / "right")])


def test_a_file_of_weights_can_carry_a_receipt(made):
    """As metadata: of the base, of the adapter and of its run."""
    place, output, _ = made
    done = {"format": "gguf"}
    weights = receipts.of_weights([place.model_path / "model.safetensors"], [output / "adapter"])
    receipt = json.loads(receipts.as_metadata({"export": done} | weights)["minorca.receipt"])
    lines, _ = read_lines(output / CHAIN)
    assert receipts.is_sealed(receipt) and receipt["export"] == done
    [adapter] = receipt["adapters"]
    assert adapter["receipt"]["run"] == lines[-1].values["sha256"]
    digest = adapter["receipt"]["identity"]["the base's model.safetensors's sha256"]
    assert digest == receipt["base"]["model.safetensors"]
