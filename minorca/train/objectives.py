"""What a run minimizes: the only code that knows what a batch is worth.

The loop asks an objective for a step's normalizer, for a head that turns the last hidden states of a micro-batch into
its share of the step's loss, and for the metrics that a step's or an evaluation's line gets besides the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from minorca.data.packing import Batch
from minorca.data.store import TokenStore
from minorca.model.vocabulary import VocabularyMatrix


@dataclass
class Outcome:
    """What a micro-batch gives.

    Attributes:
        loss: a scalar, the micro-batch's share of the loss of a step: backward starts from it, and the shares of all
            micro-batches and ranks add up to the step's loss.
        sums: further scalars that add up in the same way, for `Objective.metrics`.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


Head = Callable[[Tensor, VocabularyMatrix], Outcome]


class Objective(Protocol):
    """What to minimize over the rows of a store."""

    def normalizer(self, store: TokenStore, rows: np.ndarray) -> int:
        """What the loss of these rows together is divided by; every rank knows it before anything is computed."""
        ...

    def head(self, batch: Batch, normalizer: float) -> Head:
        """The head of a forward over `batch` (`Mistral.forward`): hidden states [T, H] and the weight [V, H] ->
        Outcome.
        """
        ...

    def metrics(self, sums: dict[str, float], normalizer: float) -> dict[str, float]:
        """A line's metrics besides its loss, from the added-up `Outcome.sums`."""
        ...


class NextToken:
    """Cross-entropy of each trained token, averaged over them: supervised fine-tuning. Only their rows meet the
    head.
    """

    def normalizer(self, store: TokenStore, rows: np.ndarray) -> int:
        return int(store.trained_counts[rows].sum())

    def head(self, batch: Batch, normalizer: float) -> Head:
        def loss(hidden_TH: Tensor, weight: VocabularyMatrix) -> Outcome:
            losses_M = weight.losses(hidden_TH[batch.target_rows], batch.targets)
            return Outcome(losses_M.sum() / normalizer)

        return loss

    def metrics(self, sums: dict[str, float], normalizer: float) -> dict[str, float]:
        return {}


OBJECTIVES: dict[str, type[Objective]] = {"sft": NextToken}
