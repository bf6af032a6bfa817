"""A random index for each row of logits, by inverse transform sampling.

The order of the filters is that of transformers: temperature, top-k, top-p, min-p.
Axes: N rows, V indices; 4 is literal.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minorca_kernels.operator import operator, uses_triton

# Below this a temperature is so low that the likeliest index is drawn.
MIN_TEMPERATURE = 1e-4
# Indices that a program reads at once.
BLOCK = 4096
# Elements. Triton loads 128 bits at a time from rows that begin at multiples of 16.
ALIGNMENT = 16


def draw_definition(
    logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor, filters_N4: Tensor | None = None
) -> Tensor:
    """Draws from softmax(logits / temperature), or from its likeliest indices.

    Args:
        logits_NV: [N, V], any dtype; computed in fp32.
        temperature_N: fp32 [N]; 0 takes the likeliest index, the first of equals.
        seed_N, position_N: int64 [N]; a row's draw is a function of its seed, position, logits and settings.
        filters_N4: fp32 [N, 4], each row's top_p, top_k and min_p, and whether they count. None: no row's count.

    Returns:
        The indices, [N] int64.
    """
    logits_NV = logits_NV.float()
    uniform_N = uniform(seed_N, position_N)
    scaled_NV = logits_NV / temperature_N[:, None].clamp(min=MIN_TEMPERATURE)
    index_N = inverse_transform(scaled_NV.softmax(-1), uniform_N)
    if filters_N4 is not None:
        filtered_N = _filtered_definition(scaled_NV, uniform_N, *filters_N4[:, :3].split(1, dim=-1))
        # Chosen row by row: a draw must not depend on what other rows ask for.
        index_N = torch.where(filters_N4[:, 3] > 0, filtered_N, index_N)
    return torch.where(temperature_N > 0, index_N, logits_NV.argmax(-1))


def _filtered_definition(
    scaled_NV: Tensor, uniform_N: Tensor, top_p_N1: Tensor, top_k_N1: Tensor, min_p_N1: Tensor
) -> Tensor:
    sorted_NV, order_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_NV.shape[-1], device=scaled_NV.device)
    p_NV = sorted_NV.masked_fill(rank_V >= top_k_N1, -torch.inf).softmax(-1)
    before_NV = p_NV.cumsum(-1) - p_NV
    p_NV = p_NV.masked_fill((before_NV >= top_p_N1) | (p_NV < min_p_N1 * p_NV[:, :1]), 0)
    return order_NV.gather(-1, inverse_transform(p_NV, uniform_N)[:, None])[:, 0]


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
def load_columns(row_ptr, start, size, other, BLOCK: tl.constexpr):
    """The numbers of a row from `start` on, `other` past its size."""
    column = start + tl.arange(0, BLOCK)
    # A mask that may end anywhere makes all loads narrow ones, so only the last block has one.
    if start + BLOCK <= size:
        x = tl.load(row_ptr + column)
    else:
        x = tl.load(row_ptr + column, mask=column < size, other=other)
    return x


@triton.jit
def _load_scaled(row_ptr, start, size, temperature, BLOCK: tl.constexpr):
    return load_columns(row_ptr, start, size, float("-inf"), BLOCK).to(tl.float32) / temperature


@triton.jit
def _load_p(row_ptr, start, size, temperature, draws, largest, total, BLOCK: tl.constexpr):
    """The numerators of softmax over `total`; in a row that does not draw, all but the likeliest are 0."""
    x = _load_scaled(row_ptr, start, size, temperature, BLOCK)
    return tl.where(draws, tl.exp(x - largest), (x == largest).to(tl.float32)) / total


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    filters_ptr,
    sorted_ptr,
    order_ptr,
    index_ptr,
    V,
    stride_logits,
    stride_sorted,
    stride_temperature,
    stride_seed,
    stride_filters,
    MIN_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + n * stride_temperature)
    draws = temperature > 0
    # Division by 1 keeps unequal logits unequal.
    temperature = tl.where(draws, tl.maximum(temperature, MIN_TEMPERATURE), 1.0)
    row_ptr = logits_ptr + n * stride_logits
    size = V
    filtered = False
    if filters_ptr is not None:
        filters_ptr += n * stride_filters
        filtered = draws & (tl.load(filters_ptr + 3) > 0)
        row_ptr = tl.where(filtered, sorted_ptr + n * stride_sorted, row_ptr)
        size = tl.where(filtered, tl.minimum(tl.load(filters_ptr + 1), V).to(tl.int32), V)
    largest_B = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        largest_B = tl.maximum(largest_B, _load_scaled(row_ptr, start, size, temperature, BLOCK))
    largest = tl.max(largest_B, 0)
    # One sum after the other, so that the order of the sums is that of the search.
    total = 0.0
    for start in range(0, size, BLOCK):
        total += tl.sum(_load_p(row_ptr, start, size, temperature, draws, largest, 1.0, BLOCK), 0)

    column = tl.arange(0, BLOCK)
    # What is kept of a row: the sum of it, and the end of it. p is divided by its sum only where filters need that.
    kept = total
    end = size
    top_p = float("inf")
    min_p = 0.0
    if filters_ptr is not None:
        top_p = tl.where(filtered, tl.load(filters_ptr), top_p)
        min_p = tl.where(filtered, tl.load(filters_ptr + 2) * (1.0 / total), min_p)
        total = tl.where(filtered, total, 1.0)
        kept = tl.where(filtered, 0.0, kept)
        end = tl.where(filtered, 0, end)
        before = 0.0
        for start in range(0, tl.where(filtered, size, 0), BLOCK):
            p = _load_p(row_ptr, start, size, temperature, draws, largest, total, BLOCK)
            cumulative = before + tl.cumsum(p, 0)
            keeps = (cumulative - p < top_p) & (p >= min_p)
            kept = tl.maximum(kept, tl.max(tl.where(keeps, cumulative, 0.0), 0))
            end = tl.maximum(end, tl.max(tl.where(keeps, start + column + 1, 0), 0))
            before += tl.sum(p, 0)
    else:
        total = 1.0

    seed = tl.load(seed_ptr + n * stride_seed)
    part = _uniform(seed + tl.load(position_ptr + n) * -0x61C8864680B583EB)
    threshold = tl.where(draws, part, 0.0) * kept
    before = 0.0
    # The first index whose sum exceeds the threshold or, as rounding may leave all sums below it, the last index. A
    # maximum finds both, as the first are counted down from LAST.
    LAST: tl.constexpr = 2**30
    found_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, end, BLOCK):
        p = _load_p(row_ptr, start, size, temperature, draws, largest, total, BLOCK)
        cumulative = before + tl.cumsum(p, 0)
        keeps = (cumulative - p < top_p) & (p >= min_p) & (p > 0)
        rank = tl.where(cumulative > threshold, LAST - start - column, start + column)
        found_B = tl.maximum(found_B, tl.where(keeps, rank, 0))
        before += tl.sum(p, 0)
    found = tl.max(found_B, 0)
    index = tl.where(found < V, found, LAST - found).to(tl.int64)
    if filters_ptr is not None:
        index = tl.load(order_ptr + n * stride_sorted + index, mask=filtered, other=index)
    tl.store(index_ptr + n, index)


def _draw_triton(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, filters: Tensor | None = None
) -> Tensor:
    index = seed.new_empty(len(logits))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    values, order = (None, None) if filters is None else _sort(logits)
    strides = [0 if t is None else t.stride(0) for t in (logits, values, temperature, seed, filters)]
    _draw_kernel[(len(logits),)](
        logits, temperature, seed, position.contiguous(), filters, values, order, index, logits.shape[1], *strides,
        MIN_TEMPERATURE=MIN_TEMPERATURE, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return index


def _sort(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted before they are divided by the temperature: bf16 takes half the passes of fp32. Results are aligned."""
    size = logits.shape[1]
    if size % ALIGNMENT:
        logits = F.pad(logits, (0, -size % ALIGNMENT), value=-torch.inf)
    return logits.sort(dim=-1, descending=True, stable=True)


_draw = operator(
    "draw(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor? filters) -> Tensor",
    cuda=_draw_triton,
    cpu=draw_definition,
    fake=lambda logits, temperature, seed, position, filters: seed.new_empty(len(logits)),
)


def draw(
    logits_NV: Tensor, temperature_N: Tensor, seed_N: Tensor, position_N: Tensor, filters_N4: Tensor | None = None
) -> Tensor:
    """`draw_definition`, in one kernel, with filters after a sort.

    The kernel sorts before it divides by the temperature: of two logits of fp32 that differ so little that they are
    equal afterwards, the larger one comes first, in the definition the first one.
    """
    function = _draw if uses_triton(logits_NV) else draw_definition
    return function(logits_NV, temperature_N, seed_N, position_N, filters_N4)
