"""NF4 bits and values against bitsandbytes on the CPU, and the storage kind that holds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minorca_kernels import NF4Weight, QuantizedPart
from minorca_kernels.nf4 import (
    CODE_BOOK,
    DYNAMIC_MAP,
    dequantize_absmax_definition,
    dequantize_nf4_definition,
    quantize_8bit,
    quantize_absmax,
    quantize_nf4,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    # it compiles what its library does not do, odd rows
    with torch.compiler.set_stance("force_eager"):
        yield functional


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def midpoints() -> Tensor:
    """A block of 64 whose values are scaled to the code book's, and to exactly halfway between two."""
    book = torch.tensor(CODE_BOOK)
    return torch.cat([book, (book[1:] + book[:-1]) / 2]).repeat(3)[:64]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = ((64, 64), (128, 256), (3, 65), (7, 129), (1, 10), (1,), (63,), (576, 192), (3, 5, 7), (4096, 64))
    found = {str(shape): normal(*shape) for shape in shapes}
    found["a zero block"] = normal(10, 64) * (torch.arange(10) != 3)[:, None]
    found["zeros"] = torch.zeros(70)
    found["an outlier"] = 1e-3 * normal(10, 64)
    found["an outlier"][2, 5] = 1e4
    found["denormal"] = 1e-39 * normal(100, 64)
    found["halfway"] = torch.cat([midpoints(), -midpoints(), 0.37 * midpoints(), midpoints()[:20]])
    found["nearly halfway"] = torch.nextafter(midpoints(), torch.ones(64))
    found["neighbours"] = 1 + 2.0**-23 * torch.arange(64 * 64.0)
    for name, value in (("NaN", torch.nan), ("infinity", torch.inf)):
        found[name] = normal(640)
        found[name][70] = value
    return found


def without_denormals(values: Tensor) -> Tensor:
    """On a CPU with AVX512-BF16, bitsandbytes' results in bf16 have none."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(values.abs() < tiny, 0, values) if values.dtype == torch.bfloat16 else values


def test_the_tables_are_those_of_bitsandbytes(bitsandbytes):
    assert torch.equal(torch.tensor(CODE_BOOK), bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(DYNAMIC_MAP), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", weights())
def test_bits_and_values_are_those_of_bitsandbytes(bitsandbytes, name, dtype):
    """With and without double quantization, and for values that are not finite."""
    values = weights()[name].to(dtype)
    codes, absmax = quantize_nf4(values)
    their_codes, state = bitsandbytes.quantize_4bit(values, quant_type="nf4")
    assert torch.equal(codes, their_codes.flatten())
    assert_same(absmax, state.absmax)
    got = dequantize_nf4_definition(codes, absmax, dtype)[: values.numel()]
    expected = bitsandbytes.dequantize_4bit(their_codes, state).flatten()
    assert_same(without_denormals(got), without_denormals(expected))

    absmax_codes, nested_absmax, offset = quantize_absmax(absmax)
    _, state = bitsandbytes.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    assert_same(offset, state.offset)
    if offset.isfinite():
        assert torch.equal(absmax_codes, state.absmax) and torch.equal(nested_absmax, state.state2.absmax)
    scales = dequantize_absmax_definition(absmax_codes, nested_absmax, offset)
    got = dequantize_nf4_definition(codes, scales, dtype)[: values.numel()]
    expected = bitsandbytes.dequantize_4bit(their_codes, state).flatten()
    assert_same(without_denormals(got), without_denormals(expected))


def test_8bit_codes_close_to_a_boundary(bitsandbytes):
    """Where rounding to 65,536 values decides: all fp32 numbers next to a boundary of the map, or of those values."""
    book = torch.tensor(DYNAMIC_MAP)
    boundary = ((book[:-1] + book[1:]) / 2).view(torch.int32)[:, None] + torch.arange(-300, 300).int()
    steps = ((torch.arange(65535) + 0.5) / 65535 * 2 - 1).view(torch.int32)[:, None] + torch.arange(-2, 3).int()
    near = torch.cat([boundary.flatten(), steps.flatten()]).view(torch.float32)
    near = near[near.abs() <= 1]
    # each block's absmax is 1
    values = F.pad(near[: len(near) // 255 * 255].view(-1, 255), (1, 0), value=1.0).flatten()
    codes, absmax = quantize_8bit(values)
    expected, state = bitsandbytes.quantize_blockwise(values, blocksize=256)
    assert torch.equal(codes, expected) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("parts, in_features", [((576, 192, 192), 576), ((3000,), 128), ((1536, 1536), 64)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_stacked_weights_are_quantized_each_on_its_own(bitsandbytes, parts, in_features, double_quant):
    """As they are read, and from what bitsandbytes made of them; and they are given back."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(sum(parts), in_features, generator=generator)
    matrix = (matrix * torch.rand(len(matrix), 1, generator=generator)).half()
    streamed = NF4Weight(parts, in_features, torch.float16, double_quant, device="meta").to_empty(device="cpu")
    copied = NF4Weight(parts, in_features, torch.float16, double_quant)
    expected = []
    for part, rows in enumerate(matrix.split(parts)):
        reads = []

        def read(start, stop, rows=rows, reads=reads):
            reads.append((start, stop))
            return rows[start:stop]

        streamed.store_part(part, read)
        stops = [stop for _, stop in reads]
        assert [0, *stops] == [*(start for start, _ in reads), len(rows)]
        assert max(stop - start for start, stop in reads) <= 1024
        codes, state = bitsandbytes.quantize_4bit(rows, quant_type="nf4", compress_statistics=double_quant)
        nested = (state.state2.absmax, state.offset) if double_quant else ()
        copied.store_quantized_part(part, QuantizedPart(codes, state.absmax, *nested))
        expected.append(bitsandbytes.dequantize_4bit(codes, state))
    # another dtype leaves the codes as they are
    for weight in (streamed, copied, streamed.to(torch.float32)):
        assert torch.equal(weight.dequantize(), torch.cat(expected))
    for part in range(len(parts)):
        pair = (weight.quantized_part(part) for weight in (streamed, copied))
        for one, other in zip(*pair, strict=True):
            if one is None or other is None:
                assert one is other and not double_quant
            else:
                assert torch.equal(one, other)


def test_rows_of_half_a_block_are_refused():
    with pytest.raises(ValueError, match="rows of 96 weights are not made of whole blocks of 64"):
        NF4Weight([10], 96, torch.float32)
