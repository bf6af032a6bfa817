"""Sampling of the next token, on the device and for all slots at once.

A draw is a function of (seed, sample, position) and the slot's logits alone, so that an answer can be reproduced
whatever else is in the batch. Ids that a grammar excludes have no part in it; then the order is that of transformers:
repetition penalty, temperature and filters.

Axes in names: N slots, V vocabulary, T tokens; 4 and 6 are literal.
"""

import hashlib
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minorca.errors import UserError, raise_problems
from minorca.generate.token_masks import TokenMasks
from minorca_kernels import draw, repetition_penalty


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedy by default.

    Args:
        temperature: divides the logits; 0 chooses the most likely token.
        top_p: draw from the smallest set of most likely tokens with at least this probability (Holtzman et al. 2020,
            arXiv:1904.09751); 1 disables it.
        top_k: draw from this many most likely tokens; 0 disables it.
        min_p: exclude tokens less likely than this fraction of the most likely one's probability (Nguyen et al. 2024,
            arXiv:2407.01082); 0 disables it.
        repetition_penalty: divides positive logits and multiplies negative ones of all ids in the prompt and the answer
            (Keskar et al. 2019, arXiv:1909.05858); 1 disables it.
        seed: makes draws reproducible; None takes a random one.

    Raises:
        UserError: every value that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
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

    @property
    def filters(self) -> bool:
        """Whether it draws from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def words(self, sample: int) -> list[int]:
        """What the device needs to know, as four integers of 64 bits: a seed, and six numbers in fp32.

        Args:
            sample: an index that makes draws with one seed differ.
        """
        seed = secrets.randbits(64) if self.seed is None else self.seed
        mixed = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
        # Above the size of any vocabulary where it is off.
        top_k = self.top_k or 2**31
        numbers = (self.temperature, self.repetition_penalty, self.top_p, top_k, self.min_p, self.filters)
        return list(struct.unpack("=4q", mixed + struct.pack("=6f", *numbers)))


class SamplingOps(NamedTuple):
    """The operations that some slot needs: known on the host, and constant within a CUDA graph."""

    draw: bool
    filter: bool
    penalize: bool
    mask: bool


class Sampler:
    """The sampling settings of N slots, and the ids that each has seen (for the repetition penalty), on the device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.settings = [Sampling()] * slots
        self.words_N4 = torch.tensor(Sampling(seed=0).words(0), device=device).repeat(slots, 1)
        self.seen_NV = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        self.masks = TokenMasks(slots, vocab_size, device)

    def set(self, slot: int, sampling: Sampling, words_4: Tensor, prompt_T: Tensor) -> None:
        """Sets how a slot samples, once its prompt is prefilled.

        Args:
            words_4: what `sampling.words` returned, on the device.
            prompt_T: the ids that the repetition penalty starts from, on the device.
        """
        self.settings[slot] = sampling
        self.words_N4[slot].copy_(words_4)
        self.seen_NV[slot].fill_(False)
        if sampling.repetition_penalty != 1:
            self.seen_NV[slot].index_fill_(0, prompt_T, True)

    def clear(self, slot: int) -> None:
        """Makes a free slot greedy, which costs least, for `ops`; what the device computes for it is not read."""
        self.settings[slot] = Sampling()
        self.masks.constraints.pop(slot, None)

    def ops(self, slots: slice) -> SamplingOps:
        """The operations that sampling these slots needs."""
        settings = self.settings[slots]
        drawing = [sampling for sampling in settings if sampling.temperature > 0]
        return SamplingOps(
            draw=bool(drawing),
            filter=any(sampling.filters for sampling in drawing),
            penalize=any(sampling.repetition_penalty != 1 for sampling in settings),
            mask=any(slot in self.masks.constraints for slot in range(*slots.indices(len(self.settings)))),
        )

    def __call__(self, logits_NV: Tensor, positions_N: Tensor, slots: slice, ops: SamplingOps) -> Tensor:
        """Samples a token for each of the slots, and marks it as seen where there is a penalty.

        Args:
            logits_NV: [N, V], N the number of slots in `slots`.
            positions_N: [N] int64, the positions of the new tokens in their sequences.
            ops: of these slots.

        Returns:
            The ids, [N] int64.
        """
        numbers_N6 = self.words_N4[slots, 1:].view(torch.float32)
        if ops.mask:
            logits_NV = self.masks.apply(logits_NV, slots)
        if ops.penalize:
            logits_NV = repetition_penalty(logits_NV, self.seen_NV[slots], numbers_N6[:, 1])
        if ops.draw:
            filters_N4 = numbers_N6[:, 2:] if ops.filter else None
            ids_N = draw(logits_NV, numbers_N6[:, 0], self.words_N4[slots, 0], positions_N, filters_N4)
        else:
            # On the CPU argmax takes five times as long in bf16.
            ids_N = (logits_NV if logits_NV.is_cuda else logits_NV.float()).argmax(-1)
        if ops.penalize:
            self.seen_NV[slots].scatter_(-1, ids_N[:, None], True)
        return ids_N
