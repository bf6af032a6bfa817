"""What a run minimizes: the only code that knows losses and metrics.

The loop asks an objective for what a step's loss is divided by, for a head that turns the last hidden states of a
micro-batch into sums, for the loss that these sums make, and for the metrics that a step's or an evaluation's line gets
besides the loss.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from minorca.data.packing import Batch
from minorca.data.store import TokenStore
from minorca.model.vocabulary import VocabularyMatrix
from minorca.train.ranks import World

# Scalars by name, which add up over the micro-batches of all ranks: those of the loss differentiable, the others not.
Sums = dict[str, Tensor]
Head = Callable[[Tensor, VocabularyMatrix], Sums]
Counts = Mapping[str, float]


class Objective(Protocol):
    """What to minimize over the rows of a store."""

    def prepare(self, store: TokenStore, rows: np.ndarray, world: World) -> None:
        """Computes what the loss needs of all rows of a step or an evaluation, if anything, before its first
        micro-batch. Every rank calls it.
        """

    def counts(self, store: TokenStore, rows: np.ndarray) -> Counts:
        """What the sums of these rows together are divided by; every rank knows it before anything is computed."""
        ...

    def head(self, batch: Batch) -> Head:
        """The head of a forward over `batch` (`Mistral.forward`): hidden states [T, H] and the weight [V, H] -> sums,
        the same names for every batch.
        """
        ...

    def loss(self, sums: Mapping[str, Any], counts: Counts) -> Any:
        """The loss, of sums that are tensors or numbers: linear, so that the losses of micro-batches add up to that of
        their step.
        """
        ...

    def metrics(self, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        """A line's metrics besides its loss."""
        ...

    def of_held_out(self, loss: float) -> dict[str, float]:
        """What an evaluation's line has of each set beside its loss."""
        return {}


class NextToken(Objective):
    """Cross-entropy of each trained token, averaged over them: supervised fine-tuning. Only their rows meet the
    head.
    """

    def counts(self, store: TokenStore, rows: np.ndarray) -> Counts:
        return {"tokens": int(store.trained_counts[rows].sum())}

    def head(self, batch: Batch) -> Head:
        def sums(hidden_TH: Tensor, weight: VocabularyMatrix) -> Sums:
            return {"loss": weight.losses(hidden_TH[batch.target_rows], batch.targets).sum()}

        return sums

    def loss(self, sums: Mapping[str, Any], counts: Counts) -> Any:
        return sums["loss"] / counts["tokens"]

    def metrics(self, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        return {}

    def of_held_out(self, loss: float) -> dict[str, float]:
        # beyond it, e ** loss is no float
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}
