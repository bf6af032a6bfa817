"""Several adapters beside a projection, of which each row of a batch uses its own or none.

Source: Chen et al. 2023 (Punica, arXiv:2310.18547). Axes: T tokens, K in, N out, R ranks of all adapters side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca.model.lora import AdapterChoice, LoRA


class RowLoRA(nn.Module):
    """Adds to each row of a projection's output the update of that row's own adapter.

    All adapters' A lie side by side in one product, what belongs to other adapters than a row's is set to zero, and B
    gathers: two small products, whichever rows use which adapter. They are skipped while no row uses any.

    Args:
        columns: index, scale and rank of each part of an adapter, in the order of a's rows and b's columns.
    """

    def __init__(self, choice: AdapterChoice, columns: tuple[tuple[int, float, int], ...], a_RK: Tensor, b_NR: Tensor):
        super().__init__()
        self.choice = choice
        self.columns = columns
        self.a_RK = a_RK
        self.b_NR = b_NR
        ranks = torch.tensor(self.ranks)

        def by_rank(values: list) -> Tensor:
            return torch.tensor(values).repeat_interleave(ranks).to(a_RK.device)

        self.index_R = by_rank([index for index, *_ in columns])
        self.scale_R = by_rank([scale for _, scale, _ in columns])

    @classmethod
    def of(cls, out_features: int, choice: AdapterChoice, loras: list[tuple[int, LoRA]]) -> RowLoRA:
        """loras: (index, adapters) of every adapter that acts on this projection."""
        matrices = [(index, lora.scales[part.name], part, lora) for index, lora in loras for part in lora.parts]
        ranks = [len(lora.a[part.name]) for _, _, part, lora in matrices]
        a_RK = torch.cat([lora.a[part.name].detach() for _, _, part, lora in matrices])
        b_NR = a_RK.new_zeros(out_features, sum(ranks))
        for columns, (_, _, part, lora) in zip(b_NR.split(ranks, dim=1), matrices):
            columns[part.start : part.stop] = lora.b[part.name].detach()
        return cls(choice, tuple((index, scale, rank) for (index, scale, *_), rank in zip(matrices, ranks)), a_RK, b_NR)

    @property
    def ranks(self) -> list[int]:
        return [rank for *_, rank in self.columns]

    def beside(self, other: RowLoRA) -> RowLoRA:
        """These adapters and those of the other."""
        a_RK, b_NR = torch.cat((self.a_RK, other.a_RK)), torch.cat((self.b_NR, other.b_NR), dim=1)
        return RowLoRA(self.choice, self.columns + other.columns, a_RK, b_NR)

    def without(self, index: int) -> RowLoRA | None:
        """The other adapters; None if there are none."""
        parts = zip(self.columns, self.a_RK.split(self.ranks), self.b_NR.split(self.ranks, dim=1))
        kept = [part for part in parts if part[0][0] != index]
        if not kept:
            return None
        columns, a_RK, b_NR = zip(*kept)
        return RowLoRA(self.choice, columns, torch.cat(a_RK), torch.cat(b_NR, dim=1))

    def forward(self, x_TK: Tensor, y_TN: Tensor) -> Tensor:
        """Adds to y [T, N] in place, and returns it."""
        if not self.choice.in_use:
            return y_TN
        factors = self.choice.factors
        if self.columns not in factors:
            factors[self.columns] = torch.where(self.choice.index_T1 == self.index_R, self.scale_R, 0)
        # in place, a product of bf16 and fp32 is computed in fp32 and rounded in one pass
        return y_TN.addmm_(F.linear(x_TK, self.a_RK).mul_(factors[self.columns]), self.b_NR.t())
