"""Log-probabilities of a prompt's tokens, computed while the prompt is prefilled.

Axes in names: T tokens, H hidden, V vocabulary, K most likely ids.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from minorca.generate.on_device import row_multiple, to_host
from minorca_kernels import FrozenWeight

# Rows of which logits are computed at once: a whole chunk's would take more memory than its prefill.
ROWS = 256


class PromptScores:
    """The log-probabilities and ranks of a prompt's tokens after the first, and the most likely ids at their positions.

    Args:
        prompt_T: the prompt's ids, on the device.
        count: how many of the most likely ids to keep.
    """

    def __init__(self, prompt_T: Tensor, count: int):
        self._prompt_T = prompt_T
        self._count = count
        self._seen = 0
        # Of each block of rows, on the host: log-probabilities, ranks, and the most likely ids and theirs.
        self._blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def score(self, hidden_TH: Tensor, head: FrozenWeight) -> None:
        """Scores the ids that follow the prompt's next T ones, whose last hidden states these are."""
        for rows_TH in hidden_TH.split(ROWS):
            following_T = self._prompt_T[self._seen + 1 :][: len(rows_TH)]
            self._seen += len(rows_TH)
            if len(following_T):
                fill = -len(rows_TH) % row_multiple(rows_TH.device)
                logits_TV = head.linear(F.pad(rows_TH, (0, 0, 0, fill)))[: len(following_T)]
                self._add(logits_TV.float().log_softmax(-1), following_T)

    def _add(self, logprobs_TV: Tensor, ids_T: Tensor) -> None:
        own_T1 = logprobs_TV.gather(-1, ids_T[:, None])
        rank_T = 1 + (logprobs_TV > own_T1).sum(-1)
        top_TK, ids_TK = logprobs_TV.topk(self._count)
        self._blocks.append((to_host(own_T1[:, 0]), to_host(rank_T), to_host(ids_TK), to_host(top_TK)))

    def rows(self) -> Iterator[tuple[float, int, list[tuple[int, float]]]]:
        """Each token's log-probability, rank and (id, log-probability) of the most likely ids, once they are copied."""
        for block in self._blocks:
            for logprob, rank, ids, values in zip(*(t.tolist() for t in block)):
                yield logprob, rank, list(zip(ids, values))
