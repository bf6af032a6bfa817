"""The files that transformers and bitsandbytes write of a model in 4 bits (NF4): what they say, checked.

Of a projection W [N, K] there are, beside `NAME`, uint8 [N K / 2, 1] of two codes a byte:

- `NAME.absmax`: a scale for each 64 values, fp32, or with double quantization uint8;
- `NAME.quant_map`, fp32 [16]: the values of the codes;
- `NAME.nested_absmax`, fp32, and `NAME.nested_quant_map`, fp32 [256], with double quantization: a scale for each 256
  scales, and the values of their codes;
- `NAME.quant_state.bitsandbytes__nf4`: the rest as JSON, in uint8.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minorca.errors import UserError
from minorca.files.safe_io import parse_json, quote, read_optional_json
from minorca.files.tensor_files import FLOATS, TensorFiles
from minorca.model.quantization import INSTEAD, Quantization
from minorca_kernels import QuantizedPart
from minorca_kernels.nf4 import (
    BLOCK,
    CODE_BOOK,
    DYNAMIC_MAP,
    NESTED_BLOCK,
    dequantize_absmax_definition,
    dequantize_nf4_definition,
    quantize_absmax,
    quantize_nf4,
)

STATE = "quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {"uint8": ("U8", "torch.uint8"), "fp32": ("F32", "torch.float32")}
# as a scale may be at most
MAX_NUMBER = 1e30
# the longest is some 180 bytes
MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class NF4Tensor:
    """A quantized weight [N, K] in files.

    Attributes:
        dtype: of the values.
        offset: what was subtracted from the scales before they were quantized; None: they are not quantized.
    """

    files: TensorFiles
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    offset: float | None

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.offset is not None)

    def read(self, start: int, stop: int) -> Tensor:
        """The values of rows [start, stop), in `dtype`."""
        absmax = self._part("absmax")
        if self.offset is not None:
            absmax = dequantize_absmax_definition(absmax, self._part("nested_absmax"), torch.tensor(self.offset))
        columns = self.shape[1]
        scales = absmax.view(-1, columns // BLOCK)[start:stop].reshape(-1)
        codes = self.files.read(self.name, start * columns // 2, stop * columns // 2)
        return dequantize_nf4_definition(codes, scales, self.dtype).view(-1, columns)

    def whole(self) -> QuantizedPart:
        """As it is stored."""
        codes = self.files.whole(self.name).flatten()
        if self.offset is None:
            return QuantizedPart(codes, self._part("absmax"))
        return QuantizedPart(codes, self._part("absmax"), self._part("nested_absmax"), torch.tensor(self.offset))

    def _part(self, name: str) -> Tensor:
        return self.files.whole(f"{self.name}.{name}")


def quantized_tensors(name: str, weight_NK: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """The tensors that bitsandbytes saves of a weight, by name."""
    dtype = weight_NK.dtype if weight_NK.dtype in DTYPES.values() else torch.float32
    codes, absmax = quantize_nf4(weight_NK)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight_NK.shape),
    }
    tensors = {"quant_map": torch.tensor(CODE_BOOK)}
    if quantization.double_quant:
        absmax, nested_absmax, offset = quantize_absmax(absmax)
        tensors |= {"nested_absmax": nested_absmax, "nested_quant_map": torch.tensor(DYNAMIC_MAP)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    tensors |= {"absmax": absmax, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    return {name: codes[:, None]} | {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def config(quantization: Quantization, dtype: torch.dtype) -> dict:
    """A config.json's quantization_config, with which transformers reads such files."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def stored_quantization(directory: Path) -> Quantization | None:
    """How config.json says that a directory's projections are quantized."""
    settings = read_optional_json(directory / "config.json").get("quantization_config")
    return Quantization(bool(settings.get("bnb_4bit_use_double_quant"))) if settings else None


def names_beside(name: str) -> list[str]:
    """The tensors that may lie beside a quantized one."""
    return [f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)]


