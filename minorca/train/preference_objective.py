"""Preference tuning as an objective: losses and metrics of pairs of answers to common prompts.

The losses are in preference.py. Metrics have TRL's names. Axes: T tokens, M scored tokens, A answers, P pairs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minorca.config import DPOConfig
from minorca.data.packing import Batch
from minorca.data.store import TokenStore
from minorca.model.vocabulary import VocabularyMatrix
from minorca.train.objectives import Counts, Head, Objective, Sums
from minorca.train.preference import LOSSES, Pairs, cpo, orpo, simpo

# Log-probabilities [M] of a batch's targets
LogProbabilities = Callable[[Batch], Tensor]
# metrics, by what they are averages over
OF_PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
OF_TOKENS = {"kl": "chosen tokens", "entropy": "tokens"}


def rows_of(hidden_TH: Tensor, rows_M: Tensor) -> Tensor:
    """Rows [M, H], of which one may come several times, with a gradient that repeats to the bit."""
    # each has a deterministic gradient on its device, and neither on the other
    return hidden_TH[rows_M] if hidden_TH.is_cuda else hidden_TH.index_select(0, rows_M)


def sum_answers(values_M: Tensor, lengths_A: Tensor) -> Tensor:
    """Sums [A] over the scored tokens of each answer."""
    # torch refuses no segments, which a rank without a micro-batch has; its checks of lengths would wait for a GPU
    return torch.segment_reduce(values_M, "sum", lengths=lengths_A, unsafe=True) if len(lengths_A) else values_M


def chosen_tokens(store: TokenStore, rows: np.ndarray) -> int:
    """The scored tokens of the chosen answers of all pairs: an answer counts in each pair in which it is chosen."""
    total = 0
    for row in rows:
        starts, scores = store.branches(row)
        lengths = np.add.reduceat(store.row(row)[1], starts, dtype=np.int64)
        total += ((scores[:, None] > scores).sum(1) * lengths).sum()
    return int(total)


class PairwisePreference(Objective):
    """Losses of pairs, averaged over them, and optionally the negative log-likelihood of chosen answers, averaged over
    their tokens.

    Args:
        loss: log-ratios or log-probabilities of pairs, in nats -> their losses [P].
        reference: what log-ratios are taken to, computed before the policy's forward; None: the loss is one of
            log-probabilities.
        beta: rewards are beta times the log-ratios or log-probabilities of answers.
        of_means: of these, rewards take the average over an answer's tokens, not the sum.
        sft_weight: of the negative log-likelihood.
    """

    def __init__(
        self,
        loss: Callable[[Pairs], Tensor],
        reference: LogProbabilities | None,
        beta: float,
        of_means: bool = False,
        sft_weight: float = 0.0,
    ):
        self.pair_loss = loss
        self.reference = reference
        self.beta = beta
        self.of_means = of_means
        self.sft_weight = sft_weight

    def counts(self, store: TokenStore, rows: np.ndarray) -> Counts:
        pairs, tokens = int(store.pair_counts[rows].sum()), int(store.trained_counts[rows].sum())
        return {"pairs": pairs, "tokens": tokens, "chosen tokens": chosen_tokens(store, rows)}

    def head(self, batch: Batch) -> Head:
        answers = batch.answers
        if answers is None:
            raise ValueError("a batch without answers has no preferences")
        reference_M = None if self.reference is None else self.reference(batch)

        def sums(hidden_TH: Tensor, weight: VocabularyMatrix) -> Sums:
            hidden_MH = rows_of(hidden_TH, batch.target_rows)
            losses_M, entropies_M = weight.losses_and_entropies(hidden_MH, batch.targets)
            compared_M = -losses_M if reference_M is None else -losses_M - reference_M
            compared_A = sum_answers(compared_M, answers.lengths)
            chosen_P, rejected_P = answers.pairs.unbind(1)
            lengths = answers.lengths[chosen_P], answers.lengths[rejected_P]
            pairs = Pairs(compared_A[chosen_P], compared_A[rejected_P], *lengths)
            nll_P = sum_answers(losses_M, answers.lengths)[answers.pairs]
            result = {"loss": self.pair_loss(pairs).sum(), "entropy": entropies_M.sum()}
            if self.sft_weight:
                result["sft"] = nll_P[:, 0].sum()
            if reference_M is not None:
                # GRPO's estimator (arXiv:2402.03300, equation 4), of chosen answers alone: they are nearer to what the
                # policy writes, and it grows without bound where the policy leaves an answer
                away_M = -compared_M.detach()
                kl_A = sum_answers(away_M.expm1() - away_M, answers.lengths)
                result["kl"] = kl_A[answers.pairs[:, 0]].sum()
            return result | self._rewards(pairs) | dict(zip(("logps/chosen", "logps/rejected"), -nll_P.detach().sum(0)))

        return sums

    def _rewards(self, pairs: Pairs) -> Sums:
        compared = pairs.means() if self.of_means else (pairs.chosen_P, pairs.rejected_P)
        chosen_P, rejected_P = (self.beta * each.detach() for each in compared)
        return {
            "rewards/chosen": chosen_P.sum(),
            "rewards/rejected": rejected_P.sum(),
            "rewards/accuracies": (chosen_P > rejected_P).sum().to(chosen_P.dtype),
            "rewards/margins": (chosen_P - rejected_P).sum(),
        }

    def loss(self, sums: Mapping[str, Any], counts: Counts) -> Any:
        loss = sums["loss"] / counts["pairs"]
        return loss + self.sft_weight * sums["sft"] / counts["chosen tokens"] if self.sft_weight else loss

    def metrics(self, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        of_pairs = {name: sums[name] / counts["pairs"] for name in OF_PAIRS}
        return of_pairs | {name: sums[name] / counts[kind] for name, kind in OF_TOKENS.items() if name in sums}


def stored(batch: Batch) -> Tensor:
    """The log-probabilities under the reference that lie beside the rows (precompute.py)."""
    if batch.answers is None or batch.answers.reference is None:
        raise ValueError("the reference's log-probabilities are not in the batch")
    return batch.answers.reference


def preference(objective: str, settings: DPOConfig, reference: LogProbabilities | None) -> PairwisePreference:
    """The objective dpo, which takes the reference, orpo, simpo or cpo."""
    beta, smoothing, sft_weight = settings.beta, settings.label_smoothing, settings.sft_weight
    if objective == "dpo":
        loss = LOSSES[settings.loss]
        return PairwisePreference(lambda pairs: loss(pairs, beta, smoothing), reference, beta, False, sft_weight)
    if objective == "simpo":
        gamma = settings.gamma
        return PairwisePreference(lambda pairs: simpo(pairs, beta, smoothing, gamma), None, beta, True, sft_weight)
    if objective == "cpo":
        return PairwisePreference(lambda pairs: cpo(pairs, beta, smoothing), None, beta, False, 1.0)
    return PairwisePreference(lambda pairs: beta * orpo(pairs), None, beta, True, 1.0)
