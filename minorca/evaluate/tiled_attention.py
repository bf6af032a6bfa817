"""Attention of a chunk of a trie's nodes to their ancestors, to the same bits whatever else is in the chunk.

Queries are taken in tiles, keys in tiles at fixed depths, and every product has one shape. A query's result is a
function of itself and of its ancestors' keys and values: tiles that it does not see change no bit of it.
Axes: T nodes of the chunk, B tiles a product, Q queries and S keys of a tile, H heads, K key heads, G heads a key head,
D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minorca_kernels import rope, rope_tables
from minorca_kernels.operator import accumulate_dtype

# below every score; finite, so that a difference of two is a number
LOWEST = -1e30


class Tiles(NamedTuple):
    """Of attention's products: queries and keys of a tile, and how many tiles a product has."""

    queries: int
    keys: int
    count: int


@dataclass
class Chunk:
    """What a chunk's nodes see.

    Attributes:
        depths: [T] of each node; 0 of what fills the chunk up.
        tiles: their sizes.
        rows: [N, Q] the nodes that are each tile's queries, all on one path; -1 where there is none.
        paths: for each tile, the slots of the path's keys, by depth.
        kept: the slots of the last node's ancestors and itself that are new, by depth.
        first_kept: the depth of the first of them.
        slot: that of the chunk's first node; the others' follow. Before it lie the path's older keys, by depth.
    """

    depths: np.ndarray
    tiles: Tiles
    rows: np.ndarray
    paths: list[np.ndarray]
    kept: np.ndarray
    first_kept: int
    slot: int


class PathKeys:
    """Keys and values of the path from the root to the last node, by depth, and of a chunk behind them."""

    def __init__(self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        # heads before slots, so that a tile of each head is one piece of memory
        shape = (layers, 2, kv_heads, slots, head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)


class TiledAttention:
    """What computes attention in a forward over a chunk; see `Mistral.forward`."""

    def __init__(self, chunk: Chunk, keys: PathKeys, window: int | None):
        device = keys.buffer.device
        self.chunk = chunk
        self.keys = keys
        self.positions = torch.from_numpy(chunk.depths).to(device)
        self.kept = torch.from_numpy(chunk.kept).to(device)
        self.groups = list(_groups(chunk, window, device))

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin of the nodes' depths, each [T, D/2]."""
        return rope_tables(self.positions, head_dim, theta)

    def of_qkv(self, layer: int, qkv_TN: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """A chunk's queries, keys and values before rotation -> what each query attends to [T, H, D]."""
        q_THD, k_TKD, v_TKD = rope(qkv_TN, cos_TP, sin_TP, heads, kv_heads)
        keys, values = self.keys.buffer[layer]
        slot, count = self.chunk.slot, len(k_TKD)
        keys[:, slot : slot + count], values[:, slot : slot + count] = k_TKD.transpose(0, 1), v_TKD.transpose(0, 1)
        out_THD = torch.zeros_like(q_THD)
        for group in self.groups:
            out_THD[group.nodes] = group.attend(q_THD, keys, values)
        first = self.chunk.first_kept
        for stored in (keys, values):
            stored[:, first : first + len(self.kept)] = stored[:, self.kept]
        return out_THD


@dataclass
class _Group:
    """Tiles whose products are computed together.

    Attributes:
        tiles: their sizes.
        rows: [B * Q] the queries' nodes; the first where there is none.
        is_query: [B * Q] where there is one.
        nodes: [M] the nodes that are queries.
        slots: [steps, B * S] of the keys of each step.
        hidden: [steps, B, 1, Q, S] which of them each query does not see.
    """

    tiles: Tiles
    rows: Tensor
    is_query: Tensor
    nodes: Tensor
    slots: Tensor
    hidden: Tensor

    def attend(self, q_THD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The queries' results [M, H, D], in their dtype; keys and values [K, slots, D]."""
        heads, size = q_THD.shape[1:]
        kv_heads = len(keys)
        queries, width, count = self.tiles
        dtype = accumulate_dtype(q_THD.dtype)
        scaled = q_THD[self.rows].to(dtype) * size**-0.5
        # [K * B, G * Q, D]
        q = scaled.view(count, queries, kv_heads, -1, size).permute(2, 0, 3, 1, 4).reshape(kv_heads * count, -1, size)
        top = q.new_full((*q.shape[:2], 1), LOWEST)
        total = torch.zeros_like(top)
        out = torch.zeros_like(q)
        for slots, hidden in zip(self.slots, self.hidden):
            k, v = (stored.index_select(1, slots).view(-1, width, size).to(dtype) for stored in (keys, values))
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(kv_heads, count, -1, queries, width).masked_fill_(hidden, -torch.inf)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(higher).exp_()
            shrink = top.sub_(higher).exp_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            out.mul_(shrink).baddbmm_(weights, v)
            top = higher
        out.div_(total)
        out = out.view(kv_heads, count, -1, queries, size).permute(1, 3, 0, 2, 4).reshape(-1, heads, size)
        return out[self.is_query].to(q_THD.dtype)


def _groups(chunk: Chunk, window: int | None, device: torch.device) -> Iterator[_Group]:
    """The chunk's tiles in groups of one product each, those with paths of similar length together."""
    queries, width, count = chunk.tiles
    order = sorted(range(len(chunk.paths)), key=lambda tile: -len(chunk.paths[tile]))
    for start in range(0, len(order), count):
        members = order[start : start + count]
        steps = -(-len(chunk.paths[members[0]]) // width)
        rows = np.full((count, queries), -1)
        slots = np.zeros((count, steps * width), np.int64)
        for place, tile in enumerate(members):
            rows[place] = chunk.rows[tile]
            slots[place, : len(chunk.paths[tile])] = chunk.paths[tile]
        is_query = rows >= 0
        depth = np.where(is_query, chunk.depths[rows], 0)[..., None]
        key = np.arange(steps * width)
        sees = key <= depth
        first = 0
        if window is not None:
            sees &= depth - key < window
            # what comes before sees nothing in it, and would change nothing
            first = max(0, int(depth[is_query].min()) - window + 1) // width
        # where there is no query, a key is seen, so that no sum is 0
        sees[~is_query, first * width] = True
        by_step = ~sees.reshape(count, queries, steps, width).transpose(2, 0, 1, 3)[first:, :, None]
        of_step = slots.reshape(count, steps, width).transpose(1, 0, 2).reshape(steps, -1)[first:]
        arrays = rows.clip(min=0).flatten(), is_query.flatten(), rows[is_query], of_step, by_step
        tensors = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
        yield _Group(chunk.tiles, *tensors)
