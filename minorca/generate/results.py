"""Sampled tokens on their way from the device to the host.

Axes in names: N rows of the tensors, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minorca.generate.on_device import to_host
from minorca.generate.request import PromptToken, Sequence, Token


class PendingTokens:
    """The tokens sampled by one prefill or decoding step.

    On CUDA the copies to the host are asynchronous, so that the next step can be launched before `wait`.

    Args:
        rows: the rows of the tensors that belong to a sequence.
        ids_N: the sampled ids, [N] int64.
        logits_NV: what they were sampled from, [N, V].
    """

    def __init__(self, rows: list[tuple[int, Sequence]], ids_N: Tensor, logits_NV: Tensor):
        self._rows = rows
        self._logprobs: Tensor | None = None
        self._top: tuple[Tensor, Tensor] | None = None
        self._copied: torch.cuda.Event | None = None
        counts = [sequence.request.logprobs for _, sequence in rows if sequence.request.logprobs is not None]
        if counts:
            logprobs_NV = logits_NV.float().log_softmax(-1)
            self._logprobs = to_host(logprobs_NV.gather(-1, ids_N[:, None])[:, 0])
            values, indices = logprobs_NV.topk(max(counts))
            self._top = to_host(values), to_host(indices)
        self._ids = to_host(ids_N)
        if ids_N.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Iterator[tuple[Sequence, Token]]:
        """Waits for the copies; yields each sequence with its token, whose finish reason is not known yet."""
        if self._copied:
            self._copied.synchronize()
        ids = self._ids.tolist()
        for row, sequence in self._rows:
            request = sequence.request
            logprob, top = self._scores(row, request.logprobs)
            prompt = None
            if sequence.prompt_scores:
                prompt = [PromptToken(*scores) for scores in sequence.prompt_scores.rows()]
                sequence.prompt_scores = None
            yield sequence, Token(request, ids[row] if request.max_new_tokens else -1, logprob, top, None, prompt)

    def _scores(self, row: int, count: int | None) -> tuple[float | None, list[tuple[int, float]] | None]:
        if count is None or self._logprobs is None or self._top is None:
            return None, None
        values, indices = (t[row, :count].tolist() for t in self._top)
        return self._logprobs[row].item(), list(zip(indices, values))
