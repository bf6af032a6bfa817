"""The operations of a Mistral network, each beside its PyTorch definition. Independent of `minorca`.

A module contains one operation in four parts:

- `NAME_definition`: a few lines of plain PyTorch, differentiated by autograd; the reference in tests.
- Triton kernels, for CUDA.
- The same in plain PyTorch with fewer passes over memory, for the CPU.
- `NAME`: the differentiable function to call. It dispatches by device through PyTorch operators (operator.py).

Shape suffixes name a tensor's axes: `q_THD` is [T, H, D]. Each module's docstring lists its axes.
"""

from minorca_kernels.attention import attention, attention_definition
from minorca_kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_and_entropy,
    linear_cross_entropy_definition,
    linear_entropy_definition,
)
from minorca_kernels.decode_attention import (
    Span,
    decode_attention,
    decode_attention_definition,
    decode_spans,
    read_span,
    span_of,
)
from minorca_kernels.decode_on_cpu import DecodeOnCPU
from minorca_kernels.dequantize_nf4 import dequantize_nf4
from minorca_kernels.draw import draw, draw_definition
from minorca_kernels.frozen_weight import (
    DenseWeight,
    FrozenWeight,
    PaddedWeight,
    PrepackedWeight,
    fill_rows,
    is_sharded,
    local_part,
    local_tensor,
)
from minorca_kernels.lora_linear import (
    Adapter,
    Factors,
    lora_linear,
    lora_linear_definition,
    norm_lora_linear,
    norm_lora_linear_definition,
)
from minorca_kernels.low_rank_update import STRATEGIES, padding_pays, write_update
from minorca_kernels.nf4_weight import NF4Weight, QuantizedPart
from minorca_kernels.prepacked_nf4 import PrepackedNF4Weight
from minorca_kernels.repetition_penalty import repetition_penalty, repetition_penalty_definition
from minorca_kernels.rms_norm import add_rms_norm, add_rms_norm_definition, rms_norm, rms_norm_definition
from minorca_kernels.rope import rope, rope_definition, rope_frequencies, rope_tables
from minorca_kernels.rope_into_cache import (
    decode_positions,
    decode_positions_definition,
    rope_into_cache,
    rope_into_cache_definition,
)
from minorca_kernels.swiglu import swiglu, swiglu_definition

__all__ = [
    "Adapter",
    "DecodeOnCPU",
    "DenseWeight",
    "Factors",
    "FrozenWeight",
    "NF4Weight",
    "PaddedWeight",
    "PrepackedNF4Weight",
    "PrepackedWeight",
    "QuantizedPart",
    "STRATEGIES",
    "Span",
    "add_rms_norm",
    "add_rms_norm_definition",
    "attention",
    "attention_definition",
    "decode_attention",
    "decode_attention_definition",
    "decode_positions",
    "decode_positions_definition",
    "decode_spans",
    "dequantize_nf4",
    "draw",
    "draw_definition",
    "fill_rows",
    "is_sharded",
    "linear_cross_entropy",
    "linear_cross_entropy_and_entropy",
    "linear_cross_entropy_definition",
    "linear_entropy_definition",
    "local_part",
    "local_tensor",
    "lora_linear",
    "lora_linear_definition",
    "norm_lora_linear",
    "norm_lora_linear_definition",
    "read_span",
    "repetition_penalty",
    "repetition_penalty_definition",
    "rms_norm",
    "rms_norm_definition",
    "rope",
    "rope_definition",
    "rope_frequencies",
    "rope_into_cache",
    "rope_into_cache_definition",
    "rope_tables",
    "span_of",
    "padding_pays",
    "swiglu",
    "swiglu_definition",
    "write_update",
]
