"""Dropout whose mask is a function of (seed, row, column) and is never stored, in the three products of an adapter.

The mask is a counter-based hash in 32-bit integers, so it is the same in forward and backward, in PyTorch and Triton,
on every device. Each row has two keys, hashed from the seed and its number; an element hashes its column with both. The
mixing function is lowbias32 in its improved form (https://github.com/skeeto/hash-prospector).

The factor 1 / (1 - p) of inverted dropout is applied to sums in fp32, not to the elements. Axes: T tokens, K columns of
the input, R rank.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot
from minorca_kernels.operator import INTERPRETED, accumulate_dtype, as_rows, multiprocessor_count

_FIRST = tl.constexpr(0x21F0AAAD)
_SECOND = tl.constexpr(0xD35A2D97)
_BITS = 0xFFFFFFFF
# elements of a mask that a CPU computes at once, in its cache
BLOCK = 1 << 17


def _mix(x, key=0):
    """The hash of 32-bit integers held in 64 bits (a tensor or an int), with a second key between its rounds."""
    x = (x ^ (x >> 16)) * _FIRST.value & _BITS
    x = x ^ key
    x = (x ^ (x >> 15)) * _SECOND.value & _BITS
    return x ^ (x >> 15)


@functools.lru_cache(1024)
def _seed_keys(seed: int) -> tuple[int, int]:
    """Two 32-bit keys of a 64-bit seed."""
    low = _mix(seed & _BITS, _mix(seed >> 32 & _BITS))
    return low, _mix(low ^ 0x9E3779B9, seed >> 32 & _BITS)


def _threshold(p: float) -> int:
    """Elements with a smaller hash are dropped."""
    return round(p * 2**32)


def _signed(x):
    """32-bit integers (a tensor or an int) as two's complement."""
    return x - (x >> 31 << 32)


def dropout_mask(rows: int, columns: int, p: float, seed: int, device: torch.device) -> Tensor:
    """The definition: which elements stay, bool [rows, columns], each with probability 1 - p."""
    first, second = _seed_keys(seed)
    row_key = _mix(torch.arange(rows, device=device) ^ first)[:, None]
    keys = row_key ^ row_key >> 16, _mix(row_key ^ second)
    column = torch.arange(columns, dtype=torch.int32, device=device)
    # what `_mix` does first, it may do to both sides of an exclusive or
    column ^= column >> 16
    # with their highest bit changed, signed integers have the order of unsigned ones
    threshold = _signed(_threshold(p) ^ 1 << 31)
    keep = []
    for row_key, second_key in zip(*(_signed(key).int().split(max(BLOCK // columns, 1)) for key in keys)):
        # `_mix` in int32, whose products wrap around and whose shifts copy the sign: on a CPU twice as fast as
        # torch.rand
        bits = column ^ row_key
        bits *= _FIRST.value
        bits ^= second_key
        bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
        bits *= _signed(_SECOND.value)
        bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
        bits ^= -(1 << 31)
        keep.append(bits >= threshold)
    return torch.cat(keep)


def dropout_definition(x_TK: Tensor, p: float, seed: int) -> Tensor:
    """Inverted dropout: x [T, K] where the mask is true, divided by 1 - p; elsewhere zero."""
    if not p:
        return x_TK
    return x_TK * dropout_mask(*x_TK.shape, p, seed, x_TK.device) / (1 - p)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _fold(x):
    """The first step of `_mix`."""
    return x ^ (x >> 16)


@triton.jit
def _mix_folded(x, key):
    """`_mix` after `_fold`."""
    x = x * _FIRST ^ key
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 15)


@triton.jit
def _row_keys(offs_t, first, second):
    """The two keys of each row, as columns, the first one folded."""
    zero = tl.zeros([1], tl.uint32)
    key = _mix_folded(_fold(offs_t.to(tl.uint32) ^ first.to(tl.uint32, bitcast=True)), zero)
    second_key = _mix_folded(_fold(key ^ second.to(tl.uint32, bitcast=True)), zero)
    return _fold(key)[:, None], second_key[:, None]


@triton.jit
def _kept(x, row_key, second_key, offs_k, THRESHOLD: tl.constexpr):
    """x, or zero where the mask is false."""
    bits = _mix_folded(_fold(offs_k.to(tl.uint32))[None] ^ row_key, second_key)
    return tl.where(bits >= tl.full([], THRESHOLD, tl.uint32), x, tl.zeros([], x.dtype))


@triton.jit(do_not_specialize=["first", "second"])
def _product_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    first,
    second,
    T,
    K,
    stride_xt,
    stride_st,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_key, second_key = _row_keys(offs_t, first, second)
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_T, BLOCK_R], acc_dtype)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_tk = (offs_t < T)[:, None] & (offs_k < K)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k, mask=mask_tk, other=0.0)
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k, mask=(offs_r < R)[:, None] & (offs_k < K), other=0.0)
        acc = add_dot(acc, _kept(x, row_key, second_key, offs_k, THRESHOLD), tl.trans(a))
    acc *= tl.full([], FACTOR, acc_dtype)
    tl.store(s_ptr + offs_t[:, None] * stride_st + offs_r, acc, mask=(offs_t < T)[:, None] & (offs_r < R))


