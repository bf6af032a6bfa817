"""The loop: against PEFT's numbers, on one and on two ranks, stopped and resumed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import Calls, lines_of, relative_error
from peft import PeftModel
from safetensors.torch import load_file

from minorca import UserError, checkpoint, load_model, parallel, train
from minorca.config import config_parser, read_config
from minorca.data.packing import make_batch, plan_epoch
from minorca.lora import LoRASettings, add_adapters, init_adapters
from minorca.optim import learning_rate

SAME = ("loss", "grad_norm", "lr", "tokens", "trained_tokens")


def config_of(options):
    return read_config(*config_parser("test", "").parse_known_args(options))


def test_fifty_steps_follow_pefts_losses(workplace, tmp_path, monkeypatch):
    """From the same adapter, on the same rows, every step's loss is within 1e-3 of transformers + PEFT's."""
    options = workplace(**{"train.steps": 50, "optim.lr": 0.003, "optim.warmup_steps": 5, "optim.weight_decay": 0.1})
    config, started = config_of(options), {}
    init = train.init_adapters

    def save_start(model, seed):
        init(model, seed)
        started.update({name: p.detach().clone() for name, p in train.adapter_parameters(model).items()})

    monkeypatch.setattr(train, "init_adapters", save_start)
    train.main(options)
    ours = [line["loss"] for line in lines_of(tmp_path / "run")]

    theirs = PeftModel.from_pretrained(workplace.model, tmp_path / "run" / "adapter", is_trainable=True).train()
    trainable = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trainable.keys() == started.keys()
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(started[name])
    optimizer = torch.optim.AdamW(trainable.values(), betas=(0.9, 0.95), weight_decay=0.1)
    store, _ = train.read_data(config)
    steps = [(epoch, step) for epoch in range(50) for step in plan_epoch(store.lengths, 128, 4, True, 0, epoch)][:50]
    for n, (_, micro_batches) in enumerate(steps, 1):
        rows = [store.row(row) for micro_batch in micro_batches for row in micro_batch]
        trained, total = sum(mask.sum() for _, mask in rows), 0.0
        for ids, mask in rows:  # one row at a time: nothing of packing, of the flat batch or of the chunked loss
            labels = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
            logits = theirs(torch.tensor(ids).long()[None]).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, 50, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(total - ours[n - 1]) <= 1e-3, f"step {n}"
    assert ours[-1] < 0.8 * ours[0]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert max(relative_error(saved[name], p) for name, p in trainable.items()) < 0.05


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule, workplace):
    """Its schedules count from 0, with the first step's rate at 0; ours give the first step its share."""
    import transformers

    optim = config_of(workplace(**{"optim.schedule": schedule, "optim.warmup_steps": 3})).optim
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=optim.lr)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, 0, num_training_steps=17)
    for step in range(4, 21):
        assert learning_rate(step, 20, optim) == pytest.approx(theirs.get_last_lr()[0])
        theirs.step()
    assert [learning_rate(step, 20, optim) for step in (1, 2, 3)] == pytest.approx([optim.lr / 3, optim.lr * 2 / 3, optim.lr])


def test_a_stopped_run_resumes_to_the_same_bits(workplace, tmp_path, monkeypatch):
    """Stopped between two checkpoints and started again: every line and the adapter as if it had never stopped."""
    settings = {"train.steps": 12, "train.checkpoint_every": 4, "lora.dropout": 0.1, "data.eval": 0.1, "train.eval_every": 6}
    train.main(workplace("whole", **settings))
    step = train.metrics.Record.step

    def stop_in_step_7(record, number, *rest):
        if number == 7:
            raise KeyboardInterrupt
        step(record, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.metrics.Record, "step", stop_in_step_7)
        with pytest.raises(KeyboardInterrupt):
            train.main(workplace("stopped", **settings))
    train.main(workplace("stopped", **settings))
    whole, stopped = lines_of(tmp_path / "whole"), lines_of(tmp_path / "stopped")
    keys = ("step", "eval_loss", *SAME)
    assert [[line.get(key) for key in keys] for line in whole] == [[line.get(key) for key in keys] for line in stopped]
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [path.name for path in checkpoint.published(tmp_path / "stopped" / "checkpoints")] == ["step-00000008", "step-00000012"]


