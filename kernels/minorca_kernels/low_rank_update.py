"""Strategies to add a low-rank update to a product with a frozen weight; `python -m benchmarks.kernels` compares them.

Each takes x [T, K], W [N, K], s [T, R], and b, an adapter's B [N_i, R_i] for the rows from each of starts, whose
columns lie side by side in s, and gives x W^T + scale * s b^T. "augmented" and "fused" touch the output once.
Axes: T tokens, N out, K in, R ranks of all adapters side by side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca_kernels.frozen_weight import FrozenWeight
from minorca_kernels.low_rank_matmul import low_rank_matmul
from minorca_kernels.operator import uses_triton

# Up to so many ranks in all, a CPU multiplies zeros in less time than it takes to start more products.
MAX_JOINED_RANKS = 64


class Factor(NamedTuple):
    """W, or its transpose in backward, as the second factor of a product."""

    storage: type[FrozenWeight]
    tensors: list[Tensor]
    transposed: bool
    rows: int

    def product(self, x: Tensor) -> Tensor:
        product = self.storage.transposed_product if self.transposed else self.storage.product
        return product(x, self.tensors)

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the product to y in place."""
        add = self.storage.add_transposed_product if self.transposed else self.storage.add_product
        return add(y, x, self.tensors)

    @property
    def matrix(self) -> Tensor:
        """The factor of a kind that is stored as a matrix."""
        return self.tensors[0].t() if self.transposed else self.tensors[0]


def whole_rows(t: Tensor) -> Tensor:
    """A slice of columns as an operand of a matrix product, whose rows must not be read past their end.

    On CPUs with AMX, oneDNN reads bf16 rows in blocks of 32 elements and multiplies what lies behind a shorter row by
    zero, which gives NaN where that is NaN or infinite (oneDNN#5717).
    """
    return t.contiguous() if t.device.type == "cpu" and t.shape[-1] % 32 else t


def ranks_of(b: list[Tensor]) -> list[int]:
    return [b_i.shape[1] for b_i in b]


def own_columns(columns: Tensor, b: list[Tensor]) -> list[Tensor]:
    """Each adapter's columns of a tensor [M, R]."""
    return [whole_rows(part) for part in columns.split(ranks_of(b), dim=1)]


def _added(x: Tensor, weight: Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """For benchmarks, since it rounds twice: in bf16 an update below half a unit in the last place of an output that is
    rounded already is lost. It also reads and writes the output once more.
    """
    y = weight.product(x)
    for start, s_i, b_i in zip(starts, own_columns(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), alpha=scale)
    return y


def _accumulated(x: Tensor, weight: Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Writes the update first, and lets the large product add to it where it is about to write."""
    if joining_pays(b):
        b, starts = [joined(b, starts, weight.rows)], [0]
    covered = sum(map(len, b)) == weight.rows
    y = x.new_empty(len(x), weight.rows) if covered else x.new_zeros(len(x), weight.rows)
    for start, s_i, b_i in zip(starts, own_columns(s, b), b):
        y[:, start : start + len(b_i)].addmm_(s_i, b_i.t(), beta=0, alpha=scale)
    return weight.add_product(y, x)


def _augmented(x: Tensor, weight: Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """[x | s] [W | scale b]^T, one product a little deeper: x and W have scratch columns after each row, in those of W
    lies the update.

    The product takes rows with all of their scratch columns, the unused ones zero: it reads nothing that is not
    written.
    """
    scratch_columns(x, weight.matrix)[:, : s.shape[1]] = s
    return F.linear(_whole(x, weight.matrix), _whole(weight.matrix, weight.matrix))


def _fused(x: Tensor, weight: Factor, s: Tensor, b: list[Tensor], starts: list[int], scale: float) -> Tensor:
    """Triton's product, whose last step in depth is the update."""
    update = weight.matrix.new_zeros(weight.rows, s.shape[1])
    write_update(b, starts, scale, update)
    return low_rank_matmul(x, weight.matrix, s, update)


def joining_pays(b: list[Tensor]) -> bool:
    """Whether a product with `joined` takes less time than one with each B."""
    return len(b) > 1 and not uses_triton(b[0]) and sum(ranks_of(b)) <= MAX_JOINED_RANKS


def joined(b: list[Tensor], starts: list[int], rows: int) -> Tensor:
    """One B [N, R] for all adapters: each B in its own rows and columns, and zeros."""
    joined_NR = b[0].new_zeros(rows, sum(ranks_of(b)))
    write_update(b, starts, 1.0, joined_NR)
    return joined_NR


def write_update(b: list[Tensor], starts: list[int], scale: float, out: Tensor) -> None:
    """Writes every scale * B into its own rows and columns of out [N, R or more], whose other elements are zero."""
    column = 0
    for start, b_i in zip(starts, b):
        torch.mul(b_i, scale, out=out[start : start + len(b_i), column : column + b_i.shape[1]])
        column += b_i.shape[1]


STRATEGIES = {"added": _added, "accumulated": _accumulated, "augmented": _augmented, "fused": _fused}
# what an H100 multiplies while it copies a byte: 700 TFLOP/s and 3 TB/s, both assumed
FLOPS_PER_BYTE = 233


def padding_pays(out_features: int, in_features: int, ranks: int, in_place: bool) -> bool:
    """Whether the augmented strategy is faster on a GPU than the accumulated one, by its bytes in bf16.

    It deepens the product by the ranks of all adapters, and x must be copied next to its products, unless x is written
    there in the first place (`in_place`); the other one writes and reads an update of the output's size.
    """
    deepened = 2 * out_features * ranks / FLOPS_PER_BYTE
    return deepened + (0 if in_place else 4 * in_features) < 4 * out_features


def scratch_columns(x: Tensor, w: Tensor) -> Tensor:
    """The columns after each row of x, as many as W has after its own."""
    return _whole(x, w)[:, w.shape[1] :]


def _whole(x: Tensor, w: Tensor) -> Tensor:
    """x or W with its scratch columns."""
    # .data: no element of x or W itself is written, so what autograd has saved of it stays valid
    return x.data.as_strided((len(x), w.stride(0)), (w.stride(0), 1))


def has_padding(x: Tensor, stride: int) -> bool:
    """Whether x or W still has its scratch columns: a copy made on the way here, by a compiler or a check, has none."""
    end = (x.storage_offset() + len(x) * stride) * x.element_size()
    return x.stride() == (stride, 1) and end <= x.untyped_storage().nbytes()
