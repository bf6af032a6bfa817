"""KTO as an objective: answers that are labelled desirable or undesirable, each on its own (arXiv:2402.01306).

The loss weighs an answer's log-ratio against z0, how far the policy is from the reference on the step's prompts. As the
paper does, z0 is estimated by answers to other prompts: each row's answers after the prompt of the row that follows it
in the step, so that neither ranks nor micro-batches change it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minorca.config import DPOConfig
from minorca.data.packing import Batch, make_batch
from minorca.data.store import TokenStore
from minorca.model.vocabulary import VocabularyMatrix
from minorca.train.objectives import Counts, Head, Objective, Sums
from minorca.train.preference import kto
from minorca.train.preference_objective import rows_of, sum_answers
from minorca.train.ranks import World
from minorca.train.reference import Reference


class KTO(Objective):
    """The mean over answers of their losses.

    Args:
        reference: what log-ratios are taken to.
        capacity: at most so many tokens, or one row, are in a micro-batch that estimates z0.
    """

    def __init__(self, settings: DPOConfig, reference: Reference, capacity: int):
        self.settings = settings
        self.reference = reference
        self.policy = Reference(reference.model, [])
        self.capacity = capacity
        self.kl = 0.0

    def prepare(self, store: TokenStore, rows: np.ndarray, world: World) -> None:
        """Estimates z0; 0 for a single row, which has no other's answers."""
        self.kl = 0.0
        if len(rows) < 2:
            return
        batches = mismatched_batches(store, rows, self.capacity)
        total = torch.zeros((), device=world.device)
        for first in range(0, len(batches), world.size):
            index = first + world.rank
            # every rank takes part in all collectives
            batch = batches[index] if index < len(batches) else batches[-1].without_targets()
            batch = batch.to(world.device)
            total += (self.policy.of(batch) - self.reference.of(batch)).sum()
        (whole,) = world.sum([total.item()])
        mean = whole / int(store.branch_counts[rows].sum())
        # a NaN stays one
        self.kl = 0.0 if mean < 0 else mean

    def counts(self, store: TokenStore, rows: np.ndarray) -> Counts:
        scores = np.concatenate([store.branches(row)[1] for row in rows])
        desirable = int((scores > 0).sum())
        tokens = int(store.trained_counts[rows].sum())
        return {"answers": len(scores), "chosen": desirable, "rejected": len(scores) - desirable, "tokens": tokens}

    def head(self, batch: Batch) -> Head:
        answers = batch.answers
        if answers is None:
            raise ValueError("a batch without answers has no labels")
        reference_M, settings = self.reference.of(batch), self.settings
        is_desirable_A = answers.scores > 0

        def sums(hidden_TH: Tensor, weight: VocabularyMatrix) -> Sums:
            losses_M, entropies_M = weight.losses_and_entropies(rows_of(hidden_TH, batch.target_rows), batch.targets)
            ratios_A = sum_answers(-losses_M - reference_M, answers.lengths)
            kl = ratios_A.new_tensor(self.kl)
            weights = settings.desirable_weight, settings.undesirable_weight
            losses_A = kto(ratios_A, is_desirable_A, kl, settings.beta, *weights)
            logps_A = -sum_answers(losses_M.detach(), answers.lengths)
            rewards_A = settings.beta * ratios_A.detach()
            result = {"loss": losses_A.sum(), "entropy": entropies_M.sum()}
            for name, of_kind_A in (("chosen", is_desirable_A), ("rejected", ~is_desirable_A)):
                result |= {f"rewards/{name}": rewards_A.where(of_kind_A, 0).sum()}
                result |= {f"logps/{name}": logps_A.where(of_kind_A, 0).sum()}
            return result

        return sums

    def loss(self, sums: Mapping[str, Any], counts: Counts) -> Any:
        return sums["loss"] / counts["answers"]

    def metrics(self, sums: Mapping[str, float], counts: Counts) -> dict[str, float]:
        of_kinds = {
            f"{metric}/{kind}": sums[f"{metric}/{kind}"] / (counts[kind] or math.nan)
            for metric in ("rewards", "logps")
            for kind in ("chosen", "rejected")
        }
        margin = of_kinds["rewards/chosen"] - of_kinds["rewards/rejected"]
        return of_kinds | {"rewards/margins": margin, "kl": self.kl, "entropy": sums["entropy"] / counts["tokens"]}


def mismatched_batches(store: TokenStore, rows: np.ndarray, capacity: int) -> list[Batch]:
    """Micro-batches in which each row's prompt has the answers of the row before it, the first one's those of the last.

    capacity: tokens of a micro-batch; a longer row, of up to twice `data.seq_len`, has one of its own.
    """
    rendered = [(*store.row(row), *store.branches(row)) for row in rows]
    tokens, trained, starts, scores = [], [], [], []
    for (ids, mask, begins, _), (others, mask_of_others, begins_of_others, scores_of_others) in zip(
        rendered, [rendered[-1], *rendered[:-1]]
    ):
        prompt, first = begins[0], begins_of_others[0]
        tokens.append(np.concatenate([ids[:prompt], others[first:]]))
        trained.append(np.concatenate([mask[:prompt], mask_of_others[first:]]))
        starts.append(begins_of_others - first + prompt)
        scores.append(scores_of_others)
    mismatched = TokenStore(
        np.concatenate(tokens),
        np.concatenate(trained),
        np.cumsum([0, *map(len, tokens)]),
        branch_offsets=np.cumsum([0, *map(len, starts)]),
        branch_starts=np.concatenate(starts),
        branch_scores=np.concatenate(scores),
    )
    groups: list[list[int]] = [[]]
    for row, length in enumerate(mismatched.lengths):
        if groups[-1] and mismatched.lengths[groups[-1]].sum() + length > capacity:
            groups.append([])
        groups[-1].append(row)
    return [make_batch(mismatched, np.array(group)) for group in groups]
