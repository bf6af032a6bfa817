"""What a batch is worth: a loss over a model's last hidden states, given to `Mistral.forward` as its head."""

from collections.abc import Callable

from torch import Tensor

from minorca.data.packing import Batch
from minorca_kernels import linear_cross_entropy


def next_token_loss(batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """The summed cross-entropy of a batch's trained tokens. Only their rows ever meet the head."""
    return lambda hidden_TH, weight_VH: linear_cross_entropy(hidden_TH[batch.target_rows], weight_VH, batch.targets)
