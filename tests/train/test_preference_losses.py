"""Losses of preferences: values and gradients against the code of TRL's trainers, and against formulas in fp64."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from minorca.train.preference import LOSSES, Pairs, cpo, kto, orpo, simpo

PAIRS = 32
TOKENS = 40
# those of TRL whose name differs
TRL_NAMES = {"exo": "exo_pair"}
SMOOTHED = {"robust": 0.2, "exo": 1e-3}
ACCELERATOR = SimpleNamespace(
    device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda model: model
)


@pytest.fixture
def answers() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of policy [2 P, S] and reference [2 P] and a mask [2 P, S] of answers' tokens, 1 to S; chosen
    answers first."""
    torch.manual_seed(0)
    mask_PS = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (2 * PAIRS, 1))
    mask_PS[0] = torch.arange(TOKENS) < 1
    logps_PS = (-2 * torch.rand(2 * PAIRS, TOKENS)).masked_fill(~mask_PS, 0)
    return logps_PS, logps_PS.sum(1) + torch.randn(2 * PAIRS), mask_PS


def pairs_of(sums: Tensor, mask_PS: Tensor) -> Pairs:
    return Pairs(*sums.chunk(2), *mask_PS.sum(1).chunk(2))


def assert_equal_with_gradients(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    """Scalars, and their gradients in `leaf`."""
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].any()


