"""Which prompts' tokens are computed in a step."""

from collections.abc import Sequence as Sequences

from minorca.generate.cache_attention import BLOCK_PAGES
from minorca.generate.kv_cache import KVCache
from minorca.generate.request import Sequence
from minorca.model.architecture import Architecture

# The share of a step for the prompt that came first, so that it is not overtaken for ever.
FIRST_SHARE = 1 / 4
# How much longer attention takes for its arithmetic than the products with weights, by type of device: measured with
# torch's flash kernel on 2 cores, 9 heads of 64 and 32 of 128; assumed for GPUs.
ATTENTION_COST = {"cpu": 4, "cuda": 1}


def key_cost(arch: Architecture, device_type: str) -> float:
    """What a token costs for each key that it sees, as a share of its products with weights."""
    attention = 4 * arch.heads * arch.head_dim
    projections = 2 * arch.hidden_size * arch.head_dim * (arch.heads + arch.kv_heads)
    products = 2 * (projections + 3 * arch.hidden_size * arch.intermediate_size)
    return ATTENTION_COST[device_type] * attention / products


def choose_chunks(waiting: Sequences[Sequence], cache: KVCache, budget: int, cost: float) -> list[tuple[Sequence, int]]:
    """The sequences whose next tokens are computed in a step, and how many of each.

    A quarter of the step is for the prompt that came first; the rest goes to those with the fewest tokens left, so that
    a short prompt waits for no long one. The first and the shortest come on by up to a page in every step, whatever it
    costs. Of several that go on alike one goes first, and the others read of the cache what it has computed.

    Args:
        waiting: sequences with a prompt that is not computed yet, in their order of arrival; those that can, take over
            what the cache holds by now.
        budget: the number of tokens, where they see no others.
        cost: of a token for each that it sees, where it costs 1 itself; 0 where no answer waits for the step.
    """
    left = {sequence: _left(sequence, cache) for sequence in waiting}
    order = sorted(waiting, key=left.__getitem__)
    chosen: list[tuple[Sequence, int]] = []
    pages: set[tuple] = set()
    kept = budget * FIRST_SHARE
    share = budget - kept
    tokens = budget
    for sequence in order:
        if sequence is waiting[0]:
            share, kept = share + kept, 0
        is_sure = sequence in (order[0], waiting[0])
        price = _price(sequence, cache, cost)
        count = min(tokens, _affordable(sequence, cache, left[sequence], share / price, is_sure, budget))
        # the last token of a prompt is not in the cache, whoever else computes it
        if count == 0 or (left[sequence] > 1 and not _is_first(sequence, cache, pages)):
            continue
        if sequence.request.reads_cache:
            length = cache.extend_by_part(sequence.slot, sequence.request.prompt)
            count = min(count, len(sequence.request.prompt) - length)
        chosen.append((sequence, count))
        tokens -= count
        share = max(0, share - count * price)
    return chosen


def _left(sequence: Sequence, cache: KVCache) -> int:
    """The number of a prompt's tokens that the cache does not hold."""
    prompt = sequence.request.prompt
    if sequence.request.reads_cache:
        return cache.extend(sequence.slot, prompt)
    return len(prompt) - cache.lengths[sequence.slot]


def _price(sequence: Sequence, cache: KVCache, cost: float) -> float:
    seen = cache.lengths[sequence.slot]
    return 1 + cost * (seen if cache.window is None else min(seen, cache.window))


def _affordable(sequence: Sequence, cache: KVCache, left: int, count: float, is_sure: bool, budget: int) -> int:
    """At most `count` tokens, or the rest of a page if it `is_sure`."""
    size = cache.tree.size
    start = cache.lengths[sequence.slot]
    affordable = min(left, int(count))
    # Budgets below two pages do not have one for each of two that are sure.
    if budget < 2 * size:
        return max(affordable, 1) if is_sure else affordable
    if affordable < left:
        # up to the end of a block of queries if possible, or else of a page
        ends = [(start + affordable) // unit * unit for unit in (BLOCK_PAGES * size, size)]
        affordable = max(0, next((end for end in ends if end > start), start) - start)
    return max(affordable, min(left, size - start % size)) if is_sure else affordable


def _is_first(sequence: Sequence, cache: KVCache, pages: set[tuple]) -> bool:
    """Whether no other sequence of this step computes the same page, which this one could then read."""
    request = sequence.request
    page = cache.next_page(sequence.slot, request.prompt)
    if page is None or not request.reads_cache:
        return True
    is_first = page not in pages
    pages.add(page)
    return is_first
