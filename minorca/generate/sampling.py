"""Sampling of the next token, on the device and for all slots at once.

A draw is a function of (seed, sample, position) and the slot's logits alone, so that an answer can be reproduced
whatever else is in the batch. Ids that a grammar excludes have no part in it; then the order is that of transformers:
repetition penalty, frequency and presence penalties, logit bias, temperature and filters.

Axes in names: N slots, V vocabulary, T tokens; 5 and 8 are literal.
"""

import hashlib
import secrets
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minorca.errors import UserError, raise_problems
from minorca.generate.on_device import copy_to
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
        presence_penalty: subtracted from the logits of all ids in the answer (OpenAI's API reference); 0 disables it.
        frequency_penalty: the same, once for each time that an id is in the answer; 0 disables it.
        logit_bias: what is added to the logits of ids.

    Raises:
        UserError: every value that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                yield UserError("must be from -2 to 2", field=name)
        if not all(-100 <= bias <= 100 for bias in self.logit_bias.values()):
            yield UserError("must have values from -100 to 100", field="logit_bias")

    @property
    def filters(self) -> bool:
        """Whether it draws from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def words(self, sample: int) -> list[int]:
        """What the device needs to know of any request, as five integers of 64 bits: a seed, and eight numbers in fp32.

        Args:
            sample: an index that makes draws with one seed differ.
        """
        seed = secrets.randbits(64) if self.seed is None else self.seed
        mixed = hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest()
        # Above the size of any vocabulary where it is off.
        top_k = self.top_k or 2**31
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        numbers = (self.temperature, *penalties, self.top_p, top_k, self.min_p, self.filters)
        return list(struct.unpack("=5q", mixed + struct.pack("=8f", *numbers)))


class SamplingOps(NamedTuple):
    """The operations that some slot needs: known on the host, and constant within a CUDA graph."""

    draw: bool
    filter: bool
    penalize: bool
    adjust: bool
    mask: bool


class Adjustments:
    """What is added to the logits of N slots, on the device: penalties of generated ids, biases, and bans of stop ids.

    A row without any keeps its logits. All memory is allocated here, so that CUDA graphs can use it.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        # How often each id was generated, and what is added to its logit.
        self.counts_NV = torch.zeros(slots, vocab_size, device=device)
        self.bias_NV = torch.zeros(slots, vocab_size, device=device)
        # The ids that are banned at positions before `ban_end_N`.
        self.banned_NV = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        self.ban_end_N = torch.zeros(slots, dtype=torch.int64, device=device)

    def set(self, slot: int, bias: Mapping[int, float], banned: Collection[int], ban_end: int) -> None:
        for rows_NV in (self.counts_NV, self.bias_NV, self.banned_NV):
            rows_NV[slot].zero_()
        if bias:
            ids_T = self._to_device(list(bias), torch.int64)
            self.bias_NV[slot].index_copy_(0, ids_T, self._to_device(list(bias.values()), torch.float32))
        if banned:
            self.banned_NV[slot].index_fill_(0, self._to_device(list(banned), torch.int64), True)
        self.ban_end_N[slot].fill_(ban_end)

    def _to_device(self, values: list, dtype: torch.dtype) -> Tensor:
        return copy_to(self.counts_NV.device, torch.tensor(values, dtype=dtype))

    def apply(self, logits_NV: Tensor, positions_N: Tensor, slots: slice, penalties_N2: Tensor) -> Tensor:
        """The adjusted logits, [N, V] fp32; `penalties_N2` are the frequency and presence penalties, [N, 2]."""
        counts_NV = self.counts_NV[slots]
        frequency_N1, presence_N1 = penalties_N2.split(1, dim=-1)
        logits_NV = logits_NV.float() - frequency_N1 * counts_NV - presence_N1 * (counts_NV > 0)
        bans_N1 = (positions_N < self.ban_end_N[slots])[:, None]
        return (logits_NV + self.bias_NV[slots]).masked_fill(self.banned_NV[slots] & bans_N1, -torch.inf)

    def count(self, ids_N: Tensor, slots: slice) -> None:
        """Counts the ids that were sampled."""
        ones_N1 = torch.ones_like(ids_N, dtype=torch.float32)[:, None]
        self.counts_NV[slots].scatter_add_(-1, ids_N[:, None], ones_N1)


class Sampler:
    """The sampling settings of N slots, and what their logits are changed by, on the device.

    That is the ids that each has seen, for the repetition penalty; the rest is allocated when a request first needs it.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.settings = [Sampling()] * slots
        self.words_N5 = torch.tensor(Sampling(seed=0).words(0), device=device).repeat(slots, 1)
        self.seen_NV = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)
        # The slots that need the adjustments.
        self.adjusted = [False] * slots
        self.adjustments: Adjustments | None = None
        self.masks = TokenMasks(slots, vocab_size, device)

    def set(
        self,
        slot: int,
        sampling: Sampling,
        words_5: Tensor,
        prompt_T: Tensor,
        stop_ids: Collection[int] = (),
        min_new_tokens: int = 0,
    ) -> None:
        """Sets how a slot samples, once its prompt is prefilled.

        Args:
            words_5: what `sampling.words` returned, on the device.
            prompt_T: the ids that the repetition penalty starts from, on the device.
            stop_ids, min_new_tokens: ids that are not sampled before this many others.
        """
        slots, vocab_size = self.seen_NV.shape
        self.settings[slot] = sampling
        self.words_N5[slot].copy_(words_5)
        # A tokenizer may have more ids than the model.
        banned = [i for i in stop_ids if 0 <= i < vocab_size] if min_new_tokens else []
        penalizes = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.adjusted[slot] = penalizes or bool(sampling.logit_bias or banned)
        if self.adjusted[slot] and self.adjustments is None:
            self.adjustments = Adjustments(slots, vocab_size, self.seen_NV.device)
        if self.adjustments is not None:
            self.adjustments.set(slot, sampling.logit_bias, banned, len(prompt_T) + min_new_tokens)
        self.seen_NV[slot].fill_(False)
        if sampling.repetition_penalty != 1:
            self.seen_NV[slot].index_fill_(0, prompt_T, True)

    def clear(self, slot: int) -> None:
        """Makes a free slot greedy, which costs least, for `ops`; what the device computes for it is not read."""
        self.settings[slot] = Sampling()
        self.adjusted[slot] = False
        self.masks.clear(slot)

    def ops(self, slots: slice) -> SamplingOps:
        """The operations that sampling these slots needs."""
        settings = self.settings[slots]
        drawing = [sampling for sampling in settings if sampling.temperature > 0]
        return SamplingOps(
            draw=bool(drawing),
            filter=any(sampling.filters for sampling in drawing),
            penalize=any(sampling.repetition_penalty != 1 for sampling in settings),
            adjust=any(self.adjusted[slots]),
            mask=any(slot in self.masks.constraints for slot in range(*slots.indices(len(self.settings)))),
        )

    def __call__(self, logits_NV: Tensor, positions_N: Tensor, slots: slice, ops: SamplingOps) -> Tensor:
        """Samples a token for each of the slots, and counts it where there is a penalty.

        Args:
            logits_NV: [N, V], N the number of slots in `slots`.
            positions_N: [N] int64, the positions of the new tokens in their sequences.
            ops: of these slots.

        Returns:
            The ids, [N] int64.
        """
        numbers_N8 = self.words_N5[slots, 1:].view(torch.float32)
        if ops.mask:
            logits_NV = self.masks.apply(logits_NV, slots)
        adjustments = self.adjustments if ops.adjust else None
        if ops.penalize:
            logits_NV = repetition_penalty(logits_NV, self.seen_NV[slots], numbers_N8[:, 1])
        if adjustments:
            logits_NV = adjustments.apply(logits_NV, positions_N, slots, numbers_N8[:, 2:4])
        if ops.draw:
            filters_N4 = numbers_N8[:, 4:] if ops.filter else None
            ids_N = draw(logits_NV, numbers_N8[:, 0], self.words_N5[slots, 0], positions_N, filters_N4)
        else:
            # On the CPU argmax takes five times as long in bf16.
            ids_N = (logits_NV if logits_NV.is_cuda else logits_NV.float()).argmax(-1)
        if ops.penalize:
            self.seen_NV[slots].scatter_(-1, ids_N[:, None], True)
        if adjustments:
            adjustments.count(ids_N, slots)
        return ids_N
