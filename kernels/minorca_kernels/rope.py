"""Rotary position embedding of the queries and keys in a fused qkv buffer, in fp32.

The layout is half-split, as in Hugging Face's weights: number i of a head is rotated with number i + D/2.

Source: Su et al. 2021 (arXiv:2104.09864). Positions are given, so each of several packed documents may start at 0.
Axes: T tokens, H query heads, K key heads, D head size, P = D/2 rotated pairs of a head; N = (H + 2 K) D.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import as_rows, can_skip_dispatch, operator


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [T] (integers) -> cos and sin, each [T, D/2] fp32, of position times theta^(-2i/D)."""
    angles_TP = positions_T.float()[:, None] * rope_frequencies(head_dim, theta, positions_T.device)
    return angles_TP.cos(), angles_TP.sin()


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D), [D/2] fp32."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).float() / head_dim
    return 1.0 / theta**exponents


def _rotate(x_THD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    # in the tables' precision (fp32), cast once: bf16 angles cannot tell positions past a few hundred apart
    first_THP, second_THP = x_THD.chunk(2, dim=-1)
    cos_T1P = cos_TP[:, None]
    sin_T1P = sin_TP[:, None]
    rotated = (first_THP * cos_T1P - second_THP * sin_T1P, second_THP * cos_T1P + first_THP * sin_T1P)
    return torch.cat(rotated, dim=-1).to(x_THD.dtype)


def _split(qkv_TN: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv_TN.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)


def rope_definition(
    qkv_TN: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (H + 2 K) D] -> q [T, H, D] and k [T, K, D], each pair (i, i + D/2) of a head rotated, and v unchanged.

    The tables [T, D/2] come from `rope_tables`.
    """
    q, k, v = _split(qkv_TN, heads, kv_heads)
    return _rotate(q, cos_TP, sin_TP), _rotate(k, cos_TP, sin_TP), v


# ------------------------------------------------------------------------------------------------------------ Triton
# A program rotates all heads of one token, and so loads its angles once.


@triton.jit
def _rotate_heads(
    source_ptr,
    target_ptr,
    cos,
    sin,
    pair,
    pair_mask,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    offset = head * D + pair
    mask = (head < HEADS) & pair_mask
    dtype = target_ptr.dtype.element_ty
    first = tl.load(source_ptr + offset, mask=mask, other=0.0).to(cos.dtype)
    second = tl.load(source_ptr + D // 2 + offset, mask=mask, other=0.0).to(cos.dtype)
    tl.store(target_ptr + offset, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target_ptr + D // 2 + offset, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def _copy_heads(source_ptr, target_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    offset = tl.arange(0, BLOCK_N)
    mask = offset < N
    tl.store(target_ptr + offset, tl.load(source_ptr + offset, mask=mask, other=0.0), mask=mask)


@triton.jit
def _load_tables(cos_ptr, sin_ptr, row, pair, pair_mask, dtype: tl.constexpr, D: tl.constexpr):
    acc_dtype = tl.float64 if dtype == tl.float64 else tl.float32
    cos = tl.load(cos_ptr + row * (D // 2) + pair, mask=pair_mask, other=0.0).to(acc_dtype)
    sin = tl.load(sin_ptr + row * (D // 2) + pair, mask=pair_mask, other=0.0).to(acc_dtype)
    return cos, sin


@triton.jit
def _forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stride_qkv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None]
    pair_mask = pair < D // 2
    cos, sin = _load_tables(cos_ptr, sin_ptr, row, pair, pair_mask, q_ptr.dtype.element_ty, D)
    qkv_ptr += row * stride_qkv
    _rotate_heads(qkv_ptr, q_ptr + row * HEADS * D, cos, sin, pair, pair_mask, HEADS, D, BLOCK_HEADS)
    _rotate_heads(
        qkv_ptr + HEADS * D, k_ptr + row * KV_HEADS * D, cos, sin, pair, pair_mask, KV_HEADS, D, BLOCK_KV_HEADS
    )
    v_ptr += row * KV_HEADS * D
    _copy_heads(qkv_ptr + (HEADS + KV_HEADS) * D, v_ptr, KV_HEADS * D, BLOCK_KV_HEADS * BLOCK_P * 2)


@triton.jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    stride_dq,
    stride_dk,
    stride_dv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None]
    pair_mask = pair < D // 2
    cos, sin = _load_tables(cos_ptr, sin_ptr, row, pair, pair_mask, dqkv_ptr.dtype.element_ty, D)
    dqkv_ptr += row * (HEADS + 2 * KV_HEADS) * D
    _rotate_heads(dq_ptr + row * stride_dq, dqkv_ptr, cos, -sin, pair, pair_mask, HEADS, D, BLOCK_HEADS)
    _rotate_heads(
        dk_ptr + row * stride_dk, dqkv_ptr + HEADS * D, cos, -sin, pair, pair_mask, KV_HEADS, D, BLOCK_KV_HEADS
    )
    dqkv_ptr += (HEADS + KV_HEADS) * D
    _copy_heads(dv_ptr + row * stride_dv, dqkv_ptr, KV_HEADS * D, BLOCK_KV_HEADS * BLOCK_P * 2)


def _constants(heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    block_heads, block_kv_heads, block_pairs = map(triton.next_power_of_2, (heads, kv_heads, head_dim // 2))
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": head_dim,
        "BLOCK_HEADS": block_heads,
        "BLOCK_KV_HEADS": block_kv_heads,
        "BLOCK_P": block_pairs,
        # loads of 16 bytes in bf16, 4 of them a thread at 32 heads of 128
        "num_warps": min(max(block_heads * block_pairs // 512, 1), 8),
    }


def _rope_triton(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _empty_rope(qkv, cos, sin, heads, kv_heads)
    qkv = as_rows(qkv)
    constants = _constants(heads, kv_heads, q.shape[2])
    _forward_kernel[(len(qkv),)](qkv, cos.contiguous(), sin.contiguous(), q, k, v, qkv.stride(0), **constants)
    return q, k, v


def _rope_backward_triton(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    constants = _constants(dq.shape[1], dk.shape[1], dq.shape[2])
    dqkv = _empty_rope_backward(dq, dk, dv, cos, sin)
    dq, dk, dv = (as_rows(gradient.flatten(1)) for gradient in (dq, dk, dv))
    strides = dq.stride(0), dk.stride(0), dv.stride(0)
    _backward_kernel[(len(dq),)](dq, dk, dv, cos.contiguous(), sin.contiguous(), dqkv, *strides, **constants)
    return dqkv


# ----------------------------------------------------------------------------------------------------- plain PyTorch


def _rotate_torch(x_THD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """x, rotated, in the tables' precision at least."""
    x_TH2P = x_THD.to(torch.promote_types(x_THD.dtype, cos_TP.dtype)).unflatten(-1, (2, -1))
    sin_T1P = sin_TP[:, None]
    rotated_TH2P = x_TH2P * cos_TP[:, None, None]
    rotated_TH2P[:, :, 0].addcmul_(x_TH2P[:, :, 1], sin_T1P, value=-1)
    rotated_TH2P[:, :, 1].addcmul_(x_TH2P[:, :, 0], sin_T1P)
    return rotated_TH2P.flatten(-2)


def _rope_torch(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _empty_rope(qkv, cos, sin, heads, kv_heads)
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    rotated = _rotate_torch(qkv[:, : heads + kv_heads], cos, sin)
    return q.copy_(rotated[:, :heads]), k.copy_(rotated[:, heads:]), v.copy_(qkv[:, heads + kv_heads :])


def _rope_backward_torch(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, kv_heads = dq.shape[1], dk.shape[1]
    dqkv = _empty_rope_backward(dq, dk, dv, cos, sin)
    dqkv_by_head = dqkv.view(len(dq), heads + 2 * kv_heads, -1)
    dqkv_by_head[:, : heads + kv_heads] = _rotate_torch(torch.cat([dq, dk], dim=1), cos, -sin)
    dqkv_by_head[:, heads + kv_heads :] = dv
    return dqkv


# ------------------------------------------------------------------------------------------- operators and autograd


def _empty_rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    return tuple(qkv.new_empty(qkv.shape[0], count, head_dim) for count in (heads, kv_heads, kv_heads))


def _empty_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])


_rope = operator(
    "rope(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    cuda=_rope_triton,
    cpu=_rope_torch,
    fake=_empty_rope,
)
_rope_backward = operator(
    "rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    cuda=_rope_backward_triton,
    cpu=_rope_backward_torch,
    fake=_empty_rope_backward,
)


class _Rope(torch.autograd.Function):
    """Keeps the tables alone: a rotation's derivative is the inverse rotation.

    The values are copied: as a view, the v that attention saves would keep the whole buffer beside the new q and k.
    Rotation in place would save the copy, a tenth of the bytes, but selective checkpointing saves the buffer and
    rotates it again in backward. Backward gathers the three gradients into one buffer in the same pass.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        return _rope(qkv, cos, sin, heads, kv_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        return _rope_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


def rope(qkv_TN: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_definition`, fused. The results are new tensors."""
    function = _rope_torch if can_skip_dispatch(qkv_TN) else _Rope.apply
    return function(qkv_TN, cos_TP, sin_TP, heads, kv_heads)
