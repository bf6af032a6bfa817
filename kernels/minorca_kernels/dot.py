"""The matrix product of two tiles, summed in fp32 (fp64 for fp64); fp32 tiles are not rounded to TF32."""

import triton
import triton.language as tl

from minorca_kernels.operator import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc_dtype: tl.constexpr):
    # the interpreter's bf16 product is wrong
    if _INTERPRETED:
        a = a.to(acc_dtype)
        b = b.to(acc_dtype)
    return tl.dot(a, b, input_precision="ieee", out_dtype=acc_dtype)


@triton.jit
def add_dot(acc, a, b):
    if _INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
