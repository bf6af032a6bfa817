"""Preference tuning in the loop: the reference, and that ranks, accumulation, packing and sharing change no step."""

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from benchmarks.sharing import separated
from minorca import UserError
from minorca.data.packing import Batch, make_batch
from minorca.data.store import TokenStore
from minorca.files.weights import open_model
from minorca.train import __main__ as train_command
from minorca.train import build, precompute
from minorca.train.curves import draw_curves
from minorca.train.inputs import read_data, read_tokenizer
from minorca.train.kto import mismatched_batches
from minorca.train.ranks import init_distributed
from minorca.train.step import forward_backward
from minorca_kernels import local_part
from tests.helpers import (
    Workplace,
    assert_same_bits,
    assert_same_run,
    gradients_of,
    lines_of,
    random_adapter,
    relative_error,
    save_tokenizer,
    torchrun,
)
from tests.train import test_faults
from tests.train.test_resume import stop_in
from tests.train.test_train import config_of

METRICS = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} | {"kl", "entropy"}
METRICS |= {"logps/chosen", "logps/rejected"}
TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


class PreferencePlace(Workplace):
    """Its runs tune preferences."""

    def __call__(self, output: str = "run", **settings) -> list[str]:
        rows = {"data.train": self.path / "pairs.jsonl", "data.format": "preference", "train.objective": "dpo"}
        return super().__call__(output, **rows | settings)


class WithoutDropout(PreferencePlace):
    """Its runs have none, whatever a test of fine-tuning asks for."""

    def __call__(self, output: str = "run", **settings) -> list[str]:
        return super().__call__(output, **settings | {"lora.dropout": 0.0})


@pytest.fixture
def place(workplace) -> PreferencePlace:
    """As `workplace`, with pairs of answers."""
    draw = random.Random(1)
    with (workplace.path / "pairs.jsonl").open("w") as file:
        for _ in range(40):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            row = {"system": draw.choice(["", "Be brief."]), "question": f"Reverse {word}"}
            file.write(json.dumps(row | {"chosen": word[::-1], "rejected": f"{word}{word}"}) + "\n")
    return PreferencePlace(workplace.path, workplace.model_path, workplace.model)


@pytest.fixture
def adapter(place):
    """An adapter whose update is not zero."""
    directory = place.path / "start"
    random_adapter(place.model, directory, TARGETS, r=4, lora_alpha=32)
    return directory


def labelled(place: PreferencePlace) -> dict:
    """Rows of single answers with labels."""
    draw = random.Random(2)
    with (place.path / "labelled.jsonl").open("w") as file:
        for n in range(40):
            word = "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
            row = {
                "prompt": f"Reverse {word}",
                "completion": ("It is ", "No: ")[n % 2] + word[::-1],
                "label": n % 2 == 0,
            }
            file.write(json.dumps(row) + "\n")
    return {"data.train": place.path / "labelled.jsonl", "train.objective": "kto"}


# -------------------------------------------------------------------------------------------------------- first step


