"""Rotary position embedding on the queries and keys of a fused qkv buffer, half-split layout (the one of Hugging Face's
weights), in fp32.

Source: Su et al. 2021 (arXiv:2104.09864). Positions are given, so packed documents may each start again at 0.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import can_skip_dispatch, operator, rows


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [T] (integers) -> cos and sin, each [T, D/2] fp32, of position times theta^(-2i/D)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.int64).float() / head_dim
    angles = positions_T.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    # in the tables' precision (fp32), cast once: bf16 angles lose positions past a few hundred
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)


def _split(qkv_TN: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv_TN.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)


def rope_definition(
    qkv_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D] and k [T, Hkv, D], each pair (i, i + D/2) of a head rotated, and v as it is.

    Tables [T, D/2] from `rope_tables`.
    """
    q, k, v = _split(qkv_TN, heads, kv_heads)
    return _rotate(q, cos_TD, sin_TD), _rotate(k, cos_TD, sin_TD), v


# ------------------------------------------------------------------------------------------------------------ Triton
# a program rotates all heads of one token: its angles are read once


@triton.jit
def _turn(source, target, cos, sin, column, inside, HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    head = tl.arange(0, PADDED)[:, None]
    place, here = head * D + column, (head < HEADS) & inside
    dtype = target.dtype.element_ty
    first = tl.load(source + place, mask=here, other=0.0).to(cos.dtype)
    second = tl.load(source + D // 2 + place, mask=here, other=0.0).to(cos.dtype)
    tl.store(target + place, (first * cos - second * sin).to(dtype), mask=here)
    tl.store(target + D // 2 + place, (second * cos + first * sin).to(dtype), mask=here)


@triton.jit
def _angles(cos, sin, row, column, inside, dtype: tl.constexpr, D: tl.constexpr):
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    c = tl.load(cos + row * (D // 2) + column, mask=inside, other=0.0).to(wide)
    s = tl.load(sin + row * (D // 2) + column, mask=inside, other=0.0).to(wide)
    return c, s


@triton.jit
def _forward(
    qkv,
    cos,
    sin,
    q,
    k,
    qkv_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None]
    inside = column < D // 2
    c, s = _angles(cos, sin, row, column, inside, q.dtype.element_ty, D)
    qkv += row * qkv_row
    _turn(qkv, q + row * HEADS * D, c, s, column, inside, HEADS, D, PADDED)
    _turn(qkv + HEADS * D, k + row * KV_HEADS * D, c, s, column, inside, KV_HEADS, D, KV_PADDED)


@triton.jit
def _backward(
    dq,
    dk,
    dv,
    cos,
    sin,
    dqkv,
    dq_row,
    dk_row,
    dv_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None]
    inside = column < D // 2
    c, s = _angles(cos, sin, row, column, inside, dqkv.dtype.element_ty, D)
    dqkv += row * (HEADS + 2 * KV_HEADS) * D
    _turn(dq + row * dq_row, dqkv, c, -s, column, inside, HEADS, D, PADDED)
    _turn(dk + row * dk_row, dqkv + HEADS * D, c, -s, column, inside, KV_HEADS, D, KV_PADDED)
    place = tl.arange(0, KV_PADDED * HALF * 2)
    here = place < KV_HEADS * D
    tl.store(dqkv + (HEADS + KV_HEADS) * D + place, tl.load(dv + row * dv_row + place, mask=here, other=0.0), mask=here)


def _sizes(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    padded, kv_padded, half = map(triton.next_power_of_2, (heads, kv_heads, head_dim // 2))
    warps = min(max(padded * half // 512, 1), 8)  # 16 bytes a load in bf16, 4 of them a thread at 32 heads of 128
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": head_dim,
        "PADDED": padded,
        "KV_PADDED": kv_padded,
        "HALF": half,
        "num_warps": warps,
    }


def _rope_triton(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    q, k = _like_rope(qkv, cos, sin, heads, kv_heads)
    qkv = rows(qkv)
    _forward[(len(qkv),)](
        qkv, cos.contiguous(), sin.contiguous(), q, k, qkv.stride(0), **_sizes(heads, kv_heads, q.shape[2])
    )
    return q, k


def _rope_backward_triton(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sizes = _sizes(dq.shape[1], dk.shape[1], dq.shape[2])
    dqkv = _like_rope_backward(dq, dk, dv, cos, sin)
    dq, dk, dv = (rows(d.flatten(1)) for d in (dq, dk, dv))
    _backward[(len(dq),)](
        dq, dk, dv, cos.contiguous(), sin.contiguous(), dqkv, dq.stride(0), dk.stride(0), dv.stride(0), **sizes
    )
    return dqkv


# ----------------------------------------------------------------------------------------------------- plain PyTorch


@functools.lru_cache(maxsize=1)
def _whole_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables for both halves of a head, [T, 1, D]: made once for all the layers that share them."""
    return torch.cat((cos, cos), dim=1)[:, None], torch.cat((-sin, sin), dim=1)[:, None]


def _rope_torch(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """q and k are views of one new tensor."""
    cos_T1D, sin_T1D = _whole_heads(cos, sin)
    turned = qkv.view(len(qkv), heads + 2 * kv_heads, -1)[:, : heads + kv_heads]  # q and k at once
    turned = turned.to(torch.promote_types(qkv.dtype, cos.dtype))
    turned = torch.addcmul(turned * cos_T1D, turned.roll(turned.shape[2] // 2, dims=2), sin_T1D).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:]


def _rope_backward_torch(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((_rotate(dq, cos, -sin), _rotate(dk, cos, -sin), dv), dim=1).flatten(1)


# ------------------------------------------------------------------------------------------- operators and autograd


def _like_rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    return qkv.new_empty(qkv.shape[0], heads, head_dim), qkv.new_empty(qkv.shape[0], kv_heads, head_dim)


def _like_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])


_rope = operator(
    "rope(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor)",
    cuda=_rope_triton,
    cpu=lambda *arguments: tuple(t.contiguous() for t in _rope_torch(*arguments)),
    fake=_like_rope,
)
_rope_backward = operator(
    "rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    cuda=_rope_backward_triton,
    cpu=_rope_backward_torch,
    fake=_like_rope_backward,
)


class _Rope(torch.autograd.Function):
    """A rotation's derivative is the inverse rotation, so nothing but the tables is kept; the three gradients are gathered into
    one buffer in the same pass."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        ctx.save_for_backward(cos, sin)
        return *_rope(qkv, cos, sin, heads, kv_heads), _split(qkv, heads, kv_heads)[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        return _rope_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


def rope(qkv_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_definition`; q and k are new, v is a view of the buffer."""
    if can_skip_dispatch(qkv_TN):
        v_TKD = qkv_TN.view(len(qkv_TN), heads + 2 * kv_heads, -1)[:, heads + kv_heads :]
        return *_rope_torch(qkv_TN, cos_TD, sin_TD, heads, kv_heads), v_TKD
    return _Rope.apply(qkv_TN, cos_TD, sin_TD, heads, kv_heads)
