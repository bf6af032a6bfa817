"""The best evaluation of a run so far: what `train.early_stopping` counts from, and `train.keep_best` writes."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Best:
    """The evaluation with the lowest held-out loss, and how many there were since.

    Attributes:
        step: after which it was made; -1: there was none.
        loss: the held-out loss.
        since: the evaluations that came after it.
        evaluated: the step of the last evaluation; -1: there was none.
        tensors: what was trained up to `step`, each rank's part on its host, where it is kept.
    """

    step: int = -1
    loss: float = math.inf
    since: int = 0
    evaluated: int = -1
    tensors: dict[str, Tensor] | None = None

    def count(self, step: int, loss: float) -> bool:
        """Counts the evaluation after a step, unless it has been counted; returns whether it is the best so far."""
        if step <= self.evaluated:
            return False
        self.evaluated = step
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def why_stopped(self, patience: int | None) -> str | None:
        """Why training stops early, where `patience` evaluations gave no lower loss; else None."""
        if patience is None or self.since < patience:
            return None
        best = f"the lowest is {self.loss:.4f}, after step {self.step}" if self.step >= 0 else "none was a number"
        return (
            f"stopped early after step {self.evaluated}: {self.since} evaluations in a row without a lower held-out "
            f"loss ({best}); train.early_stopping is {patience}"
        )

    def saved(self) -> dict:
        """The fields of a checkpoint's state that `checkpoint.State.best` reads."""
        return {
            "best_step": self.step,
            "best_loss": self.loss if self.step >= 0 else 0.0,
            "since_best": self.since,
            "evaluated_step": self.evaluated,
        }
