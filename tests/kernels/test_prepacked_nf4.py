"""Weights in NF4 as bitsandbytes multiplies them on a CPU, beside its own module and exact products."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from minorca_kernels import NF4Weight, PrepackedNF4Weight, prepacked_nf4
from tests.helpers import ENVIRONMENT, relative_error

# q, k and v, say
PARTS, COLUMNS = (64, 32, 32), 192


def stored(double_quant: bool = True, parts=PARTS, columns=COLUMNS) -> tuple[NF4Weight, list[Tensor]]:
    """A weight, and the parts that it was quantized from."""
    values = [torch.randn(rows, columns).bfloat16() for rows in parts]
    weight = NF4Weight(parts, columns, torch.bfloat16, double_quant)
    for part, value in enumerate(values):
        weight.store_part(part, lambda start, stop, value=value: value[start:stop])
    return weight, values


@pytest.fixture
def supported():
    if not PrepackedNF4Weight.supports(stored()[0], torch.bfloat16):
        pytest.skip("needs bitsandbytes' product, on a CPU with AVX-512's bf16")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_product_is_close_to_the_exact_one(rows, double_quant, supported):
    """As close as that with dequantized weights in bf16."""
    weight, _ = stored(double_quant)
    x = torch.randn(rows, COLUMNS).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    packed = PrepackedNF4Weight(weight)
    assert (packed.out_features, packed.in_features) == (sum(PARTS), COLUMNS)
    assert relative_error(packed.linear(x), exact) < 2**-8
    assert torch.equal(packed.product(x, packed.tensors()), packed.linear(x))


def test_bitsandbytes_module_gives_the_same_bits(supported):
    modules = pytest.importorskip("bitsandbytes.nn")
    x = torch.randn(5, COLUMNS).bfloat16()
    weight, values = stored(double_quant=False)
    with torch.no_grad():
        theirs = []
        for value in values:
            linear = modules.Linear4bit(COLUMNS, len(value), bias=False, quant_type="nf4", compress_statistics=False)
            linear.weight = modules.Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=False)
            theirs.append(linear.to("cpu").eval()(x))
        assert torch.equal(PrepackedNF4Weight(weight).linear(x), torch.cat(theirs, 1))


def test_a_row_does_not_depend_on_those_beside_it(supported):
    weight = PrepackedNF4Weight(stored()[0])
    x = torch.randn(300, COLUMNS).bfloat16()
    whole = weight.linear(x)
    for rows in (1, 2, 5, 31, 32, 33, 128, 257):
        assert torch.equal(weight.linear(x[:rows]), whole[:rows])


def test_what_it_cannot_multiply(monkeypatch):
    weight, _ = stored()
    assert not PrepackedNF4Weight.supports(weight, torch.float32)
    odd, _ = stored(parts=(48,))
    assert not PrepackedNF4Weight.supports(odd, torch.bfloat16)
    monkeypatch.setattr(prepacked_nf4, "_bitsandbytes", lambda: None)
    assert not PrepackedNF4Weight.supports(weight, torch.bfloat16)
    for unsupported in (weight, odd):
        with pytest.raises(ValueError, match="no product for this weight"):
            PrepackedNF4Weight(unsupported)


def test_bitsandbytes_downloads_nothing_and_says_nothing(supported, tmp_path):
    """With Hugging Face's `kernels` it would take its product from the hub; others still find that package."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    raise SystemExit('a download')\n")
    code = "import sys, kernels; from minorca_kernels import prepacked_nf4; "
    code += "assert prepacked_nf4._bitsandbytes() and sys.modules['kernels'] is kernels"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
