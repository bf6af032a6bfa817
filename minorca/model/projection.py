"""A layer's linear map: how its frozen weight is stored is the business of `base`, what is added to it of its adapters.

Axes: T tokens, K in, N out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minorca.model.layout import ProjectionSpec
from minorca.model.lora import LoRA
from minorca.model.row_lora import RowLoRA
from minorca_kernels import DenseWeight, FrozenWeight, swiglu

# the network imports this file
if TYPE_CHECKING:
    from minorca.model.network import RMSNorm


class Projection(nn.Module):
    """One projection, or several that share an input stacked by rows: x W^T, plus what the adapters add.

    Args:
        parts: the projections that are stacked, in order.
        gated_input: the input is a buffer [T, 2K] of gate and up, and W multiplies its SwiGLU.
        normed_input: the input is a norm's output: `of_norm` is called.

    Attributes:
        base: how W is stored and multiplied; any kind may be put in the place of another.
        lora: the trained adapters, or None.
        row_lora: adapters of which each row of the input uses its own or none, for inference; or None.
    """

    def __init__(self, parts: tuple[ProjectionSpec, ...], gated_input: bool = False, normed_input: bool = False):
        super().__init__()
        self.parts = parts
        self.gated_input = gated_input
        self.normed_input = normed_input
        self.base: FrozenWeight = DenseWeight(torch.empty(parts[-1].stop, parts[0].in_features))
        self.lora: LoRA | None = None
        self.row_lora: RowLoRA | None = None

    def forward(self, x_TK: Tensor) -> Tensor:
        if self.lora is not None:
            # its operator takes the buffer, and recomputes the SwiGLU in backward instead of saving it
            return self.lora(x_TK, self.base, self.gated_input)
        if self.gated_input:
            x_TK = swiglu(x_TK)
        y_TN = self.base.linear(x_TK)
        return y_TN if self.row_lora is None else self.row_lora(x_TK, y_TN)

    def of_norm(self, norm: RMSNorm, x_TK: Tensor, update_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds update, where there is one, to x; returns the sum, and the projection [T, N] of its norm."""
        if self.lora is not None:
            # its operator writes the norm beside its products, and recomputes it in backward instead of saving it
            return self.lora.of_norm(norm, x_TK, update_TK, self.base)
        x_TK, normed_TK = norm(x_TK, update_TK)
        return x_TK, self(normed_TK)