def fused_outputs(logps_PS: Tensor) -> SimpleNamespace:
    """What TRL's models return."""
    zeros = torch.zeros_like(logps_PS)
    return SimpleNamespace(log_probs=logps_PS, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trainer_of(kind, **fields) -> Any:
    """A trainer of TRL that has no more than its loss needs."""
    trainer = object.__new__(kind)
    common = {"accelerator": ACCELERATOR, "beta": 0.1, "label_smoothing": 0.0, "aux_loss_enabled": False}
    metrics = {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1}
    precomputed = {"model": SimpleNamespace(training=True), "precompute_ref_logps": True}
    for name, value in (common | metrics | precomputed | fields).items():
        setattr(trainer, name, value)
    return trainer


def inputs_of(mask_PS: Tensor, **others) -> dict[str, Tensor]:
    """A batch of TRL, with a prompt of one token before each answer."""
    tokens = torch.zeros(len(mask_PS), TOKENS + 1, dtype=torch.long)
    completion_mask = torch.nn.functional.pad(mask_PS.long(), (1, 0))
    return {"input_ids": tokens, "attention_mask": tokens + 1, "completion_mask": completion_mask, **others}


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_dpo_against_trl(name, beta, answers):
    logps_PS, reference, mask_PS = answers
    logps_PS.requires_grad_()
    smoothing = SMOOTHED.get(name, 0.0)
    trainer = trainer_of(
        DPOTrainer,
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[TRL_NAMES.get(name, name)],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    chosen, rejected = reference.chunk(2)
    inputs = inputs_of(mask_PS, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    theirs = trainer._compute_loss(lambda **_: fused_outputs(logps_PS), inputs, False)
    ours = LOSSES[name](pairs_of(logps_PS.sum(1) - reference, mask_PS), beta, smoothing).mean()
    assert_equal_with_gradients(ours, theirs, logps_PS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_cpo_and_simpo_against_trl(loss_type, smoothing, answers):
    logps_PS, _, mask_PS = answers
    logps_PS.requires_grad_()
    pairs = pairs_of(logps_PS.sum(1), mask_PS)
    trainer = trainer_of(CPOTrainer, label_smoothing=smoothing, loss_type=loss_type, alpha=0.0, simpo_gamma=0.5)
    if loss_type == "simpo":
        theirs, ours = trainer.cpo_loss(*pairs.means())[0], simpo(pairs, 0.1, smoothing, 0.5)
    else:
        theirs, ours = trainer.cpo_loss(pairs.chosen_P, pairs.rejected_P)[0], cpo(pairs, 0.1, smoothing)
    assert_equal_with_gradients(ours.mean(), theirs.mean(), logps_PS)


def test_orpo_against_trl(answers):
    """TRL's term is what is subtracted from the loss."""
    logps_PS, _, mask_PS = answers
    logps_PS.requires_grad_()
    pairs = pairs_of(logps_PS.sum(1), mask_PS)
    theirs = -trainer_of(ORPOTrainer).odds_ratio_loss(*pairs.means())[0]
    assert_equal_with_gradients(0.1 * orpo(pairs).mean(), theirs.mean(), logps_PS)


@pytest.mark.parametrize("distance", [3.0, -3.0])
def test_kto_against_trl(distance, answers):
    """z0 is the mean log-ratio of mismatched answers, or 0 where that is negative."""
    logps_PS, reference, mask_PS = answers
    logps_PS.requires_grad_()
    desirable = torch.arange(2 * PAIRS) % 3 > 0
    mismatched = torch.randn(2 * PAIRS)
    trainer = trainer_of(KTOTrainer, loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.75)
    trainer._compute_kl_logps = lambda model, batch: mismatched
    inputs = inputs_of(mask_PS, label=desirable, ref_logps=reference, ref_KL_logps=mismatched - distance)
    theirs = trainer._compute_loss(lambda **_: fused_outputs(logps_PS), inputs, False)
    ratios = logps_PS.sum(1) - reference
    ours = kto(ratios, desirable, torch.tensor(max(distance, 0.0)), 0.1, 1.5, 0.75).mean()
    assert_equal_with_gradients(ours, theirs, logps_PS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_against_the_formula_of_cdpo(smoothing, answers):
    """Computed in fp64 by probabilities: the cross-entropy to preferences that are right with 1 - smoothing."""
    logps_PS, reference, mask_PS = answers
    ratios = logps_PS.sum(1) - reference
    chosen, rejected = ratios.double().chunk(2)
    right = 1 / (1 + torch.exp(-0.3 * (chosen - rejected)))
    expected = -(1 - smoothing) * torch.log(right) - smoothing * torch.log(1 - right)
    torch.testing.assert_close(LOSSES["sigmoid"](pairs_of(ratios, mask_PS), 0.3, smoothing).double(), expected)


def test_orpo_against_odds_in_fp64():
    """From answers that are nearly certain to ones that are nearly impossible."""
    means = torch.tensor([-1e-5, -1e-3, -0.1, -0.6931, -0.7, -5.0, -50.0])
    chosen, rejected = torch.cartesian_prod(means, means).T.contiguous().requires_grad_()
    ones = torch.ones_like(chosen)

    def log_odds(mean: Tensor) -> Tensor:
        return mean - torch.log(-torch.expm1(mean))

    exact = torch.log1p(torch.exp(log_odds(rejected.double()) - log_odds(chosen.double())))
    ours = orpo(Pairs(chosen, rejected, ones, ones))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    for leaf in (chosen, rejected):
        theirs = torch.autograd.grad(exact.sum(), leaf, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), leaf, retain_graph=True)[0], theirs)


# of the first step, where policy and reference are equal, at beta 0.5
FIRST = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1.0,
    "robust": math.log(2),
    "exo": 0.5 * (math.log(0.5 / 0.8) + math.log(0.5 / 0.2)),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sigmoid_norm": math.log(2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_step(name):
    zeros, lengths = torch.zeros(3), torch.tensor([1, 5, 1000])
    losses = LOSSES[name](Pairs(zeros, zeros, lengths, lengths.flip(0)), 0.5, 0.2)
    torch.testing.assert_close(losses, torch.full((3,), FIRST[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*LOSSES, "cpo", "simpo", "orpo", "kto"])
def test_extremes_are_finite(name):
    """Sums of +-1e4 and 0 (of log-probabilities: certain answers), answers of one token; so are the gradients."""
    bounds = torch.tensor([0.0, -1e-30, -1e-7, -1.0, -1e4])
    if name in LOSSES or name == "kto":
        bounds = torch.cat([bounds, -bounds])
    chosen, rejected = torch.cartesian_prod(bounds, bounds).T.contiguous().requires_grad_()
    ones = torch.ones_like(chosen)
    pairs = Pairs(chosen, rejected, ones, ones)
    losses = {
        **{key: lambda loss=loss: loss(pairs, 1.0, 0.1) for key, loss in LOSSES.items()},
        "cpo": lambda: cpo(pairs, 1.0, 0.0),
        "simpo": lambda: simpo(pairs, 1.0, 0.0, 0.5),
        "orpo": lambda: orpo(pairs),
        "kto": lambda: kto(chosen - rejected, chosen > rejected, torch.tensor(0.0), 1.0),
    }[name]()
    assert losses.isfinite().all()
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert all(gradient.isfinite().all() for gradient in gradients)
