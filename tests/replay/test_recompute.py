"""A run's steps, computed again, are the run's to the bit; what is not is named, also where the receipt was forged."""

import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch

from minorca import UserError, receipts
from minorca.files.atomic import MANIFEST, sha256, write_manifest
from minorca.receipts import CHAIN, make_line, read_lines, short_digest
from minorca.replay import __main__ as command
from minorca.train import __main__ as train_command
from minorca.train import checkpoint, loop
from tests.helpers import ENVIRONMENT, Workplace, torchrun
from tests.replay.conftest import SETTINGS
from tests.train.test_resume import stop_in


def test_steps_are_the_same_to_the_bit(place, replay, monkeypatch):
    """From a checkpoint and from the start, across a resume with another rate, to the end; the run is left alone."""
    run = place.path / "resumed"
    stop_in(8, place("resumed", **SETTINGS), monkeypatch)
    train_command.main(place("resumed", **SETTINGS, **{"optim.lr": 0.002}))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # the checkpoint of step 3 was removed
    whole = replay(run, "--steps", "5:10")
    assert "from the start to step 10" in whole
    assert "steps 1 to 10 are the run's, to the bit: 14 lines" in whole and "checkpoints (4)" in whole
    part = replay(run, "--steps", "7:8")
    assert "from step-00000006 to step 8" in part and "steps 7 to 8 are the run's, to the bit: 3 lines" in part
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_another_machine_is_said_and_compared_within_a_tolerance(finished, replay, monkeypatch):
    monkeypatch.setattr(receipts, "versions", lambda: {"minorca": "0.3.0", "code": "12"})
    found = replay(finished, "--steps", "6:8")
    assert "not the same kind of machine: code was" in found and "within a relative 0.001, tensors not at all" in found
    assert "steps 7 to 8 are the run's, to the bit: 3 lines" in found
    # another result than rounding gives
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.5)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 9: lr is .*; step 7, computed again, has 0.5"):
        replay(finished, "--steps", "6:8")


def test_what_cannot_be_computed_is_said(finished, replay, tmp_path):
    with pytest.raises(UserError, match="--steps has steps up to 10; expected no later one"):
        replay(finished, "--steps", "9:11")
    for steps in ("9", "9:9", "a:b", "9:8"):
        with pytest.raises(UserError, match="expected two steps, the first before the last"):
            replay(finished, "--steps", steps)
    with pytest.raises(UserError, match="has neither receipt.jsonl nor receipt.json"):
        replay(tmp_path)
    with pytest.raises(UserError, match="adapter: has no receipt.jsonl, by which a run's steps are compared"):
        replay(finished / "adapter", "--steps", "1:2")
    with pytest.raises(UserError, match="nowhere: no such file"):
        replay(tmp_path / "nowhere")


def test_files_that_have_moved(place, run, replay, tmp_path):
    shutil.copytree(place.path, tmp_path / "place")
    elsewhere = place.path.rename(place.path.with_name("elsewhere"))
    try:
        with pytest.raises(UserError, match="model: no such directory"):
            replay(run)
        places = ["--model.path", tmp_path / "place" / "model", "--data.train", tmp_path / "place" / "rows.jsonl"]
        assert "are as the receipt says" in replay(run, *places)
    finally:
        elsewhere.rename(place.path)


