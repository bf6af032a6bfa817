"""NF4 bits and values against bitsandbytes on the CPU, and the storage kind that holds them: read back by the Triton
kernel too, sharded, and multiplied.
"""

import functools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.library import opcheck
from torch.testing._internal.distributed.fake_pg import FakeStore

from minorca.train.parallel import shard_parameters
from minorca_kernels import Adapter, DenseWeight, NF4Weight, PaddedWeight, QuantizedPart, lora_linear, norm_lora_linear
from minorca_kernels.dequantize_nf4 import _dequantize_nf4, dequantize_nf4, tables
from minorca_kernels.nf4 import (
    CODE_BOOK,
    DYNAMIC_MAP,
    dequantize_absmax_definition,
    dequantize_nf4_definition,
    quantize_8bit,
    quantize_absmax,
    quantize_nf4,
)
from minorca_kernels.operator import INTERPRETED, uses_triton

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bitsandbytes():
    if INTERPRETED:
        pytest.skip("tests what is stored, not the kernel")
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


# --------------------------------------------------------------------------------------------------------- read back
# parts that end within blocks of 256 absmax values, and rows of one block and of several
STACKED = {"q, k, v": ((45, 15, 15), 192), "one block a row": ((3, 700), 64), "one": ((130,), 320)}


def quantized(
    parts: tuple[int, ...], in_features: int, double_quant: bool = True, device: str = "cpu"
) -> tuple[NF4Weight, Tensor]:
    """A weight of random values, and the values that it stores by the definition, in fp32."""
    generator = torch.Generator().manual_seed(0)
    weight = NF4Weight(parts, in_features, torch.float32, double_quant, device=device)
    values = []
    for part, rows in enumerate(parts):
        part_NK = torch.randn(rows, in_features, generator=generator) * torch.rand(rows, 1, generator=generator)
        weight.store_part(part, lambda start, stop, part_NK=part_NK: part_NK[start:stop])
        codes, absmax = quantize_nf4(part_NK)
        if double_quant:
            absmax = dequantize_absmax_definition(*quantize_absmax(absmax))
        values.append(dequantize_nf4_definition(codes, absmax, torch.float32).view(rows, in_features))
    return weight, torch.cat(values).to(device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
# the interpreter does not round bf16
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16) if INTERPRETED else FLOATS, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", STACKED)
def test_values_are_read_back_into_rows_of_any_stride(shape, double_quant, dtype, device):
    """Every one of them, and nothing beside them is written."""
    parts, in_features = STACKED[shape]
    weight, values = quantized(parts, in_features, double_quant, device)
    rows = torch.full((len(values), weight.in_features + 72), torch.nan, dtype=dtype, device=device)
    _dequantize_nf4(rows[:, 8 : 8 + weight.in_features], weight.tensors())
    assert torch.equal(rows[:, 8 : 8 + weight.in_features], values.to(dtype))
    assert rows[:, :8].isnan().all() and rows[:, 8 + weight.in_features :].isnan().all()
    assert torch.equal(dequantize_nf4(weight.tensors(), dtype), values.to(dtype))


LAZY = pytest.mark.skipif(not INTERPRETED, reason="memory that is there once it is written is the host's")


@LAZY
def test_a_part_behind_two_to_the_31_weights():
    """Nothing before it is read or written: all of the weight has too many programs for the interpreter."""
    rows, columns, last = 2**25 + 5, 64, 5
    codes, absmax = (torch.empty(rows, count, dtype=torch.uint8) for count in (columns // 2, 1))
    codes[-last:] = torch.arange(last * columns // 2).view(last, -1)
    absmax_codes, nested_absmax, offset = quantize_absmax(torch.rand(last))
    absmax[-last:, 0] = absmax_codes
    entry = torch.tensor([[rows - last, 0, int(offset.view(torch.int32))]], dtype=torch.int32)
    out = torch.empty(rows, columns, dtype=torch.float16)
    nested = [nested_absmax.view(-1, 1).view(torch.uint8), entry.view(torch.uint8)]
    _dequantize_nf4(out, [codes, absmax, tables(), *nested])
    scales = dequantize_absmax_definition(absmax_codes, nested_absmax, offset)
    assert torch.equal(out[-last:].flatten(), dequantize_nf4_definition(codes[-last:], scales, torch.float16))


@LAZY
def test_rows_that_are_two_to_the_30_weights_apart():
    weight, values = quantized((3,), 64)
    out = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    _dequantize_nf4(out, weight.tensors())
    assert torch.equal(out, values.half())


# ------------------------------------------------------------------------------------------------------ as a module


def test_ranks_keep_their_own_rows():
    """The shards of three ranks make up the whole, though they end within parts, and within blocks of rows."""
    parts, in_features = (1100, 130, 31), 64
    whole, _ = quantized(parts, in_features)
    shards = []

    def shard(_, module, mesh):
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(own, requires_grad=False))

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, in_features, generator=generator) * torch.rand(n, 1, generator=generator) for n in parts]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        for place in range(3):
            # this process, rank 0, at that place of the mesh
            mesh = DeviceMesh("cpu", torch.arange(3).roll(place))
            weight = NF4Weight(parts, in_features, torch.float32, device="meta")
            distribute_module(weight, mesh, shard).to_empty(device="cpu")
            for part, part_NK in enumerate(values):
                if place == 1:
                    weight.store_quantized_part(part, whole.quantized_part(part))
                else:
                    weight.store_part(part, lambda start, stop, part_NK=part_NK: part_NK[start:stop])
            shards.append({name: p.to_local() for name, p in weight.named_parameters() if isinstance(p, DTensor)})
    finally:
        dist.destroy_process_group()
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), parameter.cpu()), name