def test_a_finished_run_says_so(workplace, tmp_path, caplog):
    options = workplace(**{"train.steps": 2})
    train.main(options)
    files = {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "curves.png", "tensorboard"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    caplog.set_level("INFO")
    train.main(options)
    assert "all 2 steps are done" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    expected = {"step", *SAME, "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
    assert all(set(line) == expected and line["mfu"] is None for line in lines_of(tmp_path / "run"))


@pytest.fixture
def refused(workplace):
    """refused(**settings) -> the complaint of a second run in one output directory."""

    def second(**settings):
        with pytest.raises(UserError) as error:
            train.main(workplace(**{"train.steps": 2} | settings))
        return str(error.value)

    train.main(workplace(**{"train.steps": 2}))
    return second


def test_other_settings_do_not_resume(refused):
    message = refused(**{"optim.lr": 0.02, "train.seed": 3})
    assert "optim.lr was 0.01 and is 0.02" in message and "train.seed was 0 and is 3" in message
    assert "holds checkpoints and train.resume is never" in refused(**{"train.resume": "never"})


def test_other_rows_do_not_resume(refused, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:-1]))
    assert "the rows' sha256 was" in refused()


def test_going_back_needs_the_later_checkpoints_gone(refused, workplace, tmp_path):
    """Nothing is touched before the refusal."""
    train.main(workplace("long", **{"train.steps": 4, "train.checkpoint_every": 1}))
    before = (tmp_path / "long" / "metrics.jsonl").read_text()
    earlier = tmp_path / "long" / "checkpoints" / "step-00000003"
    with pytest.raises(UserError, match="step-00000004: is later than step-00000003"):
        train.main(workplace("long", **{"train.steps": 4, "train.resume": earlier}))
    assert (tmp_path / "long" / "metrics.jsonl").read_text() == before
    shutil.rmtree(earlier.with_name("step-00000004"))
    shutil.rmtree(tmp_path / "long" / "adapter")
    train.main(workplace("long", **{"train.steps": 4, "train.resume": earlier}))
    assert [line["loss"] for line in lines_of(tmp_path / "long")] == [json.loads(line)["loss"] for line in before.splitlines()]


def test_a_run_starts_from_an_adapter(workplace, tmp_path):
    """The second run's first evaluation is the first run's last; an adapter of another rank is refused by name."""
    settings = {"train.steps": 3, "data.eval": 0.1}
    train.main(workplace("first", **settings))
    init = {"lora.init": tmp_path / "first" / "adapter"}
    train.main(workplace("second", **settings, **init))
    assert lines_of(tmp_path / "second")[0]["eval_loss"] == lines_of(tmp_path / "first")[-1]["eval_loss"]
    with pytest.raises(UserError, match="lora.rank is 5, and the adapter .* has 4"):
        train.main(workplace("third", **settings, **init, **{"lora.rank": 5}))


def test_starting_over_leaves_no_line_of_the_first_start(workplace, tmp_path, monkeypatch):
    """Stopped before the first checkpoint: the evaluation before step 1 stands once."""
    settings = {"train.steps": 2, "data.eval": 0.1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "clip_gradients", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.main(workplace(**settings))
    train.main(workplace(**settings))
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 1, 2, 2]


def test_a_gradient_that_is_no_number_stops_the_run(workplace, tmp_path, monkeypatch):
    """With the step named, and the last checkpoint as it was."""
    clip, norms = train.clip_gradients, iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(train, "clip_gradients", lambda *rest: clip(*rest) * next(norms))
    with pytest.raises(UserError, match="step 3: the gradient's norm is nan"):
        train.main(workplace(**{"train.steps": 5, "train.checkpoint_every": 1}))
    assert [path.name for path in checkpoint.published(tmp_path / "run" / "checkpoints")] == ["step-00000001", "step-00000002"]


def test_an_output_that_cannot_be_made_is_named(workplace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="train.output is .*file/run, but .*file is no directory"):
        train.main(workplace("file/run"))


