"""The training loop: PEFT's losses, and the files of a run."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from minorca import UserError, load_model
from minorca.cli import config_parser, parse_config
from minorca.data.packing import make_batch, plan_epoch
from minorca.files.weights import open_model
from minorca.model.lora import LoRASettings, adapter_parameters, add_adapters, init_adapters, seed_dropout
from minorca.train import __main__ as train_command
from minorca.train import build, metrics, parallel
from minorca.train.inputs import read_data, read_tokenizer
from minorca.train.optim import learning_rate
from minorca.train.ranks import init_distributed
from minorca.train.step import forward_backward
from minorca.train.trainable import TrainableSet
from minorca_kernels import local_part
from tests.helpers import SAME, Calls, gradients_of, lines_of, relative_error


def config_of(options):
    return parse_config(config_parser("test", ""), options)[1]


def initial_adapters(monkeypatch) -> dict[str, torch.Tensor]:
    """A dictionary that the next run fills with its adapters as they start."""
    started = {}
    init = build.init_adapters

    def save_start(model, seed):
        init(model, seed)
        started.update({name: p.detach().clone() for name, p in adapter_parameters(model).items()})

    monkeypatch.setattr(build, "init_adapters", save_start)
    return started


def train_in_peft(model, adapter, started, config) -> tuple[list[float], dict[str, torch.nn.Parameter]]:
    """A run's steps in transformers and PEFT: from the same adapters, on the same rows, one row at a time, without
    packing and with PyTorch's loss.

    Returns:
        The losses, and the adapters after the last step.
    """
    theirs = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    trainable = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trainable.keys() == started.keys()
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(started[name])
    train, optim = config.train, config.optim
    optimizer = torch.optim.AdamW(trainable.values(), betas=optim.betas, weight_decay=optim.weight_decay)
    store, _ = read_data(config, *read_tokenizer(config))
    sizes = train.micro_batch_tokens, train.batch_tokens // train.micro_batch_tokens
    planned = (step for epoch in itertools.count() for step in plan_epoch(store.lengths, *sizes, True, 0, epoch))
    losses = []
    for n, micro_batches in enumerate(itertools.islice(planned, train.steps), 1):
        rows = [store.row(row) for micro_batch in micro_batches for row in micro_batch]
        trained = sum(mask.sum() for _, mask in rows)
        losses.append(0.0)
        for ids, mask in rows:
            labels = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
            logits = theirs(torch.tensor(ids).long()[None]).logits[0].float()
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / trained
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable.values(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, train.steps, optim)
        optimizer.step()
        optimizer.zero_grad()
    return losses, trainable


def test_fifty_steps_follow_pefts_losses(workplace, tmp_path, monkeypatch):
    """From the same adapter, on the same rows, every step's loss is within 1e-3 of that of transformers and PEFT."""
    options = workplace(**{"train.steps": 50, "optim.lr": 0.003, "optim.warmup_steps": 5, "optim.weight_decay": 0.1})
    started = initial_adapters(monkeypatch)
    train_command.main(options)
    ours = [line["loss"] for line in lines_of(tmp_path / "run")]
    adapter = tmp_path / "run" / "adapter"
    theirs, trained = train_in_peft(workplace.model, adapter, started, config_of(options))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-3) and ours[-1] < 0.8 * ours[0]
    saved = load_file(adapter / "adapter_model.safetensors")
    assert max(relative_error(saved[name], p) for name, p in trained.items()) < 0.05


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule, workplace):
    """Except that in warmup our first step already has a learning rate above 0."""
    optim = config_of(workplace(**{"optim.schedule": schedule, "optim.warmup_steps": 3})).optim
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=optim.lr)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, 0, num_training_steps=17)
    for step in range(4, 21):
        assert learning_rate(step, 20, optim) == pytest.approx(theirs.get_last_lr()[0])
        theirs.step()
    assert [learning_rate(step, 20, optim) for step in (1, 2, 3)] == pytest.approx(
        [optim.lr / 3, optim.lr * 2 / 3, optim.lr]
    )


