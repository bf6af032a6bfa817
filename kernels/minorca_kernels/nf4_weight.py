"""A frozen weight stored in NF4 (nf4.py).

A stacked projection's parts, q, k and v, are quantized each on its own, as in files of bitsandbytes: each has nested
blocks and an offset of its own. Axes: N out, K in, P parts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca_kernels.dequantize_nf4 import dequantize_nf4, nested_parts, tables
from minorca_kernels.frozen_weight import FrozenWeight, fill_rows, local_part
from minorca_kernels.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    block_absmax,
    dequantize_absmax_definition,
    dequantize_nf4_definition,
    quantize_absmax,
    quantize_nf4,
)

# Rows are quantized so many at a time.
BLOCK_ROWS = 1024


class QuantizedPart(NamedTuple):
    """A part of n weights as bitsandbytes stores it.

    Attributes:
        codes: uint8 [n / 2].
        absmax: fp32 [n / 64], or with double quantization their codes, uint8.
        nested_absmax: fp32 [ceil(n / 64 / 256)]; None without double quantization, as is the offset.
        offset: a fp32 scalar.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def scales(self) -> Tensor:
        """The absmax values, fp32 [n / 64]."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return dequantize_absmax_definition(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [n], by the definition."""
        return dequantize_nf4_definition(self.codes, self.scales(), dtype)


def _nested_blocks(rows: int, in_features: int) -> int:
    return -(-rows * in_features // (BLOCK * NESTED_BLOCK))


def _copy_rows(parameter: Tensor, start: int, rows: Tensor) -> None:
    """Copies rows, from row `start` of the whole, as far as they are among those that this rank stores."""
    local, first = local_part(parameter)
    begin, end = max(start, first), min(start + len(rows), first + len(local))
    if begin < end:
        local[begin - first : end - first].copy_(rows[begin - start : end - start])


class NF4Weight(FrozenWeight):
    """W in 4 bits, as dequantize_nf4.py describes it. All of its state is bytes, which FSDP's mixed precision and a
    change of dtype leave as they are, in parameters that are sharded by rows.

    Args:
        parts: rows of each of the stacked weights.
        in_features: a multiple of 64, so that each row is made of whole blocks.
        dtype: of the weights that are quantized.
        double_quant: whether the absmax values are quantized too.

    Raises:
        ValueError: rows that are not made of whole blocks.
    """

    kind = "nf4"
    makes_rows = True

    def __init__(
        self,
        parts: Sequence[int],
        in_features: int,
        dtype: torch.dtype,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ):
        if in_features % BLOCK:
            raise ValueError(f"rows of {in_features} weights are not made of whole blocks of {BLOCK}")
        super().__init__(sum(parts), in_features)
        self.parts = tuple(parts)
        self.dtype = dtype
        self.double_quant = double_quant

        def empty(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, dtype=torch.uint8, device=device), requires_grad=False)

        blocks = in_features // BLOCK
        self.codes = empty(self.out_features, in_features // 2)
        self.absmax = empty(self.out_features, blocks if double_quant else 4 * blocks)
        self.tables = nn.Parameter(tables(device), requires_grad=False)
        if double_quant:
            self.nested_absmax = empty(sum(_nested_blocks(rows, in_features) for rows in parts), 4)
            self.part_table = empty(len(parts), 12)

    def tensors(self) -> list[Tensor]:
        nested = [self.nested_absmax, self.part_table] if self.double_quant else []
        return [self.codes, self.absmax, self.tables, *nested]

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return F.linear(x_TK, dequantize_nf4(tensors, x_TK.dtype))

    @staticmethod
    def transposed_product(dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        return F.linear(dy_TN, dequantize_nf4(tensors, dy_TN.dtype).t())

    @classmethod
    def add_product(cls, y_TN: Tensor, x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return y_TN.addmm_(x_TK, dequantize_nf4(tensors, x_TK.dtype).t())

    @classmethod
    def add_transposed_product(cls, dx_TK: Tensor, dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        return dx_TK.addmm_(dy_TN, dequantize_nf4(tensors, dy_TN.dtype))

    @staticmethod
    def scratch_width(tensors: list[Tensor], columns: int) -> int:
        # rows of K, a multiple of 64, stay a multiple of 64 elements apart
        return columns + -columns % 64

    @staticmethod
    def padded_rows(tensors: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(tensors, dtype, NF4Weight.scratch_width(tensors, columns))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K], by default in the dtype that it was quantized from."""
        return dequantize_nf4(self.tensors(), dtype or self.dtype)

    # ---------------------------------------------------------------------------------------------- load and read back

    def store_part(self, part: int, read: Callable[[int, int], Tensor]) -> None:
        """Quantizes a part while it is read; this rank keeps its rows.

        Every rank needs the absmax of all rows of a part: `read(start, stop)` is called once for every block of at most
        1024 rows, in order, and gives rows [start, stop) of the part [rows, K] on any device, in the dtype that they
        are quantized from. No more than one block is held.
        """
        rows = self.parts[part]
        local, local_start = local_part(self.codes)
        first = sum(self.parts[:part])
        absmax = torch.empty(rows, self.in_features // BLOCK, device=local.device)
        for start in range(0, rows, BLOCK_ROWS):
            values = read(start, min(start + BLOCK_ROWS, rows)).to(local.device)
            stop = start + len(values)
            if local_start < first + stop and first + start < local_start + len(local):
                codes, block = quantize_nf4(values)
                _copy_rows(self.codes, first + start, codes.view(len(values), -1))
            else:
                block = block_absmax(values)
            absmax[start:stop] = block.view(stop - start, -1)
        if self.double_quant:
            # on the host, as the mean depends on the order of its sum
            self._store_scales(part, *quantize_absmax(absmax.view(-1).cpu()))
        else:
            self._store_scales(part, absmax)

    def store_quantized_part(self, part: int, state: QuantizedPart) -> None:
        """Stores what `quantized_part` gives, or a file of bitsandbytes; this rank keeps its rows."""
        _copy_rows(self.codes, sum(self.parts[:part]), state.codes.view(self.parts[part], -1))
        self._store_scales(part, *state[1:])

    def _store_scales(
        self, part: int, absmax: Tensor, nested_absmax: Tensor | None = None, offset: Tensor | None = None
    ) -> None:
        first, rows = sum(self.parts[:part]), self.parts[part]
        # a module that comes from the meta device has lost them
        fill_rows(self.tables, lambda start, stop: tables()[start:stop])
        _copy_rows(self.absmax, first, absmax.reshape(rows, -1).view(torch.uint8))
        if nested_absmax is None or offset is None:
            return
        first_block = sum(_nested_blocks(before, self.in_features) for before in self.parts[:part])
        _copy_rows(self.nested_absmax, first_block, nested_absmax.view(-1, 1).view(torch.uint8))
        entry = torch.tensor([[first, first_block, int(offset.cpu().view(torch.int32))]], dtype=torch.int32)
        _copy_rows(self.part_table, part, entry.view(torch.uint8))

    def quantized_part(self, part: int) -> QuantizedPart:
        """A part of a weight that is whole on this rank."""
        first, rows = sum(self.parts[:part]), self.parts[part]
        codes, absmax = (local_part(parameter)[0][first : first + rows] for parameter in (self.codes, self.absmax))
        if not self.double_quant:
            return QuantizedPart(codes.flatten(), absmax.flatten().view(torch.float32))
        return QuantizedPart(
            codes.flatten(), absmax.flatten(), *nested_parts(self.nested_absmax, self.part_table)[part]
        )
