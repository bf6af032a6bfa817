"""Which ids may come next in each slot, as grammars say: set on the host, applied on the device.

Axes in names: N slots, V vocabulary, W words of 32 ids each.
"""

import torch
from torch import Tensor

from minorca.generate.grammar import Constraint


class TokenMasks:
    """A bit for every id of N slots. It takes no memory until a slot has a constraint.

    Attributes:
        constraints: what the slots' sequences follow, by slot; the other slots may have any id.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.constraints: dict[int, Constraint] = {}
        self._shape = (slots, -(-vocab_size // 32))
        self._device = device
        self._words_NW: Tensor | None = None

    def set(self, slot: int, constraint: Constraint) -> None:
        """Constrains a slot from its first token on."""
        self.constraints[slot] = constraint
        self._fill([slot])

    def clear(self, slot: int) -> None:
        """Lets a slot have any id again."""
        if self.constraints.pop(slot, None) and self._words_NW is not None:
            self._words_NW[slot].fill_(-1)

    def update(self) -> None:
        """Sets the bits of every constrained slot, after its constraint has consumed the last id."""
        if self.constraints:
            self._fill(list(self.constraints))

    def apply(self, logits_NV: Tensor, slots: slice) -> Tensor:
        """A copy of the logits [N, V] of these slots, minus infinity where an id may not come next."""
        assert self._words_NW is not None
        words_NW = self._words_NW[slots]
        bits_NWB = words_NW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=self._device) & 1
        return logits_NV.masked_fill(bits_NWB.flatten(1)[:, : logits_NV.shape[1]] == 0, -torch.inf)

    def _fill(self, slots: list[int]) -> None:
        if self._words_NW is None:
            # where a CUDA graph finds it
            self._words_NW = torch.full(self._shape, -1, dtype=torch.int32, device=self._device)
        # memory of its own: an earlier copy to the device may still be running
        host = torch.empty(len(slots), self._shape[1], dtype=torch.int32, pin_memory=self._device.type == "cuda")
        for row, slot in zip(host, slots):
            self.constraints[slot].fill(row)
            self._words_NW[slot].copy_(row, non_blocking=True)
