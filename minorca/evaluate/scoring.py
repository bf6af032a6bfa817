"""Log-probabilities of continuations: shared beginnings are computed once, and the bits depend on the request alone.

The requests' ids form a trie. Its nodes are computed depth first, in forwards of one size, the last of which is filled
up: every matrix product has one shape, in which a row's result depends on the row alone. The keys and values of the
path to the last node stay, and attention (tiled_attention.py) takes them in tiles at fixed depths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import minorca
from minorca.evaluate.tiled_attention import Chunk, PathKeys, TiledAttention, Tiles
from minorca.model.network import Mistral
from minorca_kernels import FrozenWeight
from minorca_kernels.operator import accumulate_dtype


class Sizes(NamedTuple):
    """Of all matrix products: nodes of a forward, rows of a product with the head, and attention's tiles."""

    nodes: int
    head_rows: int
    tiles: Tiles


# a GPU takes as long to start a product as to compute a large one
SIZES = {"cpu": Sizes(512, 64, Tiles(16, 64, 8)), "cuda": Sizes(2048, 512, Tiles(16, 128, 128))}

# ids of a context and of its continuation
Request = tuple[Sequence[int], Sequence[int]]


class Scored(NamedTuple):
    """A continuation's score.

    Attributes:
        logp: the sum of its tokens' natural log-probabilities, in fp64; each is computed in fp32 (fp64 for fp64).
        is_greedy: whether each of its tokens is the likeliest.
    """

    logp: float
    is_greedy: bool


@dataclass
class Trie:
    """Requests as nodes in depth-first order; a node is a token with all before it.

    Attributes:
        tokens, depths: [N] int64, of each node.
        targets: [M, 3] int64, by node: the node, the token whose log-probability there is asked for, and where it goes
            among the continuations' tokens, laid end to end in the order of the requests.
        order: the requests in the order in which they are finished.
        ends: [R] how many nodes must be computed before the request at each place of `order` is finished.
    """

    tokens: np.ndarray
    depths: np.ndarray
    targets: np.ndarray
    order: list[int]
    ends: list[int]


def build_trie(requests: Sequence[Request]) -> Trie:
    """Raises ValueError: an empty context or continuation."""
    inputs = []
    for context, continuation in requests:
        if not len(context) or not len(continuation):
            raise ValueError("a context and its continuation need at least a token each")
        inputs.append(np.array([*context, *continuation[:-1]], np.int64))
    starts = np.cumsum([0, *(len(continuation) for _, continuation in requests)])
    # as bytes, which compare like their ids and take little memory
    order = sorted(range(len(requests)), key=lambda index: inputs[index].astype(">i8").tobytes())
    tokens, depths, targets, ends = [], [], [], []
    path = np.empty(0, np.int64)
    before = np.empty(0, np.int64)
    count = 0
    for index in order:
        ids = inputs[index]
        shared = _common_length(before, ids)
        new = len(ids) - shared
        tokens.append(ids[shared:])
        depths.append(np.arange(shared, len(ids)))
        path = np.concatenate([path[:shared], np.arange(count, count + new)])
        count += new
        context, continuation = requests[index]
        nodes = path[len(context) - 1 :]
        places = np.arange(starts[index], starts[index + 1])
        targets.append(np.stack([nodes, np.array(continuation, np.int64), places], 1))
        ends.append(count)
        before = ids
    by_node = np.concatenate([np.empty((0, 3), np.int64), *targets])
    by_node = by_node[by_node[:, 0].argsort(kind="stable")]
    empty = np.empty(0, np.int64)
    return Trie(np.concatenate([empty, *tokens]), np.concatenate([empty, *depths]), by_node, order, ends)


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


