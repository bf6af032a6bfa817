"""NF4: weights of 4 bits, in blocks of 64 that share a scale, their absmax; and double quantization, which stores the
absmax values in 8 bits. Bits and values are those of bitsandbytes 0.50 on a CPU.

Source: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314). A matrix is quantized as its rows one after another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# weights that share an absmax
BLOCK = 64
# absmax values that share an absmax of their own
NESTED_BLOCK = 256

# quantiles of a normal distribution, scaled to [-1, 1], zero among them
CODE_BOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _dynamic_map() -> list[float]:
    """Of every decade from 1e-6 to 1 twice as many values as of the one before, of both signs; 0 and 1 beside them."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centers = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centers.tolist(), *(-centers).tolist()]
    return sorted(values)


# the value of each code of an absmax; source: Dettmers 2015 (arXiv:1511.04561)
DYNAMIC_MAP = tuple(_dynamic_map())


# ---------------------------------------------------------------------------------------------------------- quantize


def block_absmax(values: Tensor) -> Tensor:
    """The largest magnitude of each block, fp32 [ceil(n / 64)]."""
    flat = values.detach().reshape(-1)
    full = len(flat) // BLOCK * BLOCK
    absmax = flat[:full].view(-1, BLOCK).abs().amax(1).float()
    if full < len(flat):
        # bitsandbytes has a lower bound on the absmax of a partial block only
        absmax = torch.cat([absmax, flat[full:].float().abs().amax().clamp(min=1e-38)[None]])
    return absmax


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """n values, fp32, bf16 or fp16 -> codes uint8 [ceil(n / 2)], and absmax fp32 [ceil(n / 64)].

    Of two codes in a byte the first is the high one. A value halfway between two gets the lower. The absmax of a block
    that holds NaN or infinity is NaN or infinite, so that no value of the block is finite when it is read back.
    """
    flat = values.detach().reshape(-1).float()
    absmax = block_absmax(flat)
    full = len(flat) // BLOCK * BLOCK
    # full blocks are multiplied by the reciprocal, a partial one is divided: the results differ in their last bit
    reciprocal = 1 / absmax[: full // BLOCK].clamp(min=1e-38)
    scaled = (flat[:full].view(-1, BLOCK) * reciprocal[:, None]).view(-1)
    if full < len(flat):
        scaled = torch.cat([scaled, flat[full:] / absmax[-1]])
    if len(flat) % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    book = torch.tensor(CODE_BOOK, dtype=torch.float32, device=flat.device)
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax


def quantize_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """m values on the CPU, fp32 -> codes of DYNAMIC_MAP uint8 [m], and absmax fp32 [ceil(m / 256)].

    bitsandbytes on a CPU first rounds to 65,536 values spread evenly, so the code is not always the nearest.
    """
    book = torch.tensor(DYNAMIC_MAP, dtype=torch.float32)
    even = -1 + 2 * torch.arange(65536) / 65535
    code_of_even = torch.bucketize(even, (book[:-1] + book[1:]) / 2).to(torch.uint8)
    blocks = F.pad(values, (0, -len(values) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1)
    # a block of zeros, or one that is not finite, gives NaN
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0).to(torch.int64)
    codes = torch.where((absmax == 0)[:, None], 0, code_of_even[index])
    return codes.view(-1)[: len(values)], absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m absmax values on the CPU, fp32 -> codes uint8 [m], nested absmax fp32 [ceil(m / 256)], and the offset, a fp32
    scalar: the mean of all of them, from which the rest is counted.

    A NaN or infinite absmax makes the offset so, and thereby all values that are read back.
    """
    offset = absmax.mean()
    return *quantize_8bit(absmax - offset), offset


# -------------------------------------------------------------------------------------------------------- definition


def dequantize_absmax_definition(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """What `quantize_absmax` gives -> absmax fp32 [m], rounded after the product and after the sum."""
    values = torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=codes.device).index_select(
        0, codes.reshape(-1).int()
    )
    return values * nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + offset


def dequantize_nf4_definition(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes uint8 [n / 2], absmax fp32 [ceil(n / 64)] -> n values: the product of two fp32 numbers, rounded once."""
    book = torch.tensor(CODE_BOOK, dtype=torch.float32, device=codes.device)
    # the two values of a byte, read as one of 8 bytes: that is many times faster
    pairs = torch.cartesian_prod(book, book).view(torch.int64).view(-1)
    values = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    return (blocks * absmax[:, None]).to(dtype).view(-1)[: len(values)]