def test_a_damaged_checkpoint_is_named(refused, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    assert str(path) in refused() and "is not what was saved" in refused()


def step_gradients(workplace, accumulate: bool = False, dropout: float = 0.0, recompute: str = "none"):
    """The loss and adapter gradients of one step of 4 micro-batches, or the same rows as one."""
    config = config_of(workplace(**{"parallel.activation_checkpointing": recompute, "lora.dropout": dropout}))
    with train.parallel.joined() as world:
        model, _ = train.build(config, world)
    for parameter in train.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    store, _ = train.read_data(config)
    micro_batches = plan_epoch(store.lengths, 128, 4, True, 0, 0)[0]
    trained = train.trained_tokens(store, micro_batches)
    if not accumulate:
        micro_batches = [sum(micro_batches, [])]
    model.train()
    loss = 0.0
    for n, rows in enumerate(micro_batches):
        train.seed_dropout(model, 0, 1, n)
        loss += train.forward_backward(model, make_batch(store, rows), trained, last=True)
    return loss, {name: p.grad for name, p in train.adapter_parameters(model).items()}


def test_accumulation_changes_nothing(workplace):
    """Four micro-batches are one large one: the loss is divided by the whole step's trained tokens."""
    (loss, gradients), (whole_loss, whole) = step_gradients(workplace, accumulate=True), step_gradients(workplace)
    assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-6)
    assert all(relative_error(gradients[name], whole[name]) < 1e-5 for name in whole)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(recompute, dropout, workplace):
    """Dropout masks are a function of their seed, so what is computed again is the same."""
    (loss, plain), (again_loss, again) = (step_gradients(workplace, dropout=dropout, recompute=r) for r in ("none", recompute))
    assert loss == again_loss and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("recompute, again", [("none", 0), ("selective", 1), ("full", 4)])
def test_what_backward_computes_again(recompute, again, save_mistral):
    """Of a layer's four projections, and attention."""
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
    assert forward.count("minorca::attention") == 1 and backward.count("minorca::attention") == (recompute == "full")


def torchrun(ranks: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "minorca.train"]
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run(command + options, env=os.environ | quiet, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]


def assert_same_run(one, two):
    """Losses, norms and counts of every line within 1e-5 relative, and adapters that tell the same."""
    assert [line["step"] for line in lines_of(one)] == [line["step"] for line in lines_of(two)]
    for a, b in zip(lines_of(one), lines_of(two)):
        for key in {"loss", "grad_norm", "eval_loss", "lr", "tokens", "trained_tokens"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two))
    assert max(relative_error(second[name], first[name]) for name in first) < 1e-3


# 3 micro-batches a step, so that one of two ranks is left without a row in every step; tied weights; evaluations
RANKED = {"train.steps": 20, "train.batch_tokens": 384, "data.eval": 0.1, "optim.lr": 0.003}


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_ranks_give_one_ranks_losses(shard, workplace, tmp_path):
    train.main(workplace("one", **RANKED))
    torchrun(2, workplace("two", **RANKED, **{"parallel.shard": shard}))
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, parallel",
    [
        (4, {"shard": "none"}),
        (4, {"shard": "fsdp"}),
        (4, {"shard": "fsdp", "replicate": 2}),
        (2, {"shard": "fsdp", "cpu_offload": "true"}),
        (2, {"shard": "fsdp", "activation_checkpointing": "full"}),
        (2, {"shard": "fsdp", "activation_checkpointing": "selective"}),
        (1, {"shard": "fsdp"}),
    ],
    ids=str,
)
def test_any_ranks_give_one_ranks_losses(ranks, parallel, workplace, tmp_path):
    train.main(workplace("one", **RANKED))
    torchrun(ranks, workplace("many", **RANKED, **{f"parallel.{key}": value for key, value in parallel.items()}))
    assert_same_run(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_bf16_weights_with_fp32_adapters_shard(workplace, tmp_path):
    """What FSDP casts is what one rank casts; sums of bf16 products in another order differ by their rounding."""
    settings = RANKED | {"model.dtype": "bfloat16", "train.steps": 5}
    train.main(workplace("one", **settings))
    torchrun(2, workplace("two", **settings, **{"parallel.shard": "fsdp"}))
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two")):
        for key in {"loss", "grad_norm", "eval_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=5e-3), (a["step"], key)
    saved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(workplace, tmp_path):
    """8 steps sharded over 2 ranks, then the rest on one."""
    settings = RANKED | {"train.checkpoint_every": 8}
    train.main(workplace("one", **settings))
    torchrun(2, workplace("moved", **settings, **{"parallel.shard": "fsdp"}))
    for path in checkpoint.published(tmp_path / "moved" / "checkpoints")[1:]:
        shutil.rmtree(path)
    train.main(workplace("moved", **settings))
    assert_same_run(tmp_path / "one", tmp_path / "moved")
