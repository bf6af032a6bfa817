"""Dropout whose mask is a function of (seed, row, column) and is never stored, in the three products of an adapter.

The mask is a counter-based hash in 32-bit integers, so it is the same in forward and backward, in PyTorch and Triton,
on every device. Each row has two keys, hashed from the seed and its number; an element hashes its column with both. The
mixing function is lowbias32 in its improved form (https://github.com/skeeto/hash-prospector).

The factor 1 / (1 - p) of inverted dropout is applied to sums in fp32, not to the elements. Axes: T tokens, K columns of
the input, R rank.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.dot import add_dot
from minorca_kernels.operator import accumulate_dtype, as_rows, multiprocessor_count

_FIRST = tl.constexpr(0x21F0AAAD)
_SECOND = tl.constexpr(0xD35A2D97)
_BITS = 0xFFFFFFFF


def _mix(x, key=0):
    """The hash of 32-bit integers in 64 bits (a tensor or an int), with a second key between its rounds."""
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


def dropout_mask(rows: int, columns: int, p: float, seed: int, device: torch.device) -> Tensor:
    """The definition: which elements stay, bool [rows, columns], each with probability 1 - p."""
    first, second = _seed_keys(seed)
    row_key = _mix(torch.arange(rows, device=device) ^ first)[:, None]
    second_key = _mix(row_key ^ second)
    return _mix(torch.arange(columns, device=device) ^ row_key, second_key) >= _threshold(p)


def dropout_definition(x_TK: Tensor, p: float, seed: int) -> Tensor:
    """Inverted dropout: x [T, K] where the mask is true, divided by 1 - p; elsewhere zero."""
    return x_TK * dropout_mask(*x_TK.shape, p, seed, x_TK.device) / (1 - p)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _mix_bits(x, key):
    x = (x ^ (x >> 16)) * _FIRST
    x = x ^ key
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 15)


@triton.jit
def _row_keys(offs_t, first, second):
    """The two keys of each row, as columns."""
    key = _mix_bits(offs_t.to(tl.uint32) ^ first.to(tl.uint32, bitcast=True), tl.zeros([1], tl.uint32))
    return key[:, None], _mix_bits(key ^ second.to(tl.uint32, bitcast=True), tl.zeros([1], tl.uint32))[:, None]


@triton.jit
def _kept(x, row_key, second_key, offs_k, THRESHOLD: tl.constexpr):
    """x, or zero where the mask is false."""
    bits = _mix_bits(offs_k.to(tl.uint32)[None] ^ row_key, second_key)
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
    offs_r = tl.arange(0, BLOCK_R)
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
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_K, BLOCK_R], acc_dtype)
    for start in range(part * tokens_per_program, tl.minimum((part + 1) * tokens_per_program, T), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = (offs_t < T)[:, None]
        row_key, second_key = _row_keys(offs_t, first, second)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k, mask=mask_t & (offs_k < K), other=0.0)
        ds = tl.load(ds_ptr + offs_t[:, None] * stride_dst + offs_r, mask=mask_t & (offs_r < R), other=0.0)
        acc = add_dot(acc, tl.trans(_kept(x, row_key, second_key, offs_k, THRESHOLD)), ds)
    acc *= tl.full([], FACTOR, acc_dtype)
    da_ptrs = da_ptr + (part * R + offs_r) * K + offs_k[:, None]
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
    return [key - (key >> 31 << 32) for key in _seed_keys(seed)]


def _constants(rank: int, p: float, max_block_r: int, **blocks: int) -> dict:
    return {
        "R": rank,
        "THRESHOLD": _threshold(p),
        "FACTOR": 1 / (1 - p),
        "BLOCK_R": min(max(triton.next_power_of_2(rank), 16), max_block_r),
        "num_warps": 4 if rank <= 64 else 8,
        "num_stages": 2,
        **blocks,
    }


def dropped_product(x_TK: Tensor, a: list[Tensor], seeds: list[int], p: float) -> Tensor:
    """S [T, R] in x's dtype: drop(x) A^T of every adapter, side by side. x [T, K], its last stride 1; A [R_i, K]."""
    x_TK = as_rows(x_TK)
    tokens, columns = x_TK.shape
    s_TR = x_TK.new_empty(tokens, sum(map(len, a)))
    for a_i, s_i, seed in zip(a, s_TR.split([len(a_i) for a_i in a], 1), seeds, strict=True):
        constants = _constants(len(a_i), p, 1024, BLOCK_T=64, BLOCK_K=64 if x_TK.element_size() == 2 else 32)
        sizes = (tokens, columns, x_TK.stride(0), s_TR.stride(0))
        _product_kernel[(triton.cdiv(tokens, 64),)](
            x_TK, a_i.contiguous(), s_i, *_signed_keys(seed), *sizes, **constants
        )
    return s_TR


def dropped_gradients(
    x_TK: Tensor, ds_TR: Tensor, a: list[Tensor], seeds: list[int], p: float, dx_TK: Tensor | None
) -> Tensor:
    """dA [R, K] in x's dtype: dS^T drop(x) of every adapter, one below the other, from dS [T, R].

    Where dx [T, K] is given, drop(dS A) of every adapter is added to it in place.
    """
    x_TK, ds_TR = as_rows(x_TK), as_rows(ds_TR)
    tokens, columns = x_TK.shape
    ranks = [len(a_i) for a_i in a]
    block_t = 64 if x_TK.element_size() == 2 else 32
    blocks_k = triton.cdiv(columns, 64)
    parts = max(min(2 * multiprocessor_count(x_TK.device) // blocks_k, triton.cdiv(tokens, block_t)), 1)
    tokens_per_program = triton.cdiv(triton.cdiv(tokens, block_t), parts) * block_t
    da = []
    for a_i, ds_i, seed in zip(a, ds_TR.split(ranks, 1), seeds, strict=True):
        keys = _signed_keys(seed)
        # each program's share of the sum over tokens
        da_parts = x_TK.new_empty(parts, len(a_i), columns, dtype=accumulate_dtype(x_TK.dtype))
        constants = _constants(len(a_i), p, 1024, BLOCK_T=block_t, BLOCK_K=64)
        sizes = (tokens, columns, tokens_per_program, x_TK.stride(0), ds_TR.stride(0))
        _a_gradient_kernel[(blocks_k, parts)](x_TK, ds_i, da_parts, *keys, *sizes, **constants)
        da.append(da_parts.sum(0))
        if dx_TK is not None:
            constants = _constants(len(a_i), p, 64, BLOCK_T=64, BLOCK_K=64)
            grid = (triton.cdiv(tokens, 64), blocks_k)
            sizes = (tokens, columns, dx_TK.stride(0), ds_TR.stride(0))
            _x_gradient_kernel[grid](dx_TK, ds_i, a_i.contiguous(), *keys, *sizes, **constants)
    return torch.cat(da).to(x_TK.dtype)