class Scorer:
    """Scores continuations by a model, which must be in evaluation mode.

    Args:
        sizes: what bits depend on; None: what suits the device.

    Attributes:
        computed: the tokens that went through the model so far.
    """

    def __init__(self, model: Mistral, sizes: Sizes | None = None):
        self.model = model
        self.device = model.embedding.weight.device
        self.sizes = sizes or SIZES[self.device.type]
        self.computed = 0

    def arithmetic(self) -> dict[str, object]:
        """All that bits follow from beside the model, its adapter and a request's ids."""
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        else:
            device = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        versions = {"minorca": minorca.__version__, "torch": torch.__version__}
        weights = sorted({projection.base.kind for _, projection in self.model.projections()})
        return versions | {"device": device, "dtype": str(self.model.dtype), "weights": weights, "sizes": [*self.sizes]}

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Of each request, a context and its continuation, both of one id at least."""
        return [scored for _, scored in sorted(self.stream(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scored]]:
        """The index and the score of each request, as they are finished."""
        for index, logps, is_likeliest in self._values(build_trie(requests), requests):
            yield index, Scored(float(logps.sum()), bool(is_likeliest.all()))

    def token_logps(self, ids: Sequence[int]) -> np.ndarray:
        """Of each token after the first of a sequence [n], its natural log-probability [n - 1]."""
        request = ids[:1], ids[1:]
        ((_, logps, _),) = self._values(build_trie([request]), [request])
        return logps

    # not inference_mode, which a sharded model cannot compute in
    @torch.no_grad()
    def _values(self, trie: Trie, requests: Sequence[Request]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each request, as it is finished: its index, its tokens' log-probabilities, and whether each token is the
        likeliest.
        """
        self.computed += len(trie.tokens)
        arch = self.model.arch
        longest = int(trie.depths.max(initial=0)) + 1
        size = self.sizes.nodes
        keys = PathKeys(arch.layers, longest + size, arch.kv_heads, arch.head_dim, self.model.dtype, self.device)
        starts = np.cumsum([0, *(len(continuation) for _, continuation in requests)])
        logps, is_likeliest = np.empty(starts[-1]), np.empty(starts[-1], bool)
        finished = 0
        for start, chunk in plan_chunks(trie.depths, size, self.sizes.tiles):
            stop = min(start + size, len(trie.tokens))
            tokens = np.zeros(size, np.int64)
            tokens[: stop - start] = trie.tokens[start:stop]
            first, last = np.searchsorted(trie.targets[:, 0], (start, stop))
            nodes, targets, places = trie.targets[first:last].T

            def head(hidden_TH: Tensor, weight: FrozenWeight, rows=nodes - start, targets=targets) -> tuple:
                return self._head(hidden_TH, weight, rows, targets)

            attend = TiledAttention(chunk, keys, arch.window)
            logps[places], is_likeliest[places] = self.model(
                torch.from_numpy(tokens).to(self.device), attend=attend, head=head
            )
            while finished < len(trie.order) and trie.ends[finished] <= stop:
                index = trie.order[finished]
                span = slice(starts[index], starts[index + 1])
                yield index, logps[span], is_likeliest[span]
                finished += 1

    def _head(
        self, hidden_TH: Tensor, weight: FrozenWeight, rows: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of targets [M] at rows [M], in order: their log-probabilities, and whether each is the likeliest."""
        unique, places = np.unique(rows, return_inverse=True)
        logps, likeliest = [np.empty(0)], [np.empty(0, np.int64)]
        for start in range(0, len(unique), self.sizes.head_rows):
            stop = start + self.sizes.head_rows
            taken = np.zeros(self.sizes.head_rows, np.int64)
            taken[: len(unique[start:stop])] = unique[start:stop]
            logits_RV = weight.linear(hidden_TH[torch.from_numpy(taken).to(hidden_TH.device)])
            logits_RV = logits_RV.to(accumulate_dtype(logits_RV.dtype))
            of_rows = (places >= start) & (places < stop)
            row, target = (
                torch.from_numpy(values).to(hidden_TH.device) for values in (places[of_rows] - start, targets[of_rows])
            )
            logps.append((logits_RV[row, target] - logits_RV.logsumexp(1)[row]).cpu().numpy())
            likeliest.append(logits_RV.argmax(1)[row].cpu().numpy())
        return np.concatenate(logps), np.concatenate(likeliest) == targets


def plan_chunks(depths: np.ndarray, size: int, tiles: Tiles) -> Iterator[tuple[int, Chunk]]:
    """Chunks of at most `size` nodes of a trie, each with its first node; depths [N] are in depth-first order."""
    # where the path's keys lie, by depth
    slots = np.arange(int(depths.max(initial=0)) + 1)
    slot = 0
    for start in range(0, len(depths), size):
        of_chunk = depths[start : start + size]
        rows, paths = [], []
        edges = [0, *(np.flatnonzero(np.diff(of_chunk) != 1) + 1).tolist(), len(of_chunk)]
        for begin, end in zip(edges, edges[1:]):
            slots[of_chunk[begin] : of_chunk[begin] + end - begin] = np.arange(slot + begin, slot + end)
            for first in range(begin, end, tiles.queries):
                nodes = np.arange(first, min(first + tiles.queries, end))
                rows.append(np.concatenate([nodes, np.full(tiles.queries - len(nodes), -1)]))
                paths.append(slots[: of_chunk[nodes[-1]] + 1].copy())
        path = slots[: of_chunk[-1] + 1]
        first_kept = int(np.argmax(path >= slot)) if slot else 0
        padded = np.concatenate([of_chunk, np.zeros(size - len(of_chunk), np.int64)])
        yield start, Chunk(padded, tiles, np.array(rows), paths, path[first_kept:].copy(), first_kept, slot)
        slot = len(path)
        slots[:slot] = np.arange(slot)
