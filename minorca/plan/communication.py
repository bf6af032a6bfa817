"""What collectives cost on 1 to thousands of GPUs: assumptions, not measurements.

Nodes have eight GPUs, joined by NVLink or PCI Express, and an adapter of 400 Gb/s for each GPU; both reach 80% of what
their data sheets say. A ring moves (n - 1) / n of a tensor past every GPU, twice in an all-reduce, and between nodes
all eight adapters work. A gather or scatter passes n - 1 GPUs one after the other, an all-reduce a tree of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minorca.plan.devices import Machine

NODE = 8
ADAPTER = 400e9 / 8
REACHED = 0.8
# seconds from one GPU to the next, within a node and between two
HOP, NETWORK_HOP = 1e-6, 5e-6


@dataclass(frozen=True)
class Collective:
    """Communications of one kind.

    Attributes:
        kind: "all-gather", "reduce-scatter" or "all-reduce".
        phase: of the step.
        count: how many there are.
        bytes: of their whole tensors together: what a gather returns, what a scatter is given.
    """

    kind: str
    phase: str
    count: int
    bytes: int


def communication_seconds(collectives: Iterable[Collective], device: Machine, ranks: int, replicate: int = 1) -> float:
    """Of collectives one after the other, on so many ranks, which shard in each of `replicate` groups of neighbours."""
    nodes = math.ceil(ranks / NODE)
    seconds = 0.0
    for collective in collectives:
        if collective.kind != "all-reduce":
            group = ranks // replicate
            seconds += _seconds(collective, device, group, math.ceil(group / NODE))
        elif replicate > 1:
            seconds += _seconds(collective, device, replicate, min(nodes, replicate))
        else:
            seconds += _seconds(collective, device, ranks, nodes)
    return seconds


def _seconds(collective: Collective, device: Machine, ranks: int, nodes: int) -> float:
    if ranks == 1:
        return 0.0
    rate = REACHED * (min(device.link, NODE * ADAPTER) if nodes > 1 else device.link)
    moved = collective.bytes * (ranks - 1) / ranks
    if collective.kind == "all-reduce":
        moved *= 2
        wait = 2 * math.ceil(math.log2(ranks)) * (NETWORK_HOP if nodes > 1 else HOP)
    else:
        wait = (ranks - nodes) * HOP + (nodes * NETWORK_HOP if nodes > 1 else 0)
    return moved / rate + collective.count * wait
