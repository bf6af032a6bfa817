"""The operations of a Mistral network, each beside its PyTorch definition. Knows nothing of `minorca`.

Every file holds one operation: a `*_definition`, a few lines of plain PyTorch that autograd differentiates, and the function
of the same name without the suffix, which computes the same with fewer passes over memory.
"""

from minorca_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_definition
from minorca_kernels.lora_linear import Adapter, lora_linear, lora_linear_definition
from minorca_kernels.rms_norm import rms_norm, rms_norm_definition
from minorca_kernels.rope import rope, rope_definition, rope_tables
from minorca_kernels.swiglu import swiglu, swiglu_definition

__all__ = [
    "Adapter",
    "linear_cross_entropy",
    "linear_cross_entropy_definition",
    "lora_linear",
    "lora_linear_definition",
    "rms_norm",
    "rms_norm_definition",
    "rope",
    "rope_definition",
    "rope_tables",
    "swiglu",
    "swiglu_definition",
]
