"""The reference of preference tuning: the model that the policy is measured against."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minorca.data.packing import Batch
from minorca.model.network import Mistral
from minorca.model.vocabulary import VocabularyMatrix
from minorca.train.forward import forward
from minorca_kernels.frozen_weight import local_part

# how much is exchanged by the same launches, which need a copy of it
GROUP_BYTES = 2**28


class Reference:
    """The policy's own network with other values of what is trained, on each rank of its part. It runs the same kernels
    in the same shapes: a policy with equal values has equal log-probabilities, to the bit.
    """

    def __init__(self, model: Mistral, parameters: Iterable[nn.Parameter]):
        """Takes the parameters' values of now. Without parameters, the reference is the model as it is."""
        self.model = model
        stored = [local_part(parameter)[0] for parameter in parameters]
        sizes = itertools.accumulate(t.nbytes for t in stored)
        # what is exchanged together: the parameters' tensors, and the values to put there
        self.groups: list[tuple[list[Tensor], list[Tensor]]] = []
        for _, group in itertools.groupby(zip(sizes, stored), key=lambda pair: pair[0] // GROUP_BYTES):
            tensors = [t for _, t in group]
            self.groups.append((tensors, [t.clone() for t in tensors]))

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """The log-probabilities [M] of a batch's targets, in fp32 (fp64 for fp64)."""

        def head(hidden_TH: Tensor, weight: VocabularyMatrix) -> Tensor:
            # by the operator that the policy's come from
            losses_M, _ = weight.losses_and_entropies(hidden_TH[batch.target_rows], batch.targets)
            return -losses_M

        with self._in_place():
            return forward(self.model, batch, head)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Exchanges the values with the parameters'. Autograd counts the change, so rounded copies are made anew."""
        for stored, values in self.groups:
            current = [torch.empty_like(t) for t in stored]
            for to, source in ((current, stored), (stored, values)):
                torch._foreach_copy_(to, source)  # pyright: ignore[reportPrivateImportUsage]
            values[:] = current
        if isinstance(self.model, FSDPModule):
            # what a forward has gathered stays gathered in the root until its backward
            self.model.reshard()
