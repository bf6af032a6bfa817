"""Objectives: next-token loss, and one defined outside of the package."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.cli import config_parser, parse_config
from minorca.data.packing import Batch, make_batch
from minorca.data.store import TokenStore
from minorca.model.vocabulary import VocabularyMatrix
from minorca.train import metrics
from minorca.train.best import Best
from minorca.train.build import Learner, build
from minorca.train.evaluation import evaluate
from minorca.train.inputs import read_inputs
from minorca.train.loop import Run
from minorca.train.objectives import Counts, NextToken, Objective, Sums
from minorca.train.ranks import init_distributed
from minorca.train.run_length import run_length
from tests.helpers import lines_of


class ByRow(Objective):
    """The mean over rows of each row's mean loss, with the mean probability as a metric."""

    def counts(self, store: TokenStore, rows: np.ndarray) -> Counts:
        return {"rows": len(rows)}

    def head(self, batch: Batch):
        def sums(hidden_TH: Tensor, weight: VocabularyMatrix) -> Sums:
            losses_M = weight.losses(hidden_TH[batch.target_rows], batch.targets)
            row_M = torch.bucketize(batch.target_rows, batch.cu_seqlens[1:], right=True)
            row_N = torch.arange(len(batch.cu_seqlens) - 1)
            means_N = torch.stack(
                [losses_M[row_M == row].mean() for row in row_N if (row_M == row).any()] or [losses_M.sum()]
            )
            return {"mean": means_N.sum(), "probability": (-means_N.detach()).exp().sum()}

        return sums

    def loss(self, sums, counts: Counts):
        return sums["mean"] / counts["rows"]

    def metrics(self, sums, counts: Counts) -> dict[str, float]:
        return {"row_probability": sums["probability"] / counts["rows"]}


def run(options: list[str], objective, tmp_path) -> Learner:
    """A short run in this process, with the steps of minorca.train but another objective."""
    _, config = parse_config(config_parser("test", ""), options)
    with init_distributed(60) as world:
        inputs = read_inputs(config)
        learner = build(config, inputs.base, world)
        learner.objective = objective
        (tmp_path / "run").mkdir()
        steps = config.train.steps
        assert steps
        record = metrics.Record(config, 0, steps)
        schedule = inputs.schedule(config)
        work = Run(config, world, inputs, learner, run_length(config, schedule), Best(), record, [], 0, 0)
        work.loop(schedule.step, lambda: None)
        work.finish()
    return learner


def test_an_objective_from_outside(workplace, tmp_path):
    """The loop uses its loss, its counts and its metrics, in steps and in evaluations; the loss decreases."""
    run(workplace(**{"train.steps": 6, "data.eval": 0.2}), ByRow(), tmp_path)
    lines = lines_of(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    assert all(0 < line["row_probability"] < 1 for line in steps)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6]
    assert evaluations[1]["eval_row_probability"] > evaluations[0]["eval_row_probability"]


def test_the_loss_by_row_is_the_mean_of_the_rows_means(workplace):
    """Compared with transformers' model, one row at a time."""
    _, config = parse_config(config_parser("test", ""), workplace(**{"data.eval": 0.2}))
    with init_distributed(60) as world:
        inputs = read_inputs(config)
        learner = build(config, inputs.base, world)
        learner.objective = ByRow()
        assert inputs.held_out is not None
        values = evaluate(learner, inputs.held_out, config, world)
    assert values is not None
    expected = []
    for row in range(len(inputs.held_out)):
        ids, mask = (torch.from_numpy(np.array(part)) for part in inputs.held_out.row(row))
        logits = workplace.model(ids.long()[None]).logits[0]
        expected.append(F.cross_entropy(logits[:-1], ids.long()[1:].where(mask[1:], -100)).item())
    assert values["eval_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert values["eval_row_probability"] == pytest.approx(np.mean(np.exp([-loss for loss in expected])), rel=1e-5)


def test_shares_of_micro_batches_add_up_to_the_loss_of_a_step():
    """Their gradients add up to its gradient, too."""
    random = np.random.default_rng(0)
    store = TokenStore(random.integers(50, size=40, dtype=np.int32), np.arange(40) % 3 > 0, np.array([0, 9, 20, 40]))
    hidden = torch.randn(40, 8, dtype=torch.float64)
    weight = VocabularyMatrix(torch.randn(50, 8, dtype=torch.float64))
    objective = NextToken()
    rows = np.arange(3)
    counts = objective.counts(store, rows)
    assert counts == {"tokens": store.trained_counts.sum()}

    def share(rows: np.ndarray, first: int, last: int) -> tuple[float, Tensor]:
        part = hidden[first:last].clone().requires_grad_()
        loss = objective.loss(objective.head(make_batch(store, rows))(part, weight), counts)
        loss.backward()
        assert part.grad is not None
        return float(loss.detach()), part.grad

    loss, gradient = share(rows, 0, 40)
    shares = [share(rows[:1], 0, 9), share(rows[1:], 9, 40)]
    assert loss == pytest.approx(sum(one for one, _ in shares)) and math.isfinite(loss)
    assert torch.allclose(gradient, torch.cat([one for _, one in shares]))
    assert objective.metrics({}, counts) == {}
