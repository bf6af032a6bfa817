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
        # On the host, and where a CUDA graph finds it.
        self._buffers: tuple[Tensor, Tensor] | None = None

    def set(self, slot: int, constraint: Constraint) -> None:
        """Constrains a slot from its first token on."""
        self.constraints[slot] = constraint
        self._fill([slot])

    def update(self) -> None:
        """Sets the bits of every constrained slot, after its constraint has consumed the last id."""
        if self.constraints:
            self._fill(list(self.constraints))

    def apply(self, logits_NV: Tensor, slots: slice) -> Tensor:
        """A copy of the logits [N, V] of these slots, minus infinity where an id may not come next."""
        assert self._buffers is not None
        words_NW = self._buffers[1][slots]
        bits_NWB = words_NW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=self._device) & 1
        return logits_NV.masked_fill(bits_NWB.flatten(1)[:, : logits_NV.shape[1]] == 0, -torch.inf)

    def _fill(self, slots: list[int]) -> None:
        if self._buffers is None:
            # A slot's bits are read only after its tokens have reached the host, when no copy is running any more.
            is_cuda = self._device.type == "cuda"
            host_NW = torch.full(self._shape, -1, dtype=torch.int32, pin_memory=is_cuda)
            self._buffers = host_NW, host_NW.to(self._device)
        host_NW, device_NW = self._buffers
        for slot in slots:
            self.constraints[slot].fill(host_NW[slot])
            device_NW[slot].copy_(host_NW[slot], non_blocking=True)