def test_a_finished_run_says_so(workplace, tmp_path, caplog):
    options = workplace(**{"train.steps": 2})
    train_command.main(options)
    files = {"config.yaml", "metrics.jsonl", "receipt.jsonl", "checkpoints", "adapter", "curves.png", "tensorboard"}
    files |= {"run.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files | {".lock"}
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    caplog.set_level("INFO")
    train_command.main(options)
    assert "all 2 steps are done" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    phases = {f"{phase}_seconds" for phase in metrics.PHASES}
    expected = {"step", *SAME, *phases, "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
    assert all(set(line) == expected and line["mfu"] is None for line in lines_of(tmp_path / "run"))


def test_a_run_starts_from_an_adapter(workplace, tmp_path):
    """The second run's first evaluation equals the first run's last; an adapter of another rank is refused."""
    settings = {"train.steps": 3, "data.eval": 0.1}
    train_command.main(workplace("first", **settings))
    init = {"lora.init": tmp_path / "first" / "adapter"}
    train_command.main(workplace("second", **settings, **init))
    assert lines_of(tmp_path / "second")[0]["eval_loss"] == lines_of(tmp_path / "first")[-1]["eval_loss"]
    with pytest.raises(UserError, match="lora.rank is 5, and the adapter .* has 4"):
        train_command.main(workplace("third", **settings, **init, **{"lora.rank": 5}))


def test_starting_over_leaves_no_line_of_the_first_start(workplace, tmp_path, monkeypatch):
    """After a stop before the first checkpoint, the evaluation before step 1 is recorded once."""

    def interrupt(*_):
        raise KeyboardInterrupt

    settings = {"train.steps": 2, "data.eval": 0.1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainableSet, "clip_gradients", interrupt)
        train_command.main(workplace(**settings))
    train_command.main(workplace(**settings))
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 1, 2, 2]


def test_rows_longer_than_the_models_positions_are_refused(workplace, tmp_path):
    """The model has 512; the default is 4096."""
    sizes = ("data.seq_len", "train.micro_batch_tokens", "train.batch_tokens")
    message = "data.seq_len is 4096; the model has 512 positions, so set it to 512 or less"
    with pytest.raises(UserError, match=message):
        train_command.main(
            workplace(**{"data.seq_len": 4096, "train.micro_batch_tokens": 4096, "train.batch_tokens": 4096})
        )
    assert not (tmp_path / "run").exists()
    train_command.main(workplace(**dict.fromkeys(sizes, 512), **{"train.steps": 1}))


def test_an_output_that_cannot_be_made_is_named(workplace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="train.output is .*file/run, but .*file is not a writable directory"):
        train_command.main(workplace("file/run"))


def step_gradients(
    workplace, accumulate: bool = False, dropout: float = 0.0, recompute: str = "none", sharding: str = "none"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of a step: of 4 micro-batches with `accumulate`, else of one with the same rows."""
    settings = {"activation_checkpointing": recompute, "shard": sharding}
    settings = {f"parallel.{key}": value for key, value in settings.items()} | {"lora.dropout": dropout}
    config = config_of(workplace(**settings))
    with init_distributed(60) as world:
        learner = build.build(config, open_model(config.model.path), world)
    for parameter in learner.trainable.parameters.values():
        torch.nn.init.normal_(local_part(parameter)[0], std=0.05, generator=torch.Generator().manual_seed(0))
    store, _ = read_data(config, *read_tokenizer(config))
    micro_batches = plan_epoch(store.lengths, 128, 4, True, 0, 0)[0]
    counts = learner.objective.counts(store, np.concatenate(micro_batches))
    if not accumulate:
        micro_batches = [np.concatenate(micro_batches)]
    learner.model.train()
    loss = torch.zeros(())
    for n, rows in enumerate(micro_batches):
        seed_dropout(learner.model, 0, 1, n)
        loss += learner.objective.loss(forward_backward(learner, make_batch(store, rows), counts, last=True), counts)
    gradients = gradients_of(learner.trainable.parameters)
    return loss, {name: local_part(gradient)[0] for name, gradient in gradients.items()}


def test_accumulation_changes_nothing(workplace):
    """Four micro-batches are as one large one: the loss is divided by the trained tokens of the whole step."""
    loss, gradients = step_gradients(workplace, accumulate=True)
    whole_loss, whole = step_gradients(workplace)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-6)
    assert all(relative_error(gradients[name], whole[name]) < 1e-5 for name in whole)


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(recompute, dropout, workplace):
    """Dropout masks are a function of their seed, so recomputation repeats them."""
    loss, plain = step_gradients(workplace, dropout=dropout)
    again_loss, again = step_gradients(workplace, dropout=dropout, recompute=recompute)
    assert loss == again_loss and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("recompute, again", [("none", 0), ("selective", 1), ("full", 4), ("offload", 4)])
def test_what_backward_computes_again(recompute, again, save_mistral):
    """The operators of a layer's four projections, and of attention."""
    model = load_model(save_mistral(num_hidden_layers=1)[0], torch.float32, "cpu")
    add_adapters(model, LoRASettings(rank=4, alpha=8))
    init_adapters(model, seed=0)
    parallel.checkpoint_activations(model, recompute)
    with Calls() as calls:
        loss = model(torch.arange(40)).square().sum()
        forward = [operator.name() for operator, _ in calls.made]
        loss.backward()
    backward = [operator.name() for operator, _ in calls.made[len(forward) :]]
    assert forward.count("minorca::lora_linear") == 4 and backward.count("minorca::lora_linear") == again
    assert forward.count("minorca::attention") == 1 and backward.count("minorca::attention") == (again == 4)


def test_frozen_projections_are_computed_again_beside_a_trained_embedding(save_mistral):
    """Products without adapters, of o and gate_up: none of their outputs is kept."""
    counts = {}
    for recompute in ("none", "selective"):
        model = load_model(save_mistral(num_hidden_layers=1)[0], torch.float32, "cpu")
        add_adapters(model, LoRASettings(rank=4, alpha=8, targets=("q",)))
        init_adapters(model, seed=0)
        model.embedding.weight.requires_grad_(True)
        parallel.checkpoint_activations(model, recompute)
        loss = model(torch.arange(40)).square().sum()
        with Products() as products:
            loss.backward()
        counts[recompute] = products.count
    assert counts["selective"] == counts["none"] + 2


class Products(TorchDispatchMode):
    """Counts the matrix products of plain PyTorch in its block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func == torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))
