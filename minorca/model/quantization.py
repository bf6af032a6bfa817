"""How the frozen weights of the projections are quantized: NF4, of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

Embedding, head and norms stay dense, as bitsandbytes leaves them.
"""

from dataclasses import dataclass

from minorca.errors import UserError

# what to do where files are quantized in another way
INSTEAD = "use the unquantized model, which model.quantize nf4 (--quantize nf4) quantizes while it loads"


@dataclass(frozen=True)
class Quantization:
    """NF4 in blocks of 64 values.

    Attributes:
        double_quant: the scales of the blocks are quantized too.
    """

    double_quant: bool = True

    def __str__(self) -> str:
        return f"nf4 {'with' if self.double_quant else 'without'} double quantization"

    @property
    def options(self) -> str:
        """The options of a command that ask for it."""
        return f"--quantize nf4{'' if self.double_quant else ' --no-double-quant'}"


def parse_quantization(quantize: str | None, double_quant: bool = True) -> Quantization | None:
    """From the values of model.quantize, where None is none too, and model.double_quant."""
    if quantize not in (None, "none", "nf4"):
        raise UserError(f"is {quantize!r}; expected none or nf4", field="quantize")
    if quantize == "nf4":
        return Quantization(double_quant)
    if not double_quant:
        raise UserError("is false, which needs quantize nf4", field="double_quant")
    return None
