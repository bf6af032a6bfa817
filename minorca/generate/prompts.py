"""Which prompts' tokens are computed in a step."""

from collections.abc import Sequence as Sequences

from minorca.generate.cache_attention import BLOCK_PAGES
from minorca.generate.kv_cache import KVCache
from minorca.generate.on_device import row_multiple
from minorca.generate.request import Sequence
from minorca.model.architecture import Architecture

# The share of a step for the prompt that came first, so that it is not overtaken for ever; and of its tokens for each
# of the first and the shortest, whatever they cost.
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
    a short prompt waits for no long one. The first and the shortest come on by a quarter of the tokens in every step,
    whatever these cost. Of several that go on alike one goes first, and the others read from the cache what it has
    computed.

    Args:
        waiting: sequences with a prompt that is not computed yet, in their order of arrival; those that can, take over
            what the cache holds by now.
        budget: the number of tokens, where they see no others.
        cost: of a token for each that it sees, where it costs 1 itself; 0 where no answer waits for the step.
    """
    left = {sequence: _left(sequence, cache) for sequence in waiting}
    order = sorted(waiting, key=left.__getitem__)
    chosen: list[tuple[Sequence, int]] = []
    within = [sequence for sequence in waiting if cache.is_within_page(sequence.slot)]
    next_pages = {sequence: cache.next_page(sequence.slot, sequence.request.prompt) for sequence in waiting}
    computed = {next_pages[sequence] for sequence in within}
    kept = budget * FIRST_SHARE
    share = budget - kept
    tokens = budget
    for sequence in order:
        if sequence is waiting[0]:
            share, kept = share + kept, 0
        price = _price(sequence, cache, cost)
        count = share / price
        if sequence in (order[0], waiting[0]):
            count = max(count, budget * FIRST_SHARE, 1)
        count = min(tokens, left[sequence], int(count))
        if count < left[sequence]:
            count = _even(count, cache.lengths[sequence.slot], cache)
        page = next_pages[sequence]
        # The last token of a prompt is not in the cache, whoever else computes it.
        may_wait = left[sequence] > 1 and sequence not in within and sequence.request.reads_cache
        if count == 0 or (page in computed and may_wait and sequence is not waiting[0]):
            continue
        computed.add(page)
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


def _even(count: int, start: int, cache: KVCache) -> int:
    """At most `count` tokens from `start` on, which end where a block of queries or of rows does if possible."""
    block = BLOCK_PAGES * cache.tree.size
    unit = block if count >= block else row_multiple(cache.device)
    end = (start + count) // unit * unit
    return end - start if end > start else count