def open_quantized(files: TensorFiles, shapes: dict[str, tuple[int, int]]) -> dict[str, NF4Tensor]:
    """name -> weight, of these shapes, all of them quantized alike.

    Raises:
        UserError: what is missing, of another shape or type, or not bitsandbytes' NF4 in blocks of 64; names file and
            key.
    """
    weights = {name: _Parts(files, name).weight(shape) for name, shape in shapes.items()}
    for other in weights.values():
        first = next(iter(weights.values()))
        if (other.quantization, other.dtype) != (first.quantization, first.dtype):
            ours, theirs = (f"{weight.quantization}, {weight.dtype}" for weight in (other, first))
            _Parts(files, other.name).refuse("", f"is {ours}, and {first.name} {theirs}; expected the same for all")
    return weights


class _Parts:
    """The tensors of one weight, with errors that name file and key."""

    def __init__(self, files: TensorFiles, name: str):
        self.files = files
        self.name = name

    def refuse(self, part: str, message: str) -> NoReturn:
        name = self._name(part)
        raise UserError(
            f"{message}; {INSTEAD}", path=self.files.files.get(name, self.files.files[self.name]), field=name
        )

    def _name(self, part: str) -> str:
        return f"{self.name}.{part}" if part else self.name

    def check(self, part: str, dtype: str, *shape: int) -> None:
        name = self._name(part)
        if name not in self.files.files:
            self.refuse(part, "is missing beside a quantized weight")
        found = self.files.dtype(name), self.files.shape(name)
        if found[0] not in DTYPE_NAMES[dtype] or found[1] != shape:
            self.refuse(part, f"is {found[0]} {list(found[1])}; expected {dtype} {list(shape)}")

    def check_code(self, part: str, code: Tensor) -> None:
        self.check(part, "fp32", len(code))
        if not torch.equal(self.files.read(self._name(part), 0, len(code)), code):
            self.refuse(part, "holds other values than bitsandbytes' own")

    def state(self) -> dict:
        """The JSON object of `STATE`."""
        name = self._name(STATE)
        size = math.prod(self.files.shape(name)) if name in self.files.files else 0
        self.check(STATE, "uint8", size)
        if size > MAX_STATE_BYTES:
            self.refuse(STATE, f"has {size} bytes; expected at most {MAX_STATE_BYTES}")
        try:
            state = parse_json(bytes(self.files.read(name, 0, size).tolist()))
        except (ValueError, RecursionError) as error:
            self.refuse(STATE, f"is not valid JSON ({str(error)[:200]})")
        if not isinstance(state, dict):
            self.refuse(STATE, f"holds {quote(state)}; expected an object")
        return state

    def weight(self, shape: tuple[int, int]) -> NF4Tensor:
        if self.files.dtype(self.name) in FLOATS:
            self.refuse("", "is not quantized, in a directory that is; expected all projections of the layers to be")
        values = shape[0] * shape[1]
        self.check("", "uint8", values // 2, 1)
        state = self.state()
        nested = self._name("nested_absmax") in self.files.files or "nested_offset" in state
        expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
        if nested:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        for key, right in expected.items():
            if state.get(key) != right:
                self.refuse(STATE, f"has {key} {quote(state.get(key))}; expected {json.dumps(right)}")
        dtype = state.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self.refuse(STATE, f"has dtype {quote(dtype)}; expected {', '.join(DTYPES)}")
        self.check_code("quant_map", torch.tensor(CODE_BOOK))
        blocks = values // BLOCK
        self.check("absmax", "uint8" if nested else "fp32", blocks)
        if nested:
            self.check("nested_absmax", "fp32", -(blocks // -NESTED_BLOCK))
            self.check_code("nested_quant_map", torch.tensor(DYNAMIC_MAP))
        return NF4Tensor(self.files, self.name, shape, DTYPES[dtype], self.offset(state) if nested else None)

    def offset(self, state: dict) -> float:
        value: object = state.get("nested_offset")
        if isinstance(value, bool) or not isinstance(value, float | int) or abs(value) > MAX_NUMBER:
            self.refuse(STATE, f"has nested_offset {quote(value)}; expected a number")
        return float(value)