@triton.jit(do_not_specialize=["first", "second"])
def _a_gradient_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    first,
    second,
    T,
    K,
    tokens_per_program,
    stride_xt,
    stride_dst,
    stride_part,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_K, BLOCK_R], acc_dtype)
    for start in range(part * tokens_per_program, tl.minimum((part + 1) * tokens_per_program, T), BLOCK_T):
        offs_t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask_t = (offs_t < T)[:, None]
        row_key, second_key = _row_keys(offs_t, first, second)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k, mask=mask_t & (offs_k < K), other=0.0)
        ds = tl.load(ds_ptr + offs_t[:, None] * stride_dst + offs_r, mask=mask_t & (offs_r < R), other=0.0)
        acc = add_dot(acc, tl.trans(_kept(x, row_key, second_key, offs_k, THRESHOLD)), ds)
    acc *= tl.full([], FACTOR, acc_dtype)
    da_ptrs = da_ptr + part * stride_part + offs_r * K + offs_k[:, None]
    tl.store(da_ptrs, acc, mask=(offs_k < K)[:, None] & (offs_r < R))


@triton.jit(do_not_specialize=["first", "second"])
def _x_gradient_kernel(
    dx_ptr,
    ds_ptr,
    a_ptr,
    first,
    second,
    T,
    K,
    stride_dxt,
    stride_dst,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_t = (offs_t < T)[:, None]
    mask_tk = mask_t & (offs_k < K)
    acc_dtype: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_T, BLOCK_K], acc_dtype)
    for start in range(0, R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        ds = tl.load(ds_ptr + offs_t[:, None] * stride_dst + offs_r, mask=mask_t & (offs_r < R), other=0.0)
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k, mask=(offs_r < R)[:, None] & (offs_k < K), other=0.0)
        acc = add_dot(acc, ds, a)
    row_key, second_key = _row_keys(offs_t, first, second)
    dx_ptrs = dx_ptr + offs_t[:, None] * stride_dxt + offs_k
    dx = tl.load(dx_ptrs, mask=mask_tk, other=0.0).to(acc_dtype)
    update = _kept(acc * tl.full([], FACTOR, acc_dtype), row_key, second_key, offs_k, THRESHOLD)
    tl.store(dx_ptrs, dx + update, mask=mask_tk)


def _signed_keys(seed: int) -> list[int]:
    """A seed's keys as 32-bit arguments of a kernel, which has one signature for all of them."""
    return [_signed(key) for key in _seed_keys(seed)]


def _constants(x: Tensor, rank: int, p: float, max_block_r: int, **blocks: int) -> dict:
    half = x.element_size() == 2
    # products in fp32 take more registers
    max_block_r = max_block_r if half else 16
    return {
        "R": rank,
        "THRESHOLD": _threshold(p),
        "FACTOR": 1 / (1 - p),
        "BLOCK_R": min(max(triton.next_power_of_2(rank), 16), max_block_r),
        "num_warps": 8 if half and rank > 64 else 4,
        "num_stages": 2,
        **blocks,
    }


# ------------------------------------------------------------------------------------- products of several adapters


def _without_triton(x: Tensor) -> bool:
    # meta tensors are for compiling the kernels
    return x.device.type == "cpu" and not INTERPRETED


