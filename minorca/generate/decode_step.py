"""One decoding step of the whole batch, captured as CUDA graphs.

Axes in names: N slots of the batch, H hidden, V vocabulary.
"""

import logging

import torch
from torch import Tensor

from minorca.errors import one_line
from minorca.generate.kv_cache import KVCache
from minorca.generate.sampling import Sampler, SamplingOps
from minorca.model.lora import AdapterChoice
from minorca.model.network import Mistral
from minorca_kernels import DenseWeight, FrozenWeight, is_sharded
from minorca_kernels.draw import ALIGNMENT
from minorca_kernels.operator import uses_triton

log = logging.getLogger(__name__)


class DecodeStep:
    """From the last token of every slot to its next one.

    A step, sampling included, runs on the device alone. On CUDA its first run is eager, because kernels are compiled
    and chosen then; later ones replay a CUDA graph. There is one graph for each set of sampling operations, with and
    without adapters. If one cannot be captured, all further steps are eager.

    `tokens_N` holds the last token of each slot.
    """

    def __init__(self, model: Mistral, cache: KVCache, sampler: Sampler, adapters: AdapterChoice):
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._adapters = adapters
        self.tokens_N = torch.zeros(len(cache.lengths), dtype=torch.int64, device=cache.device)
        # the collectives of a sharded model are not captured
        self._uses_graphs = cache.device.type == "cuda" and not is_sharded(model.embedding.weight)
        self._warmed_up: set[tuple[SamplingOps, bool]] = set()
        self._graphs: dict[tuple[SamplingOps, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self) -> Tensor:
        """Advances every active slot by one token, after `KVCache.advance` and `AdapterChoice.choose`.

        Returns:
            The logits [N, V], valid until the next call; rows of inactive slots are meaningless.
        """
        ops = self._sampler.ops(slice(None))
        if not self._uses_graphs:
            return self._compute(ops)
        key = (ops, self._adapters.in_use)
        if key not in self._warmed_up:
            self._warmed_up.add(key)
            return self._compute(ops)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(ops)
            # CUDA or torch refuses an operation, or memory runs out. Nothing was computed yet.
            except RuntimeError as error:
                self._uses_graphs = False
                self._graphs.clear()
                log.warning(
                    "decoding is slower, without CUDA graphs: a step cannot be captured (%s)", one_line(str(error))
                )
                return self._compute(ops)
        graph, logits_NV = self._graphs[key]
        graph.replay()
        return logits_NV

    def reset_graphs(self) -> None:
        """Captures steps with adapters anew, after the model's adapters have changed."""
        self._warmed_up = {key for key in self._warmed_up if not key[1]}
        self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}

    def _capture(self, ops: SamplingOps) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Capturing that fails leaves its own stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream(self._cache.device)), torch.cuda.graph(graph):
            logits_NV = self._compute(ops)
        return graph, logits_NV

    def _compute(self, ops: SamplingOps) -> Tensor:
        logits_NV = self._model(self.tokens_N, attend=self._cache.decode(), head=_aligned_logits)
        self.tokens_N.copy_(self._sampler(logits_NV, self._cache.lengths_N, slice(None), ops))
        return logits_NV


def _aligned_logits(hidden_NH: Tensor, head: FrozenWeight) -> Tensor:
    """Logits [N, V], where Triton reads them as a view of a buffer whose rows are aligned."""
    padding = -head.out_features % ALIGNMENT
    if not (padding and uses_triton(hidden_NH) and isinstance(head, DenseWeight)):
        return head.linear(hidden_NH)
    logits_NV = hidden_NH.new_empty(len(hidden_NH), head.out_features + padding)[:, : head.out_features]
    return torch.mm(hidden_NH, head.weight.t(), out=logits_NV)
