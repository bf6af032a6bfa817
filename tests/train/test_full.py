"""Training all weights: transformers' losses, the files of a run, exact resume, and AdamW in 8 bits."""

import importlib.util
import json
import shutil
import signal
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import minorca.files.tensor_files
from minorca import UserError, load_model
from minorca.cli import config_parser, parse_config
from minorca.data.packing import plan_epoch
from minorca.export.huggingface import export
from minorca.files.tensor_files import open_exactly, write_tensors
from minorca.files.weights import open_model
from minorca.train import __main__ as train_command
from minorca.train import checkpoint
from minorca.train.build import build
from minorca.train.inputs import read_data, read_tokenizer
from minorca.train.optim import learning_rate
from minorca.train.ranks import init_distributed
from minorca.train.step import forward_backward, local_batch
from minorca.train.trainable import gather
from tests.helpers import (
    Workplace,
    assert_same_bits,
    assert_same_run,
    gradients_of,
    lines_of,
    relative_error,
    torchrun,
    training,
)
from tests.train.test_resume import stop_in

FULL = {"train.full": "true", "lora.rank": 16, "optim.lr": 0.001}


@pytest.fixture
def optimizer(request) -> str:
    if request.param == "adamw_8bit":
        pytest.importorskip("torchao")
    return request.param


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fifty_steps_follow_transformers_losses(tied, save_mistral, workplace, tmp_path):
    """On the same rows, every step's loss is within 1e-3 of that of transformers' model; norms are trained too."""
    if not tied:
        fields = {"vocab_size": 260, "sliding_window": 24, "tie_word_embeddings": False, "initializer_range": 0.08}
        directory, model = save_mistral(seed=1, **fields)
        for file in workplace.model_path.glob("tokenizer*"):
            shutil.copy(file, directory)
        workplace = Workplace(workplace.path, directory, model)
    settings = {"train.steps": 50, "optim.warmup_steps": 5, "optim.weight_decay": 0.1, "train.batch_tokens": 256}
    options = workplace(**FULL | settings)
    _, config = parse_config(config_parser("test", ""), options)
    train_command.main(options)
    ours = [line["loss"] for line in lines_of(tmp_path / "run")]

    theirs = workplace.model.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    store, _ = read_data(config, *read_tokenizer(config))
    steps = [step for epoch in range(50) for step in plan_epoch(store.lengths, 128, 2, True, 0, epoch)][:50]
    for n, micro_batches in enumerate(steps, 1):
        rows = [store.row(row) for micro_batch in micro_batches for row in micro_batch]
        trained = sum(mask.sum() for _, mask in rows)
        total = 0.0
        # one row at a time, without packing and with PyTorch's loss
        for ids, mask in rows:
            labels = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
            logits = theirs(torch.tensor(ids).long()[None]).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, 50, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(total - ours[n - 1]) <= 1e-3, f"step {n}"
    assert ours[-1] < 0.7 * ours[0]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    expected = dict(theirs.named_parameters())
    assert saved.keys() == expected.keys()
    assert max(relative_error(saved[name], expected[name]) for name in saved) < 1e-3


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_finished_run_leaves_a_model(workplace, tmp_path, monkeypatch):
    """In bf16, in several files: transformers loads it, computes the same, and a checkpoint is the same in fp32."""
    monkeypatch.setattr(minorca.files.tensor_files, "FILE_BYTES", 60_000)
    settings = FULL | {"train.steps": 3, "model.dtype": "bfloat16"}
    train_command.main(workplace(**settings))
    output = tmp_path / "run" / "model"
    assert len(list(output.glob("model-0000?-of-0000?.safetensors"))) > 2
    assert (output / "chat_template.jinja").exists()
    theirs = AutoModelForCausalLM.from_pretrained(output)
    assert theirs.dtype == torch.bfloat16
    tokens = torch.arange(20, 70)
    ours = load_model(output, torch.float32, "cpu")
    assert relative_error(ours(tokens), theirs.float()(tokens[None]).logits[0]) < 1e-5

    masters = open_model(checkpoint.published(tmp_path / "run" / "checkpoints")[-1])
    assert AutoModelForCausalLM.from_pretrained(masters.directory).dtype == torch.float32
    final = open_model(output)
    changed = 0
    for name in final.files.files:
        stored, master = (files.files.read(name, 0, files.files.shape(name)[0]) for files in (final, masters))
        assert master.dtype == torch.float32 and stored.dtype == torch.bfloat16
        assert torch.equal(master.to(torch.bfloat16), stored)
        changed += not torch.equal(workplace.model.state_dict()[name].to(torch.bfloat16), stored)
    # each norm and projection has learned
    assert changed == len(final.files.files)

    export(output, None, tmp_path / "exported")
    again = open_model(tmp_path / "exported").files
    assert all(torch.equal(again.read(name, 0, 1), final.files.read(name, 0, 1)) for name in again.files)
    # another run starts from a checkpoint
    start = masters.directory
    train_command.main(workplace("further", **settings | {"model.path": start, "train.steps": 1}))