def _kept_torch(x_TK: Tensor, p: float, seed: int) -> Tensor:
    return torch.where(dropout_mask(*x_TK.shape, p, seed, x_TK.device), x_TK, 0.0)


def dropped_product(x_TK: Tensor, a: list[Tensor], seeds: list[int], p: float) -> Tensor:
    """S [T, R] in x's dtype: drop(x) A^T of every adapter, side by side. x [T, K], A [R_i, K]."""
    if _without_triton(x_TK):
        parts = [F.linear(_kept_torch(x_TK, p, seed), a_i) for a_i, seed in zip(a, seeds, strict=True)]
        return torch.cat(parts, 1).div_(1 - p)
    x_TK = as_rows(x_TK)
    tokens, columns = x_TK.shape
    s_TR = x_TK.new_empty(tokens, sum(map(len, a)))
    for a_i, s_i, seed in zip(a, s_TR.split([len(a_i) for a_i in a], 1), seeds, strict=True):
        constants = _constants(x_TK, len(a_i), p, 256, BLOCK_T=64, BLOCK_K=64 if x_TK.element_size() == 2 else 32)
        grid = (triton.cdiv(tokens, 64), triton.cdiv(len(a_i), constants["BLOCK_R"]))
        sizes = (tokens, columns, x_TK.stride(0), s_TR.stride(0))
        _product_kernel[grid](x_TK, a_i.contiguous(), s_i, *_signed_keys(seed), *sizes, **constants)
    return s_TR


def a_gradient(x_TK: Tensor, ds: list[Tensor], seeds: list[int], p: float) -> Tensor:
    """dA [R, K] in the dtype in which it is summed: dS^T drop(x) of every adapter, one below the other.

    x [T, K], dS [T, R_i].
    """
    dtype = accumulate_dtype(x_TK.dtype)
    if _without_triton(x_TK):
        parts = [ds_i.t() @ _kept_torch(x_TK, p, seed) for ds_i, seed in zip(ds, seeds, strict=True)]
        return torch.cat(parts).to(dtype).div_(1 - p)
    x_TK = as_rows(x_TK)
    tokens, columns = x_TK.shape
    ranks = [ds_i.shape[1] for ds_i in ds]
    block_t = 64 if x_TK.element_size() == 2 else 32
    blocks_k = triton.cdiv(columns, 64)
    shares = max(min(2 * multiprocessor_count(x_TK.device) // blocks_k, triton.cdiv(tokens, block_t)), 1)
    tokens_per_program = triton.cdiv(triton.cdiv(tokens, block_t), shares) * block_t
    # each program's share of the sum over tokens
    da = x_TK.new_empty(shares, sum(ranks), columns, dtype=dtype)
    for ds_i, da_i, seed in zip(ds, da.split(ranks, 1), seeds, strict=True):
        constants = _constants(x_TK, ds_i.shape[1], p, 256, BLOCK_T=block_t, BLOCK_K=64)
        grid = (blocks_k, shares, triton.cdiv(ds_i.shape[1], constants["BLOCK_R"]))
        sizes = (tokens, columns, tokens_per_program, x_TK.stride(0), ds_i.stride(0), da.stride(0))
        _a_gradient_kernel[grid](x_TK, ds_i, da_i, *_signed_keys(seed), *sizes, **constants)
    return da.sum(0)


def add_x_gradient(dx_TK: Tensor, ds: list[Tensor], a: list[Tensor], seeds: list[int], p: float) -> None:
    """Adds drop(dS A) of every adapter to dx [T, K] in place. dS [T, R_i], A [R_i, K]."""
    tokens, columns = dx_TK.shape
    grid = (triton.cdiv(tokens, 64), triton.cdiv(columns, 64))
    for ds_i, a_i, seed in zip(ds, a, seeds, strict=True):
        if _without_triton(dx_TK):
            dx_TK.add_(_kept_torch(ds_i @ a_i, p, seed), alpha=1 / (1 - p))
            continue
        constants = _constants(dx_TK, len(a_i), p, 64, BLOCK_T=64, BLOCK_K=64)
        sizes = (tokens, columns, dx_TK.stride(0), ds_i.stride(0))
        _x_gradient_kernel[grid](dx_TK, ds_i, a_i.contiguous(), *_signed_keys(seed), *sizes, **constants)