def forge(run, step: int, change) -> None:
    """Changes the line of a step in metrics.jsonl, and everything that vouches for it."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    n = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == step and b'"loss"' in line)
    values = json.loads(lines[n])
    change(values)
    lines[n] = (json.dumps(values) + "\n").encode()
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    chain, _ = read_lines(run / CHAIN)
    forged, previous = b"", None
    for line in chain:
        old = {key: value for key, value in line.values.items() if key not in ("previous", "sha256")}
        if "metrics" in old:
            first = old["metrics"]["first"] - 1
            covered = lines[first : first + len(old["metrics"]["lines"])]
            old["metrics"]["lines"] = [short_digest(each) for each in covered]
        path = checkpoint.path_of(run / "checkpoints", old["step"])
        if old["kind"] == "checkpoint" and path.exists():
            state = json.loads((path / "state.json").read_text())
            size = len(b"".join(lines[: first + len(covered)]))
            sha = receipts.hashlib.sha256(b"".join(lines)[:size]).hexdigest()
            state |= {"receipt": previous, "metrics_bytes": size, "metrics_sha256": sha}
            (path / "state.json").write_text(json.dumps(state))
            (path / MANIFEST).unlink()
            write_manifest(path)
            old["files"]["state.json"] = sha256(path / "state.json")
        new = make_line(old, previous)
        forged, previous = forged + new.raw, new.values["sha256"]
    (run / CHAIN).write_bytes(forged)
    receipt = json.loads((run / "adapter" / receipts.FILE).read_text())
    receipt = receipts.sealed({key: value for key, value in receipt.items() if key != "sha256"} | {"run": previous})
    (run / "adapter" / receipts.FILE).write_text(json.dumps(receipt))


def test_a_forger_who_writes_every_receipt_anew_is_found_out_by_computing(run, replay):
    for key in ("tokens", "loss"):

        def change(values, key=key):
            values[key] = values[key] + 1 if key == "tokens" else math.nextafter(values[key], 0)

        forge(run, 8, change)
        # digests alone do not say so
        assert "are as the receipt says" in replay(run)
        with pytest.raises(UserError, match=rf"metrics.jsonl, line 10: {key} is .*; step 8, computed again, has"):
            replay(run, "--steps", "7:8")


# ------------------------------------------------------------------------------------------------------ honest replays

CHOICES = {
    "lora.dropout": (0.0, 0.1),
    "lora.targets": ("[q, k, v, o, gate, up, down]", "[q, v]"),
    "lora.rank": (2, 5),
    "data.packing": ("true", "false"),
    "data.train_on": ("response", "all"),
    "model.dtype": ("float32", "bfloat16"),
    "model.quantize": ("none", "nf4"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.warmup_ratio": ("null", 0.2),
    "train.seed": (0, 1, 2),
    "train.checkpoint_every": (1, 2, 3),
    "train.keep": (1, 2, 9),
    "parallel.activation_checkpointing": ("none", "full"),
}
KINDS = ("adapters", "dpo", "full", "new tokens", "kto")


def draw_settings(draw: random.Random, place: Workplace, ranks: int) -> dict:
    settings = {key: draw.choice(values) for key, values in CHOICES.items()}
    settings |= {"train.steps": draw.randint(3, 5), "train.batch_tokens": 256}
    if draw.random() < 0.5:
        settings |= {"data.eval": 0.1, "train.eval_every": 2, "train.keep_best": draw.choice(["true", "false"])}
    kind = draw.choice(KINDS[:1] if ranks else KINDS)
    if kind in ("dpo", "kto"):
        rows = {"data.train": place.path / "pairs.jsonl", "data.format": "preference", "train.objective": kind}
        settings |= rows | {"data.train_on": "response", "lora.dropout": 0.0}
        settings |= {"dpo.precompute": draw.choice(["true", "false"])} if kind == "dpo" else {}
    elif kind == "full":
        settings = {key: value for key, value in settings.items() if not key.startswith(("lora.", "model.quantize"))}
        settings |= {"train.full": "true", "lora.rank": 16}
    elif kind == "new tokens":
        settings |= {"train.new_tokens": '["<new>"]'}
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_an_honest_run_raises_no_alarm(seed, place, capsys, monkeypatch):
    """Fifty configurations drawn at random, some stopped and resumed, one of them on two ranks."""
    draw, ranks, run = random.Random(seed), 2 * (seed == 49), place.path / "run"
    settings = draw_settings(draw, place, ranks)
    shutil.rmtree(run, ignore_errors=True)
    steps = settings["train.steps"]
    if ranks:
        torchrun(ranks, place(**settings))
    else:
        for step in sorted(draw.sample(range(2, steps + 1), draw.choice([0, 0, 1, 2]))):
            stop_in(step, place(**settings), monkeypatch)
            settings |= {"optim.lr": draw.choice([0.01, 0.02])}
        train_command.main(place(**settings))
    first = draw.randrange(steps)
    asked = [str(run), "--steps", f"{first}:{draw.randint(first + 1, steps)}"]
    capsys.readouterr()
    if ranks:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = [*program, "-m", "minorca.replay", *asked]
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, (settings, done.stderr[-3000:])
        printed = done.stdout
    else:
        command.main(asked)
        printed = capsys.readouterr().out
    assert "are the run's, to the bit" in printed and "not the same kind" not in printed, settings


@pytest.mark.cuda
def test_on_a_gpu(place, replay):
    settings = SETTINGS | {"train.deterministic": "true", "model.dtype": "bfloat16"}
    try:
        train_command.main(place("deterministic", **settings))
        assert "to the bit" in replay(place.path / "deterministic", "--steps", "6:10")
    finally:
        torch.use_deterministic_algorithms(False)