STARTS: dict[str, dict[str, object]] = {
    "base": {},
    "adapter": {},
    "full": {"train.full": "true", "lora.rank": 16},
    "bfloat16": {"model.dtype": "bfloat16"},
    "nf4": {"model.quantize": "nf4"},
    "new tokens": {"train.new_tokens": '["<|think|>"]'},
    "whole matrices": {"lora.modules_to_save": '["embed", "head"]'},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_first_step_measures_no_difference(start, place, adapter, save_mistral):
    """The policy is the reference: the loss is ln 2, and rewards, margins and KL are exactly 0."""
    settings = {"lora.init": adapter} if start == "adapter" else STARTS[start]
    if start == "nf4":
        # rows of whole blocks of 64
        wide, _ = save_mistral(vocab_size=260, intermediate_size=128, initializer_range=0.08)
        save_tokenizer(wide)
        settings = settings | {"model.path": wide}
    train_command.main(place(**{"train.steps": 2, "optim.lr": 1e-3, "data.eval": 0.2} | settings))
    evaluated, first, second, _ = lines_of(place.path / "run")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and second["loss"] < first["loss"]
    assert first.keys() >= METRICS and evaluated.keys() >= {f"eval_{name}" for name in METRICS}
    for line, prefix in ((first, ""), (evaluated, "eval_")):
        assert all(line[f"{prefix}{name}"] == 0 for name in METRICS if name.startswith("rewards") or name == "kl")
    assert second["rewards/margins"] > 0 and second["kl"] > 0 and 0 < first["entropy"] < np.log(260)
    # a second row of curves
    assert imread(place.path / "run" / "curves.png").shape[0] == 770


# --------------------------------------------------------------------------------------------------------- invariance


def step_of(
    options: list[str], arrange: Callable[[TokenStore, np.ndarray], list[Batch]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step of 16 rows, in the micro-batches that `arrange` makes of them."""
    config = config_of(options)
    with init_distributed(60) as world:
        learner = build.build(config, open_model(config.model.path), world)
        for parameter in learner.trainable.parameters.values():
            torch.nn.init.normal_(local_part(parameter)[0], std=0.05, generator=torch.Generator().manual_seed(0))
        store, _ = read_data(config, *read_tokenizer(config))
        rows = np.arange(16)
        counts = learner.objective.counts(store, rows)
        learner.model.train()
        learner.objective.prepare(store, rows, world)
        sums = [forward_backward(learner, batch, counts, last=True) for batch in arrange(store, rows)]
    loss = sum(learner.objective.loss(one, counts).item() for one in sums)
    return loss, {
        name: local_part(gradient)[0] for name, gradient in gradients_of(learner.trainable.parameters).items()
    }


ARRANGEMENTS: dict[str, Callable[[TokenStore, np.ndarray], list[Batch]]] = {
    "accumulated": lambda store, rows: [make_batch(store, part) for part in np.split(rows, 4)],
    "without packing": lambda store, rows: [make_batch(store, rows[n : n + 1]) for n in rows],
    "another order": lambda store, rows: [make_batch(store, rows[::-1])],
    "without sharing": lambda store, rows: [separated(make_batch(store, rows))],
}
OBJECTIVES = {
    "dpo": {"dpo.sft_weight": 0.5},
    "ipo": {"dpo.loss": "ipo"},
    "orpo": {"train.objective": "orpo"},
    "simpo": {"train.objective": "simpo", "dpo.beta": 2.0},
    "cpo": {"train.objective": "cpo"},
    "kto": {"train.objective": "kto", "dpo.undesirable_weight": 0.5},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_rank_without_a_micro_batch_adds_nothing(objective, place):
    options = place(**OBJECTIVES[objective])
    loss, gradients = step_of(options, lambda store, rows: [make_batch(store, rows)])
    with_another, others = step_of(
        options, lambda store, rows: [make_batch(store, rows), make_batch(store, rows[:1]).without_targets()]
    )
    assert with_another == loss and all(torch.equal(others[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_arrangement_changes_no_step(objective, place):
    """One micro-batch of all rows, several, rows alone, or every answer with a prompt of its own."""
    options = place(**OBJECTIVES[objective])
    loss, gradients = step_of(options, lambda store, rows: [make_batch(store, rows)])
    for name, arrange in ARRANGEMENTS.items():
        other_loss, others = step_of(options, arrange)
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert all(relative_error(others[key], gradients[key]) < 2e-5 for key in gradients), name


def test_kto_reads_answers_after_other_prompts(place):
    """z0 comes from each row's answers after the prompt of the next row, whatever the capacity."""
    config = config_of(place(**labelled(place)))
    store, _ = read_data(config, *read_tokenizer(config))
    rows = np.array([5, 2, 9])
    (batch,) = mismatched_batches(store, rows, 10_000)
    starts = {row: store.branches(row)[0][0] for row in rows}
    expected = [
        np.concatenate([store.row(row)[0][: starts[row]], store.row(other)[0][starts[other] :]])
        for row, other in ((5, 9), (2, 5), (9, 2))
    ]
    assert batch.tokens.tolist() == np.concatenate(expected).tolist()
    assert np.diff(batch.cu_seqlens).tolist() == [len(ids) for ids in expected]
    alone = mismatched_batches(store, rows, 1)
    assert [len(one.tokens) for one in alone] == [len(ids) for ids in expected]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, shard", [(2, "none"), (4, "fsdp")])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_ranks_change_no_step(objective, ranks, shard, place):
    settings = {"train.steps": 6, "data.eval": 0.2, "train.objective": objective}
    train_command.main(place("one", **settings))
    torchrun(ranks, place("many", **settings, **{"parallel.shard": shard}))
    assert_same_run(place.path / "one", place.path / "many")


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_it_resumes_to_the_same_bits(objective, place, adapter, monkeypatch):
    """From the adapter that it started from, which stays the reference."""
    settings = {"train.steps": 6, "train.checkpoint_every": 2, "lora.init": adapter, "train.objective": objective}
    train_command.main(place("whole", **settings))
    stop_in(4, place("stopped", **settings), monkeypatch)
    train_command.main(place("stopped", **settings))
    assert_same_bits(place.path / "whole", place.path / "stopped")


@pytest.mark.slow
def test_a_kill_at_every_point_of_a_step_and_a_save(place, tmp_path):
    without_dropout = WithoutDropout(place.path, place.model_path, place.model)
    test_faults.test_a_kill_at_every_point_of_a_step_and_a_save(0, without_dropout, tmp_path)


def test_another_objective_is_another_run(place, adapter):
    train_command.main(place(**{"train.steps": 1}))
    with pytest.raises(UserError, match="dpo.beta was 0.1 in the checkpoint and is 0.2 now; set it back"):
        train_command.main(place(**{"train.steps": 1, "dpo.beta": 0.2}))
    with pytest.raises(UserError, match="the reference was 'auto' in the checkpoint and is '[0-9a-f]{64}' now"):
        train_command.main(place(**{"train.steps": 1, "dpo.reference": adapter}))


# ---------------------------------------------------------------------------------------------------------- reference


def test_references(place, adapter):
    """auto is the adapter that training starts from, base the model without it, and any adapter may be one."""
    settings = {"train.steps": 2, "lora.init": adapter}
    for name in ("auto", "base", adapter):
        train_command.main(place(f"by-{getattr(name, 'name', name)}", **settings, **{"dpo.reference": name}))
    assert_same_bits(place.path / "by-auto", place.path / "by-start")
    first = lines_of(place.path / "by-base")[0]
    assert first["kl"] > 0 and first["rewards/margins"] != 0
    # the policy's own log-probabilities do not depend on it
    assert first["logps/chosen"] == lines_of(place.path / "by-auto")[0]["logps/chosen"]


def test_a_reference_of_another_shape_is_refused(place, adapter):
    with pytest.raises(UserError, match="lora.rank is 8, and the adapter of dpo.reference, .*start, has 4"):
        train_command.main(place(**{"dpo.reference": adapter, "lora.rank": 8}))
    with pytest.raises(UserError, match="nowhere"):
        train_command.main(place(**{"dpo.reference": place.path / "nowhere"}))


def test_a_reference_computed_once_is_the_same(place, adapter, caplog, monkeypatch):
    """It is read again by the next run, and not by one of another reference, or where it is damaged."""
    caplog.set_level("INFO")
    settings = {"train.steps": 3, "data.eval": 0.2, "data.store": place.path / "store"}
    computed = {"dpo.precompute": "true"} | settings
    train_command.main(place("each", **settings, **{"lora.init": adapter}))
    train_command.main(place("once", **computed, **{"lora.init": adapter}))
    assert caplog.text.count("computing the reference's log-probabilities") == 2
    assert_same_run(place.path / "each", place.path / "once")
    first = lines_of(place.path / "once")[1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    caplog.clear()
    train_command.main(place("again", **computed, **{"lora.init": adapter}))
    assert "computing the reference" not in caplog.text
    assert_same_bits(place.path / "once", place.path / "again")
    # the base's
    train_command.main(place("other", **computed))
    assert caplog.text.count("computing the reference's log-probabilities") == 2
    for directory in (place.path / "store").glob("*.reference-*"):
        (directory / precompute.VALUES).write_bytes(b"1234")
    train_command.main(place("damaged", **computed, **{"lora.init": adapter}))
    assert "the reference's log-probabilities are computed again" in caplog.text
    assert_same_bits(place.path / "once", place.path / "damaged")


# ------------------------------------------------------------------------------------------------------------ pictures


def test_curves_show_negative_losses(tmp_path, monkeypatch):
    """Those of robust; without one the axis starts at 0."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for losses in ([0.7, 0.4, -1.5], [0.7, 0.4, 0.1]):
        lines = [{"step": step, "loss": loss, "lr": 1e-4, "tokens_per_second": 9} for step, loss in enumerate(losses)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    lowest = [figure.subfigs[0].axes[0].get_ylim()[0] for figure in drawn]
    assert lowest[0] < -1.5 and lowest[1] == 0


def test_a_dry_run_shows_the_answers(place, capsys):
    train_command.main([*place(), "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.index("-- chosen: ") < printed.index("-- rejected: ") < printed.index("--- step 1, micro-batch 1")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora.dropout": 0.1}, "lora.dropout is 0.1; the policy and its reference are compared without dropout"),
        ({"dpo.beta": 0}, "dpo.beta is 0"),
        ({"dpo.loss": "robust", "dpo.label_smoothing": 0.5}, "dpo.label_smoothing is 0.5; loss robust needs less"),
        ({"dpo.loss": "exo"}, "dpo.label_smoothing is 0, for which loss exo is infinite"),
        ({"dpo.loss": "hinge", "dpo.label_smoothing": 0.1}, "loss hinge has no smoothing"),
        ({"dpo.loss": "dpo"}, "dpo.loss is 'dpo'"),
        ({"dpo.gamma": 1.0}, "dpo.gamma is 1.0, which train.objective dpo does not read; .* the objective to simpo"),
        ({"train.objective": "orpo", "dpo.reference": "base"}, "dpo.reference is base, which train.objective orpo"),
        ({"train.objective": "cpo", "dpo.sft_weight": 1.0}, "dpo.sft_weight is 1.0, which train.objective cpo"),
        ({"train.objective": "kto", "dpo.loss": "ipo"}, "dpo.loss is ipo, which train.objective kto does not read"),
        (
            {"train.full": "true", "lora.rank": 16, "dpo.reference": "adapter"},
            "dpo.reference is adapter, but train.full trains no adapters",
        ),
    ],
)
def test_contradictions_are_named(settings, message, place):
    with pytest.raises(UserError, match=message):
        train_command.main(place(**settings))


def test_labelled_answers_are_for_kto(place):
    rows = labelled(place)
    with pytest.raises(
        UserError, match="labelled.jsonl, line 1: has one answer with a label, .* set train.objective to kto"
    ):
        train_command.main(place(**rows | {"train.objective": "dpo"}))
    train_command.main(place(**rows, **{"train.steps": 12}))
    lines = lines_of(place.path / "run")
    assert lines[0]["loss"] == 0.5 and lines[0]["kl"] == 0 and lines[-1]["loss"] < 0.4
    assert lines[-1]["rewards/margins"] > 0
