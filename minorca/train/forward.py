"""A forward over a micro-batch."""

from typing import Any

from minorca.data.packing import Batch
from minorca.model.attention import PackedAttention
from minorca.model.network import Mistral
from minorca.train.objectives import Head


def forward(model: Mistral, batch: Batch, head: Head | Any) -> Any:
    """What `head` returns of the model's last hidden states over the batch and the weight of its head."""
    # made here, not from cu_seqlens inside: FSDP moves a forward's tensors to the GPU, and reading them back would
    # stall it
    attend = PackedAttention(
        batch.cu_seqlens, len(batch.tokens), model.arch.window, batch.tokens.device, branches=batch.branches
    )
    return model(batch.tokens, attend=attend, head=head)
