"""How a frozen weight is stored, and the two products that a projection needs of it: x W^T and, in backward, dy W.

A kind of storage is one subclass of `FrozenWeight`. torch's operators take tensors and text, not modules: an operator
gets the name of the kind and the tensors, and calls the kind's static products. Axes: T tokens, N out, K in.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minorca_kernels.operator import can_skip_dispatch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


class FrozenWeight(nn.Module):
    """A weight W [N, K] that is multiplied. `weight.linear(x)` is x W^T, differentiable in x.

    A `DenseWeight` whose parameter requires a gradient is trained: its `linear` is differentiable in W too. Beside
    adapters (lora_linear.py) every kind is frozen.

    A subclass sets `kind` and defines `tensors`, `product` and `transposed_product`; one that is filled while a model
    loads also `local_rows` and `store_rows`.
    """

    kinds: ClassVar[dict[str, type["FrozenWeight"]]] = {}
    kind: ClassVar[str]
    # whether W is made anew for each product, in rows with as many scratch columns as are wanted
    makes_rows: ClassVar[bool] = False

    def __init_subclass__(cls):
        if "kind" in cls.__dict__:
            FrozenWeight.kinds[cls.kind] = cls

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    def tensors(self) -> list[Tensor]:
        """What the products below read."""
        raise NotImplementedError

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        """x W^T [T, N]."""
        raise NotImplementedError

    @staticmethod
    def transposed_product(dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        """dy W [T, K]."""
        raise NotImplementedError

    @classmethod
    def add_product(cls, y_TN: Tensor, x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        """Adds x W^T to y in place, and returns y."""
        return y_TN.add_(cls.product(x_TK, tensors))

    @classmethod
    def add_transposed_product(cls, dx_TK: Tensor, dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        """Adds dy W to dx in place, and returns dx."""
        return dx_TK.add_(cls.transposed_product(dy_TN, tensors))

    @staticmethod
    def scratch_width(tensors: list[Tensor], columns: int) -> int:
        """How many scratch columns `padded_rows` gives, of which so many are needed."""
        raise NotImplementedError

    @staticmethod
    def padded_rows(tensors: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        """W [N, K] as a view of rows with scratch columns after each (see lora_linear.py); dtype: of its product."""
        raise NotImplementedError

    def local_rows(self) -> tuple[int, int]:
        """The rows [start, stop) of W that this rank stores."""
        raise NotImplementedError

    def store_rows(self, start: int, rows: Tensor) -> None:
        """Stores rows of W, counted through the whole W, that are among `local_rows`."""
        raise NotImplementedError

    def linear(self, x_TK: Tensor) -> Tensor:
        """x W^T [T, N], differentiable in x."""
        return _Product.apply(x_TK, self.kind, *self.tensors())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.kind = kind
        return FrozenWeight.kinds[kind].product(x, list(tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        tensors = list(ctx.saved_tensors)
        dx = FrozenWeight.kinds[ctx.kind].transposed_product(gradients[0], tensors)
        return dx, None, *(None for _ in tensors)


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether it is a DTensor, of which this rank stores a part. To import DTensor takes a second: where nobody has
    done so, there is none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor: of one that is not sharded, itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(parameter: Tensor) -> tuple[Tensor, int]:
    """The part of a parameter that this rank stores, of a DTensor maybe no rows, and which row of the whole is its
    first.
    """
    if not is_sharded(parameter):
        return parameter.detach(), 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return local_tensor(parameter).detach(), offset[0]


def fill_rows(parameter: Tensor, read: Callable[[int, int], Tensor]) -> None:
    """Copies rows into the part of a parameter that this rank stores. `read(start, stop)` gives rows of the whole."""
    local, start = local_part(parameter)
    if len(local):
        local.copy_(read(start, start + len(local)))


# Of longer rows in bf16, oneDNN's product with one row is the faster one: of 6,144 it takes 0.74 of the time.
LONGEST_FAST_ROW = 4096


class DenseWeight(FrozenWeight):
    """W as a matrix, whole or sharded by rows; frozen until its parameter requires a gradient."""

    kind = "dense"

    def __init__(self, weight_NK: Tensor):
        super().__init__(*weight_NK.shape)
        self.weight = nn.Parameter(weight_NK, requires_grad=False)

    def tensors(self) -> list[Tensor]:
        return [self.weight]

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return F.linear(x_TK, tensors[0])

    @staticmethod
    def transposed_product(dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        return F.linear(dy_TN, tensors[0].t())

    @classmethod
    def add_product(cls, y_TN: Tensor, x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return y_TN.addmm_(x_TK, tensors[0].t())

    @classmethod
    def add_transposed_product(cls, dx_TK: Tensor, dy_TN: Tensor, tensors: list[Tensor]) -> Tensor:
        return dx_TK.addmm_(dy_TN, tensors[0])

    @staticmethod
    def scratch_width(tensors: list[Tensor], columns: int) -> int:
        return tensors[0].stride(0) - tensors[0].shape[1]

    @staticmethod
    def padded_rows(tensors: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return tensors[0]

    def local_rows(self) -> tuple[int, int]:
        local, start = local_part(self.weight)
        return start, start + len(local)

    def store_rows(self, start: int, rows: Tensor) -> None:
        local, first = local_part(self.weight)
        local[start - first : start - first + len(rows)].copy_(rows)

    def linear(self, x_TK: Tensor) -> Tensor:
        if len(x_TK) == 1 and self.reads_row_fast(self.weight) and can_skip_dispatch(x_TK):
            return _linear_without_onednn(x_TK, self.weight)
        return F.linear(x_TK, self.weight)

    @staticmethod
    def reads_row_fast(weight_NK: Tensor) -> bool:
        """Whether the product with one row needs no other layout."""
        is_short = weight_NK.shape[1] <= LONGEST_FAST_ROW
        return is_short and weight_NK.dtype == torch.bfloat16 and not weight_NK.is_cuda


def _linear_without_onednn(x_1K: Tensor, weight_NK: Tensor) -> Tensor:
    """The product of one row by torch's own kernel; oneDNN's takes 1.2 to 1.4 times as long. Torch takes it only where
    oneDNN is off, which it then is for other threads too: they lose speed, at most.
    """
    onednn = torch.backends.mkldnn
    if not onednn.enabled:
        return F.linear(x_1K, weight_NK)
    onednn.enabled = False
    try:
        return F.linear(x_1K, weight_NK)
    finally:
        onednn.enabled = True


class PaddedWeight(DenseWeight):
    """W with scratch columns after each row, where a low-rank update finds its place beside W (see lora_linear.py)."""

    kind = "padded"

    def __init__(self, weight_NK: Tensor, columns: int):
        """columns: how many there are at least; rows are a multiple of 64 elements apart."""
        n, k = weight_NK.shape
        padded = weight_NK.new_empty(n, k + columns + -(k + columns) % 64)
        super().__init__(padded[:, :k].copy_(weight_NK))

    @property
    def scratch(self) -> Tensor:
        """The columns after each row of W."""
        return self._rows()[:, self.in_features :]

    def _rows(self) -> Tensor:
        # .data: no element of W itself is written there, so what autograd has saved of it stays valid
        stride = self.weight.stride(0)
        return self.weight.data.as_strided((self.out_features, stride), (stride, 1))

    def _apply(self, fn, recurse=True):
        # another device or dtype, for whole rows: the weight alone would lose its scratch columns
        self.weight = nn.Parameter(fn(self._rows())[:, : self.in_features], requires_grad=False)
        return self


class PrepackedWeight(FrozenWeight):
    """W laid out once as the CPU's matrix products read it, for inference alone: it can be multiplied by, and nothing
    else.

    oneDNN multiplies a few rows by a weight in blocks of its own. Given a plain weight, torch has the blocks made again
    for every product, or takes another library's slower one. `python -m benchmarks.decode` times both.
    """

    kind = "prepacked"
    # The number of rows of x that the layout is chosen for. One layout serves all numbers, and this one served them
    # best.
    ROWS = 8
    # Of so many elements and fewer, torch's own kernel for one row in bf16 is the faster one on every CPU.
    SMALL = 2**21

    def __init__(self, weight_NK: Tensor):
        super().__init__(*weight_NK.shape)
        # an opaque tensor, which no conversion of the module may touch: not a buffer
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), self.ROWS)

    def tensors(self) -> list[Tensor]:
        return [self.packed]

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x_TK, tensors[0], None, "none", [], "")

    def linear(self, x_TK: Tensor) -> Tensor:
        return self.product(x_TK, [self.packed])

    @staticmethod
    def is_faster(weight_NK: Tensor, rows: int) -> bool:
        """Whether this machine gains by it in products with so many rows."""
        if weight_NK.is_cuda or not torch.backends.mkldnn.is_available():
            return False
        # Of one row, this takes 1.2 to 1.4 times as long on Zen 4, which lacks AVX-VNNI, and 0.7 to 1 times on Zen 5.
        gains_with_one = weight_NK.numel() > PrepackedWeight.SMALL and torch.cpu.get_capabilities().get("avx_vnni")
        if rows == 1 and DenseWeight.reads_row_fast(weight_NK) and not gains_with_one:
            return False
        return weight_NK.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