def test_a_dry_run_says_what_it_takes(workplace, tmp_path, capsys):
    train_command.main([*workplace(**FULL), "--dry-run"])
    printed = capsys.readouterr().out
    assert "0.00 GB of float32 weights" in printed
    assert "78,400 trained values, their gradients and AdamW's moments, divided among the ranks" in printed
    assert not (tmp_path / "run").exists()


def test_tensors_are_written_as_they_come(tmp_path, monkeypatch):
    """The host holds those of one file and one more, however many there are."""
    monkeypatch.setattr(minorca.files.tensor_files, "FILE_BYTES", 1000)
    made: list[weakref.ref] = []
    alive = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(12):
            tensor = torch.full((100,), float(number))
            made.append(weakref.ref(tensor))
            alive.append(sum(reference() is not None for reference in made))
            yield f"t{number}", tensor

    write_tensors(tmp_path / "t.safetensors", tensors())
    assert max(alive) == 3 and len(list(tmp_path.glob("t-0000?-of-00006.safetensors"))) == 6
    files = open_exactly(tmp_path / "t.safetensors", {f"t{number}": (100,) for number in range(12)})
    assert all(files.read(f"t{number}", 99, 100).item() == number for number in range(12))


# ---------------------------------------------------------------------------------------------------- exact resumption


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"], indirect=True)
def test_stopped_it_goes_on_to_the_same_bits(optimizer, workplace, tmp_path, monkeypatch):
    """The best weights so far are part of a checkpoint, as the best adapter is."""
    settings = FULL | {"optim.name": optimizer, "train.steps": 6, "optim.lr": 0.03, "train.batch_tokens": 256}
    settings |= {"train.checkpoint_every": 2, "data.eval": 0.1, "train.eval_every": 2, "train.keep_best": "true"}
    train_command.main(workplace("whole", **settings))
    stop_in(5, workplace("stopped", **settings), monkeypatch)
    train_command.main(workplace("stopped", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    best = json.loads((tmp_path / "stopped" / "model" / "best.json").read_text())
    assert best == json.loads((tmp_path / "whole" / "model" / "best.json").read_text())
    assert best["eval_loss"] == min(line["eval_loss"] for line in lines_of(tmp_path / "whole") if "eval_loss" in line)


def test_new_tokens_are_trained_with_all_weights(workplace, tmp_path, monkeypatch):
    """The model that a run leaves has rows for them, and so have its checkpoints."""
    settings = FULL | {"train.new_tokens": "[<a>, <b>, <c>]", "train.steps": 4, "train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings))
    stop_in(3, workplace("stopped", **settings), monkeypatch)
    train_command.main(workplace("stopped", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stopped" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stopped" / "model")
    ids = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>"])
    assert ids == [258, 259, 260] and theirs.get_input_embeddings().num_embeddings == 261


def test_another_optimizer_does_not_resume(workplace):
    pytest.importorskip("torchao")
    settings = FULL | {"train.steps": 1}
    train_command.main(workplace(**settings))
    with pytest.raises(UserError, match="optim.name was 'adamw' in the checkpoint and is 'adamw_8bit' now"):
        train_command.main(workplace(**settings, **{"optim.name": "adamw_8bit"}))
    with pytest.raises(UserError, match="another train.output, and model.path .*step-00000001"):
        train_command.main(workplace(**settings, **{"train.seed": 1}))


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(workplace, tmp_path):
    """Killed while it writes each file of a checkpoint: the weights, and AdamW's moments."""
    settings = FULL | {"train.steps": 12, "train.checkpoint_every": 2}
    train_command.main(workplace("whole", **settings))
    options = workplace("killed", **settings)
    for point, count in (("in a write", 2), ("before the manifest", 2), ("after the rename", 1)):
        process = training(options, faulty=(point, count))
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    train_command.main(options)
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


# -------------------------------------------------------------------------------------------------------- several ranks

# 3 micro-batches a step, so that in every step one of two ranks has a micro-batch less than the other
RANKED = FULL | {"train.steps": 12, "train.batch_tokens": 384, "data.eval": 0.1, "train.checkpoint_every": 6}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, sharding",
    [("adamw", {}), ("adamw", {"replicate": 2}), ("adamw_8bit", {"cpu_offload": "true"})],
    indirect=["optimizer"],
    ids=str,
)
def test_two_ranks_give_one_ranks_losses(optimizer, sharding, workplace, tmp_path):
    """Where 8 bits hold the moments, their blocks are the same, however rows are divided."""
    settings = RANKED | {"optim.name": optimizer}
    train_command.main(workplace("one", **settings))
    torchrun(2, workplace("two", **settings, **{f"parallel.{key}": value for key, value in sharding.items()}))
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, before, after", [("adamw", 1, 3), ("adamw_8bit", 2, 1)], indirect=["optimizer"], ids=str
)
def test_a_run_resumes_on_another_number_of_ranks(optimizer, before, after, workplace, tmp_path):
    settings = RANKED | {"optim.name": optimizer, "train.eval_every": 4, "train.keep_best": "true"}
    torchrun(before, workplace("one", **settings))
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-00000012")
    shutil.rmtree(tmp_path / "moved" / "model")
    torchrun(after, workplace("moved", **settings))
    assert_same_run(tmp_path / "one", tmp_path / "moved")


# ------------------------------------------------------------------------------------------------------ recomputation


def test_gradients_are_reduced_after_each_micro_batch(workplace):
    """They are in the sharded parameters before the step's last one, so that no rank holds those of all weights."""
    _, config = parse_config(config_parser("test", ""), workplace(**FULL))
    with init_distributed(60) as world:
        learner = build(config, open_model(config.model.path), world)
        store, _ = read_data(config, *read_tokenizer(config))
        batch = local_batch(store, [np.arange(2)], 0, world.device)
        found = []
        for _ in range(2):
            forward_backward(learner, batch, {"tokens": 100}, last=False)
            gradients = gather(gradients_of(learner.trainable.parameters).items(), world)
            found.append({name: gradient.clone() for name, gradient in gradients})
    assert all(torch.equal(2 * gradient, found[1][name]) for name, gradient in found[0].items())


class Products(TorchDispatchMode):
    """Counts the matrix products in its block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func == torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_no_bit(workplace):
    """And of a layer's four products, selective recomputes gate_up alone; full leaves out down, which nothing reads."""
    found = {}
    for kind in ("none", "selective", "full"):
        options = workplace(**FULL | {"parallel.activation_checkpointing": kind})
        _, config = parse_config(config_parser("test", ""), options)
        with init_distributed(60) as world:
            learner = build(config, open_model(config.model.path), world)
            store, _ = read_data(config, *read_tokenizer(config))
            learner.model.train()
            with Products() as products:
                batch = local_batch(store, [np.arange(4)], 0, world.device)
                sums = forward_backward(learner, batch, {"tokens": 100}, True)
            gradients = dict(gather(gradients_of(learner.trainable.parameters).items(), world))
        found[kind] = sums["loss"], gradients, products.count
    loss, expected, plain = found["none"]
    for kind, again in (("selective", 1), ("full", 3)):
        other_loss, gradients, products = found[kind]
        assert loss == other_loss and all(torch.equal(expected[name], gradients[name]) for name in expected)
        assert products - plain == again * len(learner.model.layers), kind


# ----------------------------------------------------------------------------------------------------- AdamW in 8 bits


def test_moments_in_8_bits_are_those_of_torchao():
    """Where a row has whole blocks of 256, a step gives torchao's own bits; moments take a quarter of the memory."""
    torchao = pytest.importorskip("torchao.optim")
    from minorca.train.adamw_8bit import AdamW8bit

    torch.manual_seed(0)
    start = torch.randn(32, 512)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [kind([p], lr=0.01, weight_decay=0.1) for kind, p in ((AdamW8bit, ours), (torchao.AdamW8bit, theirs))]
    for _ in range(3):
        gradient = torch.randn_like(start)
        for optimizer, p in zip(optimizers, (ours, theirs)):
            p.grad = gradient.clone()
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        assert torch.equal(ours, theirs)
    moments = optimizers[0].moments(ours)
    assert sum(t.nbytes for t in moments.values()) == 2 * (start.numel() + start.numel() // 256 * 4)


@pytest.mark.parametrize("shape", [(48, 96), (260, 64), (7, 10), (64,)])
def test_moments_of_any_shape_are_saved_and_set(shape):
    """A step from moments that were saved gives the same bits; each row's moments are its own."""
    pytest.importorskip("torchao")
    from minorca.train.adamw_8bit import AdamW8bit

    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = torch.randn(3, *shape)

    def updated(rows: slice, saved_after: int | None) -> Tensor:
        p = nn.Parameter(start[rows].clone())
        optimizer = AdamW8bit([p], lr=0.1, weight_decay=0.0)
        for step, gradient in enumerate(gradients):
            p.grad = gradient[rows].clone()
            optimizer.step()
            if step == saved_after:
                again = AdamW8bit([p], lr=0.1, weight_decay=0.0)
                again.set_moments(p, optimizer.moments(p), step + 1)
                optimizer = again
        return p.detach()

    whole = updated(slice(None), None)
    assert torch.equal(whole, updated(slice(None), 1))
    assert torch.equal(whole[2:5], updated(slice(2, 5), None))
    exact = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([exact], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    for gradient in gradients:
        exact.grad = gradient.clone()
        reference.step()
    assert relative_error(whole - start, exact.detach() - start) < (0.1 if len(shape) > 1 else 1e-5)


def test_adapters_are_trained_in_8_bits_too(workplace, tmp_path):
    """Within a few percent of the losses with fp32 moments."""
    pytest.importorskip("torchao")
    settings = {"train.steps": 10, "lora.rank": 16}
    train_command.main(workplace("fp32", **settings))
    train_command.main(workplace("8bit", **settings, **{"optim.name": "adamw_8bit"}))
    losses = [[line["loss"] for line in lines_of(tmp_path / run)] for run in ("fp32", "8bit")]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_missing_package_is_named(workplace, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="optim.name is adamw_8bit, whose package is not installed; pip install torchao"
    ):
        train_command.main(workplace(**{"optim.name": "adamw_8bit"}))


# -------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"lora.rank": 8}, "lora.rank is 8, but train.full trains all weights, without adapters"),
        ({"lora.init": "adapter"}, "lora.init is adapter, but train.full trains all weights"),
        ({"parallel.shard": "none"}, "parallel.shard is none, but train.full needs FSDP, also on one rank"),
    ],
)
def test_settings_that_contradict_it_are_refused(settings, complaint, workplace):
    with pytest.raises(UserError, match=complaint):
        parse_config(config_parser("test", ""), workplace(**FULL | settings))
