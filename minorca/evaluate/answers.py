"""Requests that are answered once: by one rank, unless they are equal to another or the cache has them."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from minorca.errors import UserError
from minorca.evaluate.result_cache import ResultCache
from minorca.train.ranks import World

# numbers the times that this process has given its answers to other ranks, by any model
_exchanges = itertools.count()


class Answers:
    """Answers to requests, from the cache and from all ranks.

    Args:
        arithmetic: what answers' bits follow from beside the model and the request.
        cache: where answers are kept; None: nowhere.
        world: the ranks that share the requests; None: this process does all.
        no_progress: whether no progress is shown; None: unless standard error is no terminal.

    Raises:
        UserError: the ranks' arithmetic is not the same.
    """

    def __init__(
        self,
        arithmetic: dict[str, object],
        cache: ResultCache | None,
        world: World | None,
        no_progress: bool | None,
    ):
        self.cache = cache
        self.world = world if world and world.size > 1 else None
        self.no_progress = no_progress
        if self.world and (different := self.world.keys_that_differ(arithmetic)):
            mine = ", ".join(f"{key} {arithmetic[key]}" for key in different)
            raise UserError(f"ranks give other bits: rank {self.world.rank} has {mine}; start all of them alike")
        self._arithmetic = json.dumps(arithmetic, sort_keys=True).encode()

    def digest(self, kind: str, *ids: Sequence[int]) -> bytes:
        """A request by all that its answer follows from beside the model."""
        digest = hashlib.sha256(self._arithmetic + kind.encode())
        for part in ids:
            digest.update(len(part).to_bytes(8, "big") + np.array(part, np.int64).tobytes())
        return digest.digest()

    def __call__(
        self,
        what: str,
        digests: list[bytes],
        share: Callable[[list[int], int, int], list[int]],
        compute: Callable[[list[int]], Iterator[tuple[int, Any]]],
    ) -> list[Any]:
        """The answers to requests.

        Args:
            digests: of the requests; equal ones have one answer.
            share: (indices of requests, rank, ranks) -> those that the rank computes.
            compute: indices -> index and answer of each, as they are done.
        """
        first = {digest: index for index, digest in reversed(list(enumerate(digests)))}
        found = self._from_rank_0(lambda: self.cache.find(list(first)) if self.cache else {})
        missing = sorted(index for digest, index in first.items() if digest not in found)
        rank, size = (self.world.rank, self.world.size) if self.world else (0, 1)
        mine = share(missing, rank, size) if missing else []
        new = {}
        progress = tqdm(total=len(mine), desc=what, unit=" requests", leave=False, disable=self.no_progress)
        try:
            for index, answer in compute(mine) if mine else ():
                new[digests[index]] = answer
                if self.cache:
                    self.cache.add(digests[index], answer)
                progress.update()
        finally:
            progress.close()
            if self.cache:
                self.cache.write()
        found |= self._from_all_ranks(new)
        return [found[digest] for digest in digests]

    def _from_rank_0(self, read: Callable[[], dict]) -> dict:
        """What rank 0 reads: other ranks may read what yet others have written since."""
        if not self.world:
            return read()
        values = [read() if self.world.rank == 0 else None]
        dist.broadcast_object_list(values)
        return cast(dict, values[0])

    def _from_all_ranks(self, mine: dict) -> dict:
        if not self.world:
            return mine
        self.world.barrier_without_timeout(f"with answers {next(_exchanges)}")
        parts: list[dict] = [{}] * self.world.size
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}
