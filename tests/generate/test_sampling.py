"""Sampling: frequencies follow the distribution of transformers' filters; draws are reproducible and independent."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minorca.errors import UserError
from minorca.generate.sampling import Sampler, Sampling
from minorca_kernels.draw import uniform

VOCABULARY = 12
DRAWS = 40_000
LOGITS_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


def choose(sampler: Sampler, slot: int, sampling: Sampling, sample: int = 0, prompt=(1,)) -> None:
    sampler.set(slot, sampling, torch.tensor(sampling.words(sample)), torch.tensor(prompt, dtype=torch.int64))


def draws(logits_V: torch.Tensor, sampling: Sampling, slots: int = DRAWS, prompt=(), position: int = 5) -> torch.Tensor:
    """One id from each of many slots, which differ in their seeds."""
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    wide = Sampler(slots, VOCABULARY, torch.device("cpu"))
    choose(sampler, 0, sampling, prompt=prompt)
    wide.settings = sampler.settings * slots
    wide.words_N5 = sampler.words_N5.repeat(slots, 1)
    wide.words_N5[:, 0] = torch.arange(slots) * 7919
    wide.seen_NV = sampler.seen_NV.repeat(slots, 1)
    return wide(logits_V.repeat(slots, 1), torch.full((slots,), position), slice(None), wide.ops(slice(None)))


CASES = {
    "temperature": (Sampling(temperature=0.6), [TemperatureLogitsWarper(0.6)]),
    "top_k": (Sampling(temperature=1.0, top_k=3), [TopKLogitsWarper(3)]),
    "top_p": (Sampling(temperature=1.0, top_p=0.7), [TopPLogitsWarper(0.7)]),
    "min_p": (Sampling(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
    "penalty": (Sampling(temperature=1.0, repetition_penalty=1.8), [RepetitionPenaltyLogitsProcessor(1.8)]),
    "all": (
        Sampling(temperature=1.4, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers_filters(case):
    sampling, warpers = CASES[case]
    prompt = [1, 4, 4, 7]
    ids = torch.LongTensor([prompt])
    expected = LogitsProcessorList(warpers)(ids, LOGITS_V[None].clone())[0].softmax(-1)
    seen = torch.bincount(draws(LOGITS_V, sampling, prompt=prompt), minlength=VOCABULARY) / DRAWS
    assert torch.allclose(seen, expected, atol=4 * (0.25 / DRAWS) ** 0.5)
    assert (seen[expected == 0] == 0).all()


def test_temperature_zero_is_the_likeliest_and_a_penalty_counts_what_was_drawn():
    sampler = Sampler(2, VOCABULARY, torch.device("cpu"))
    choose(sampler, 0, Sampling(repetition_penalty=100.0), prompt=[int(LOGITS_V.argmin())])
    logits_NV = LOGITS_V.clamp(min=0.1).repeat(2, 1)
    seen = []
    for position in range(4):
        seen.append(sampler(logits_NV, torch.tensor([position] * 2), slice(None), sampler.ops(slice(None))).tolist())
    likeliest = LOGITS_V.topk(4).indices.tolist()
    assert [row[0] for row in seen] == likeliest and [row[1] for row in seen] == likeliest[:1] * 4


def test_a_draw_depends_on_seed_sample_and_position_alone():
    """Not on its slot, and not on what other slots ask for, which decides how the batch is computed."""
    asked = Sampling(temperature=1.0, seed=3)
    neighbours = [
        Sampling(),
        Sampling(temperature=2.0, top_p=0.5),
        Sampling(temperature=1.0, repetition_penalty=2.0, min_p=0.1, frequency_penalty=1.0, logit_bias={7: 9.0}),
    ]
    generator = torch.Generator().manual_seed(1)
    found = {}
    logits_TV = torch.randn(50, 500, generator=generator)
    ids = []
    for slot in range(4):
        for beside in ([], neighbours):
            sampler = Sampler(4, 500, torch.device("cpu"))
            for n, other in enumerate(beside):
                choose(sampler, n + (n >= slot), other)
            choose(sampler, slot, asked, 2)
            ids = [
                sampler(logits_V.repeat(4, 1), torch.full((4,), t), slice(None), sampler.ops(slice(None)))[slot].item()
                for t, logits_V in enumerate(logits_TV)
            ]
            found[slot, bool(beside)] = tuple(ids)
    assert len(set(found.values())) == 1 and len(set(ids)) > 40


def test_uniform_numbers_are_uniform_and_independent():
    seeds, positions = torch.meshgrid(torch.randint(-(2**63), 2**63 - 1, (300,)), torch.arange(300), indexing="ij")
    u = uniform(seeds.flatten(), positions.flatten()).double()
    assert u.min() >= 0 and u.max() < 1
    assert torch.allclose(torch.histc(u, 20, 0, 1) / len(u), torch.tensor(0.05, dtype=torch.float64), atol=0.004)
    u = u.view(300, 300)
    # Neighbouring positions, and other seeds.
    for one, other in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 0.015


def test_an_id_with_probability_zero_is_never_drawn():
    logits_V = torch.full((VOCABULARY,), -torch.inf)
    logits_V[[3, 9]] = 0.0
    assert set(draws(logits_V, Sampling(temperature=1.0)).tolist()) == {3, 9}
    assert set(draws(logits_V, Sampling(temperature=1.0, top_p=0.99)).tolist()) == {3, 9}


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match="temperature.*; top_p.*; top_k.*; min_p.*; repetition_penalty"):
        Sampling(temperature=-1, top_p=0, top_k=-1, min_p=2, repetition_penalty=0)
    with pytest.raises(UserError, match="presence_penalty.*; frequency_penalty.*; logit_bias"):
        Sampling(presence_penalty=2.1, frequency_penalty=float("nan"), logit_bias={1: 101.0})
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature=float("nan"))


def test_penalties_and_biases_are_openais():
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j], after the repetition penalty: greedy ids
    against the formula in fp64, where the prompt counts for the repetition penalty alone."""
    generator = torch.Generator().manual_seed(2)
    logits_TV = torch.randn(60, VOCABULARY, generator=generator)
    prompt = [0, 3, 3]
    cases = [
        Sampling(frequency_penalty=0.4),
        Sampling(presence_penalty=0.7),
        Sampling(presence_penalty=-0.2, frequency_penalty=-0.01),
        Sampling(logit_bias={4: 2, 7: -100}),
        Sampling(
            presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.4, logit_bias={2: 0.75, 5: -1.0, 0: 0.5}
        ),
    ]
    sampler = Sampler(len(cases) + 1, VOCABULARY, torch.device("cpu"))
    for slot, sampling in enumerate(cases):
        choose(sampler, slot, sampling, prompt=prompt)
    drawn = []
    for position, logits_V in enumerate(logits_TV):
        ids_N = sampler(
            logits_V.repeat(len(cases) + 1, 1),
            torch.full((len(cases) + 1,), position),
            slice(None),
            sampler.ops(slice(None)),
        )
        drawn.append(ids_N.tolist())
    for slot, sampling in enumerate([*cases, Sampling()]):
        counts = dict.fromkeys(range(VOCABULARY), 0)
        for logits_V, ids in zip(logits_TV.double().tolist(), drawn):
            adjusted = []
            for i, logit in enumerate(logits_V):
                penalty = sampling.repetition_penalty if counts[i] or i in prompt else 1
                logit = logit / penalty if logit > 0 else logit * penalty
                logit -= counts[i] * sampling.frequency_penalty + (counts[i] > 0) * sampling.presence_penalty
                adjusted.append(logit + sampling.logit_bias.get(i, 0))
            assert ids[slot] == max(range(VOCABULARY), key=adjusted.__getitem__)
            counts[ids[slot]] += 1


def test_a_slot_that_is_used_again_is_not_adjusted():
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    choose(sampler, 0, Sampling(frequency_penalty=2.0, logit_bias={1: 100.0}))
    assert sampler.ops(slice(None)).adjust
    for sampling in (Sampling(presence_penalty=0.01), Sampling()):
        sampler.clear(0)
        choose(sampler, 0, sampling)
        ids_N = sampler(LOGITS_V[None], torch.tensor([1]), slice(None), sampler.ops(slice(None)))
        assert ids_N.item() == LOGITS_V.argmax()
    assert not sampler.ops(slice(None)).adjust


def test_requests_that_are_not_adjusted_take_no_memory():
    sampler = Sampler(1, VOCABULARY, torch.device("cpu"))
    choose(sampler, 0, Sampling(temperature=1.0, repetition_penalty=1.2, top_p=0.9))
    assert sampler.adjustments is None and not sampler.ops(slice(None)).adjust
