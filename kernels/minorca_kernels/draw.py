"""A random index for each row of logits, by inverse transform sampling.

Axes: N rows, V indices.
"""

import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import operator, uses_triton

# Below this a temperature is so low that the likeliest index is drawn.
MIN_TEMPERATURE = 1e-4
# Indices that a program reads at once.
BLOCK = 4096


def draw_definition(
    logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws from softmax(logits / temperature).

    Args:
        logits_NV: [N, V], any dtype; computed in fp32.
        temperature_N: fp32 [N].
        seed_N, position_N: int64 [N]; a row's draw is a function of its seed, position and logits.

    Returns:
        The indices, [N] int64, and the random numbers that chose them, [N] fp32 in [0, 1).
    """
    uniform_N = uniform(seed_N, position_N)
    scaled_NV = logits_NV.float() / temperature_N[:, None].clamp(min=MIN_TEMPERATURE)
    return inverse_transform(scaled_NV.softmax(-1), uniform_N), uniform_N


def inverse_transform(p_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first index at which the cumulative sum of p, which need not sum to 1, exceeds its part `uniform`.

    Never an index whose p is 0.
    """
    cumulative_NV = p_NV.cumsum(-1)
    passed_NV = cumulative_NV <= uniform_N[:, None] * cumulative_NV[:, -1:]
    return (~passed_NV & (p_NV > 0)).int().argmax(-1)


def uniform(seed_N: Tensor, position_N: Tensor) -> Tensor:
    """[N] fp32 in [0, 1), a function of its arguments: SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    x_N = seed_N + position_N * -0x61C8864680B583EB
    x_N = (x_N ^ (x_N >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x_N = (x_N ^ (x_N >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return ((x_N ^ (x_N >> 31 & (1 << 33) - 1)) >> 40 & (1 << 24) - 1).float() / (1 << 24)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def _uniform(x):
    """What `uniform` makes of seed + position * its increment."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return ((x ^ (x >> 31 & (1 << 33) - 1)) >> 40 & (1 << 24) - 1).to(tl.float32) / (1 << 24)


@triton.jit
def _load_scaled(row_ptr, column, V, temperature):
    x = tl.load(row_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
    return x / temperature


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    index_ptr,
    uniform_ptr,
    V,
    stride_logits,
    stride_temperature,
    stride_seed,
    MIN_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr + n * stride_seed)
    part = _uniform(seed + tl.load(position_ptr + n) * -0x61C8864680B583EB)
    temperature = tl.maximum(tl.load(temperature_ptr + n * stride_temperature), MIN_TEMPERATURE)
    row_ptr = logits_ptr + n * stride_logits
    column = tl.arange(0, BLOCK)
    largest_B = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        largest_B = tl.maximum(largest_B, _load_scaled(row_ptr, start + column, V, temperature))
    largest = tl.max(largest_B, 0)
    # One sum after the other, so that the order of the sums is that of the search.
    total = 0.0
    for start in range(0, V, BLOCK):
        total += tl.sum(tl.exp(_load_scaled(row_ptr, start + column, V, temperature) - largest), 0)
    threshold = part * total
    before = 0.0
    found_B = tl.full([BLOCK], V, tl.int32)
    # Rounding may leave the sum of all below the threshold.
    last_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        p = tl.exp(_load_scaled(row_ptr, start + column, V, temperature) - largest)
        exceeds = (before + tl.cumsum(p, 0) > threshold) & (p > 0)
        found_B = tl.minimum(found_B, tl.where(exceeds, start + column, V))
        last_B = tl.maximum(last_B, tl.where(p > 0, start + column, 0))
        before += tl.sum(p, 0)
    found = tl.min(found_B, 0)
    tl.store(index_ptr + n, tl.where(found < V, found, tl.max(last_B, 0)).to(tl.int64))
    tl.store(uniform_ptr + n, part)


def _draw_triton(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    index, part = _empty_draw(logits, temperature, seed, position)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    strides = logits.stride(0), temperature.stride(0), seed.stride(0)
    _draw_kernel[(len(logits),)](
        logits, temperature, seed, position.contiguous(), index, part, logits.shape[1], *strides,
        MIN_TEMPERATURE=MIN_TEMPERATURE, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return index, part


def _empty_draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return seed.new_empty(len(logits)), temperature.new_empty(len(logits))


_draw = operator(
    "draw(Tensor logits, Tensor temperature, Tensor seed, Tensor position) -> (Tensor, Tensor)",
    cuda=_draw_triton,
    cpu=draw_definition,
    fake=_empty_draw,
)


def draw(logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_definition`, in one kernel."""
    function = _draw if uses_triton(logits_NV) else draw_definition
    return function(logits_NV, temperature_N, seed_N, position_N)
