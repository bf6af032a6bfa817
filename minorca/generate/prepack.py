"""Weights laid out once as the CPU's matrix products read them, instead of at every call.

oneDNN multiplies a few rows by a weight in blocks of its own; given a plain weight, torch has them made again each time, or
takes another library's slower product. `python -m benchmarks.decode` times both.
"""

import torch
from torch import Tensor, nn

from minorca.model.network import Mistral, SwiGLULinear
from minorca_kernels import swiglu

ROWS = 8  # that the layout is chosen for; one layout serves all heights, and this one served them best


class Prepacked:
    """A projection without bias, for inference alone: its weight can be multiplied by and nothing else. It is no module, whose call
    takes 2 microseconds longer, a hundred times a token."""

    def __init__(self, linear: nn.Linear):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def product(self, x_TK: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x_TK, self.packed, None, "none", [], "")

    __call__ = product


class PrepackedOfSwiGLU(Prepacked):
    def __call__(self, gate_up_TI: Tensor) -> Tensor:
        return self.product(swiglu(gate_up_TI))


def prepack(model: Mistral) -> Mistral:
    """Prepacks a model's projections in place where this machine gains by it: on the CPU, one at a time, so that no two copies of
    the model are there at once (of the head there are). From then on it generates, and neither trains nor tells its weights.
    Returns the model."""
    weight = model.embedding.weight
    if weight.is_cuda or not torch.backends.mkldnn.is_available() or hasattr(model, "prepacked_head"):
        return model
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return model
    for block in model.layers:
        for parent in (block, *block.children()):  # an adapter's base is one deeper
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    delattr(parent, name)
                    setattr(parent, name, (PrepackedOfSwiGLU if isinstance(child, SwiGLULinear) else Prepacked)(child))
    head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    head.weight = (model.head or model.embedding).weight
    model.prepacked_head = Prepacked(head)
    return model