class Frozen(nn.Module):
    def __init__(self, weight: NF4Weight, x: Tensor):
        super().__init__()
        self.weight = weight
        # what is trained, so that there is something to reduce
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x * self.factor)


def test_mixed_precision_leaves_the_bytes_alone():
    """FSDP casts floating-point parameters: of an fp32 scale it would leave 11 bits."""
    weight, values = quantized((45, 15, 15), 192)
    x = torch.randn(4, 192).half()
    expected = F.linear(x, values.half())
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = Frozen(weight, x)
        policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
        shard_parameters(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        out = module(x)
        out.sum().backward()
        assert torch.equal(out, expected) and module.factor.grad is not None
    finally:
        dist.destroy_process_group()


@functools.cache
def projection(device: str) -> tuple[NF4Weight, Tensor]:
    return quantized((70, 20, 20), 64, device=device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("strategy, dropout", [(None, 0.0), (None, 0.4), ("accumulated", 0.0)])
@pytest.mark.parametrize("input_of", ["", "swiglu", "norm"])
def test_a_projection_is_that_of_the_dense_values(strategy, input_of, dropout, device, monkeypatch, poisoned):
    """With adapters, to the bit, forward and backward, by every strategy; by default in one product where that pays."""
    monkeypatch.setattr(sys.modules["minorca_kernels.lora_linear"], "MIN_TOKENS_AUGMENTED", 10)
    generator = torch.Generator().manual_seed(0)
    weight, values = projection(device)
    n, k = values.shape
    tensors = [torch.randn(shape, generator=generator) for shape in ((19, k * (1 + (input_of == "swiglu"))), (19, n))]
    ab = [0.1 * torch.randn(shape, generator=generator) for shape in ((8, k), (70, 8), (4, k), (20, 4))]
    x, dy, *ab = (t.to(device) for t in (*tensors, *ab))
    x, *ab = (t.requires_grad_() for t in (x, *ab))

    def run(base) -> list[Tensor]:
        update = [Adapter(0, 70, ab[0], ab[1], 1), Adapter(n - 20, n, ab[2], ab[3], 2)], 0.7, dropout
        if input_of == "norm":
            total, y = norm_lora_linear(x, None, torch.ones(k, device=device), 1e-5, base, *update, strategy)
            y = y + 0 * total.sum()
        else:
            y = lora_linear(x, base, *update, input_of == "swiglu", strategy)
        return [y, *torch.autograd.grad(y, [x, *ab], dy)]

    dense = PaddedWeight(values, 12) if uses_triton(x) and not strategy else DenseWeight(values)
    for got, expected in zip(run(weight), run(dense), strict=True):
        assert got.isfinite().all() and torch.equal(got, expected)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_nothing_dense_is_kept_for_backward(with_adapters):
    weight, values = projection("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((4, 64), (70, 4)))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, weight, [Adapter(0, 70, a, b)], 0.7) if with_adapters else weight.linear(x)
    kept = [t.untyped_storage().nbytes() for t in saved if t.is_floating_point()]
    assert max(kept, default=0) < values.nbytes / 8
    assert {t.data_ptr() for t in weight.tensors()} <= {t.data_ptr() for t in saved}
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = values.sum(0) + (0.7 * b.sum(0) @ a if with_adapters else 0)
    torch.testing.assert_close(dx, expected.expand(5, -1), rtol=1e-4, atol=1e-4)


def test_the_operator_changes_what_its_schema_says():
    weight, values = projection("cpu")
    opcheck(torch.ops.minorca.dequantize_nf4.default, (torch.empty_like(values), weight.tensors()))
