"""A weight in NF4 as bitsandbytes' product for a CPU reads it, for inference alone. Axes: T tokens, N out, K in."""

import functools
import logging
import sys
from types import ModuleType

import torch
from torch import Tensor

from minorca_kernels.frozen_weight import FrozenWeight
from minorca_kernels.nf4 import BLOCK, CODE_BOOK
from minorca_kernels.nf4_weight import NF4Weight

# bitsandbytes interleaves so many rows.
ROWS_TOGETHER = 32


@functools.cache
def _bitsandbytes() -> ModuleType | None:
    """bitsandbytes.functional, where it is installed and has a product for this CPU: one with AVX-512's bf16."""
    # With Hugging Face's `kernels` bitsandbytes would download another product; without, it warns that it cannot.
    logger = logging.getLogger("bitsandbytes")
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.CRITICAL)
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    try:
        from bitsandbytes import functional
    # not installed, or broken: weights are dequantized, as `minorca doctor` says
    except Exception:
        return None
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    has_product = torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemv_4bit", "CPU")
    return functional if has_product and hasattr(functional, "_convert_weight_packed_for_cpu") else None


class PrepackedNF4Weight(FrozenWeight):
    """W in 4 bits, rearranged once for the product with rows in bf16.

    The product reads 4.25 bits of a weight where `PrepackedWeight` reads 16, and makes bf16 of them in registers. W
    itself is not rounded, but the absmax of its blocks is, to bf16: a product is as close to the exact one as that
    with W dequantized to bf16. It is what transformers computes of a model in NF4 on a CPU.

    Raises:
        ValueError: `supports` says no.
    """

    kind = "prepacked_nf4"

    def __init__(self, weight: NF4Weight):
        super().__init__(weight.out_features, weight.in_features)
        functional = _bitsandbytes()
        if functional is None or not self.supports(weight, torch.bfloat16):
            raise ValueError("bitsandbytes has no product for this weight on this machine")
        parts = [weight.quantized_part(part) for part in range(len(weight.parts))]
        shape = torch.Size((weight.out_features, weight.in_features))
        state = functional.QuantState(
            absmax=torch.cat([part.scales() for part in parts]),
            shape=shape,
            code=torch.tensor(CODE_BOOK),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        codes, state = functional._convert_weight_packed_for_cpu(torch.cat([part.codes for part in parts]), state)
        self.packed = [codes, state.absmax, state.code]

    def tensors(self) -> list[Tensor]:
        return self.packed

    @staticmethod
    def product(x_TK: Tensor, tensors: list[Tensor]) -> Tensor:
        codes, absmax, code_book = tensors
        shape = (len(codes), x_TK.shape[1])
        return torch.ops.bitsandbytes.gemv_4bit.default(x_TK, codes, shape, absmax, code_book, BLOCK)

    def linear(self, x_TK: Tensor) -> Tensor:
        return self.product(x_TK, self.packed)

    @staticmethod
    def supports(weight: NF4Weight, dtype: torch.dtype) -> bool:
        """Whether this machine has the product with rows of that dtype."""
        fits = dtype == torch.bfloat16 and not weight.codes.is_cuda and weight.out_features % ROWS_TOGETHER == 0
        return fits and _bitsandbytes() is not None
