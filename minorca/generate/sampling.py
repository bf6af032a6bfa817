"""Which token comes next: drawn on the device, for all rows at once, without state.

What is drawn is a function of (seed, sample, position) and the row's logits, so that an answer repeats whoever its neighbours
are. Order of the filters as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minorca.errors import UserError, raise_problems


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are greedy."""

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = (
        1.0  # the fewest that hold so much of the probability (Holtzman et al. 2020, arXiv:1904.09751); 1: all
    )
    top_k: int = 0  # of the so many likeliest; 0: of all
    min_p: float = 0.0  # none less than so many times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)
    repetition_penalty: float = (
        1.0  # on the logits of all ids of the prompt and the answer (Keskar et al. 2019, arXiv:1909.05858)
    )
    seed: int | None = None  # None: every time another

    def __post_init__(self):
        """Raises UserError: every value that is out of range, by field."""
        raise_problems(self._problems())

    def _problems(self) -> Iterator[UserError]:
        if not 0 <= self.temperature <= 100:
            yield UserError("must be from 0 to 100", field="temperature")
        if not 0 < self.top_p <= 1:
            yield UserError("must be over 0 and at most 1", field="top_p")
        if self.top_k < 0:
            yield UserError("must be 0 (off) or more", field="top_k")
        if not 0 <= self.min_p <= 1:
            yield UserError("must be from 0 to 1", field="min_p")
        if not 0 < self.repetition_penalty <= 100:
            yield UserError("must be over 0 and at most 100", field="repetition_penalty")


class Sampler:
    """The settings of N rows on the device, and the ids that each has had."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device):
        self.settings = [Sampling()] * rows
        self.seed_N = torch.zeros(rows, dtype=torch.int64, device=device)
        self.values_6N = torch.zeros(6, rows, device=device)
        self.had_NV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        for row in range(rows):
            self.clear(row)

    def set(self, row: int, sampling: Sampling, sample: int, prompt: list[int]) -> None:
        """The row draws so from now on, when its prompt is read; `sample` tells draws of one seed apart."""
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        mixed = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
        self.seed_N[row] = int.from_bytes(mixed, "little", signed=True)
        self._set(row, sampling)
        self.had_NV[row] = False
        if sampling.repetition_penalty != 1:
            self.had_NV[row, torch.tensor(prompt, device=self.had_NV.device)] = True

    def clear(self, row: int) -> None:
        """The row is nobody's."""
        self._set(row, Sampling())

    def _set(self, row: int, sampling: Sampling) -> None:
        self.settings[row] = sampling
        top_k = sampling.top_k or self.had_NV.shape[1]
        values = (
            sampling.temperature,
            sampling.top_p,
            top_k,
            sampling.min_p,
            sampling.repetition_penalty,
            _is_ranked(sampling),
        )
        self.values_6N[:, row] = torch.tensor(values, device=self.values_6N.device)

    def kind(self, rows: slice) -> tuple[bool, bool, bool]:
        """Whether any of the rows needs a draw, an order of likelihood, penalties: known on the host, and fixed in a CUDA graph."""
        settings = self.settings[rows]
        drawn = [s for s in settings if s.temperature > 0]
        return bool(drawn), any(map(_is_ranked, drawn)), any(s.repetition_penalty != 1 for s in settings)

    def __call__(self, logits_NV: Tensor, positions_N: Tensor, rows: slice, kind: tuple[bool, bool, bool]) -> Tensor:
        """logits [N, V] of the rows given -> an id each, [N]. positions: of the tokens that are drawn."""
        drawn, ranked, penalised = kind
        temperature_N1, top_p_N1, top_k_N1, min_p_N1, penalty_N1, ranked_N1 = self.values_6N[:, rows, None]
        logits_NV = logits_NV.float()  # on the CPU the largest of bf16 is found five times as slowly
        if penalised:
            logits_NV = torch.where(
                self.had_NV[rows], torch.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1), logits_NV
            )
        ids_N = logits_NV.argmax(-1)
        if drawn:
            scaled_NV, uniform_N = logits_NV / temperature_N1.clamp(min=1e-4), _uniform(self.seed_N[rows], positions_N)
            any_N = _draw(scaled_NV.softmax(-1), uniform_N)
            if ranked:  # by row: a draw must not depend on what the neighbours ask for
                any_N = torch.where(
                    ranked_N1[:, 0] > 0, _ranked(scaled_NV, uniform_N, top_p_N1, top_k_N1, min_p_N1), any_N
                )
            ids_N = torch.where(temperature_N1[:, 0] > 0, any_N, ids_N)
        if penalised:
            self.had_NV[rows] = self.had_NV[rows].scatter(-1, ids_N[:, None], True)
        return ids_N


def _is_ranked(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _ranked(scaled_NV: Tensor, uniform_N: Tensor, top_p_N1: Tensor, top_k_N1: Tensor, min_p_N1: Tensor) -> Tensor:
    sorted_NV, ids_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_NV.shape[-1], device=scaled_NV.device)
    p_NV = sorted_NV.masked_fill(rank_V >= top_k_N1, -torch.inf).softmax(-1)
    before_NV = p_NV.cumsum(-1) - p_NV
    p_NV = p_NV.masked_fill((before_NV >= top_p_N1) | (p_NV < min_p_N1 * p_NV[:, :1]), 0)
    return ids_NV.gather(-1, _draw(p_NV, uniform_N)[:, None])[:, 0]


def _draw(p_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The place at which the sum of p so far passes a share of the whole: never one whose p is 0."""
    total_NV = p_NV.cumsum(-1)
    passed_NV = total_NV <= uniform_N[:, None] * total_NV[:, -1:]
    return (~passed_NV & (p_NV > 0)).int().argmax(-1)


def _uniform(seed_N: Tensor, position_N: Tensor) -> Tensor:
    """[N] fp32 in [0, 1), a function of its arguments: SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    x = seed_N + position_N * -0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return ((x ^ (x >> 31 & (1 << 33) - 1)) >> 40 & (1 << 24) - 1).float() / (1 << 24)
