"""The matrix product of two tiles, summed in fp32 (fp64 for fp64); of fp32 tiles without rounding them to TF32."""

import triton
import triton.language as tl

from minorca_kernels.operator import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, wide: tl.constexpr):
    if _INTERPRETED:  # whose bf16 product is wrong
        a, b = a.to(wide), b.to(wide)
    return tl.dot(a, b, input_precision="ieee", out_dtype=wide)


@triton.jit
def add_dot(total, a, b):
    if _INTERPRETED:
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
