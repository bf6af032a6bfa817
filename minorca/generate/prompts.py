"""Which prompts' tokens are computed in a step."""

from collections.abc import Sequence as Sequences

from minorca.generate.kv_cache import KVCache
from minorca.generate.request import Sequence

# The share of a step's tokens that the prompt which came first may take, so that it is never overtaken for ever.
FIRST_SHARE = 1 / 4


def choose_chunks(waiting: Sequences[Sequence], cache: KVCache, budget: int) -> list[tuple[Sequence, int]]:
    """The sequences whose next tokens are computed in a step, and how many of each.

    A quarter of the tokens is for the prompt that came first; the others go to those with the fewest tokens left, so
    that a short prompt waits for no long one. Of several that go on alike one goes first, and the others read of the
    cache what it has computed.

    Args:
        waiting: sequences with a prompt that is not computed yet, in their order of arrival; those that can, take over
            what the cache holds by now.
        budget: the maximum number of tokens.
    """
    left = {}
    for sequence in waiting:
        request = sequence.request
        # scores need the hidden states of every token
        reads = request.prompt_logprobs is None
        length = cache.extend(sequence.slot, request.prompt) if reads else cache.lengths[sequence.slot]
        left[sequence] = len(request.prompt) - length
    chosen: dict[Sequence, int] = {}
    beginnings: set[tuple] = set()
    turns = [(sequence, int(budget * FIRST_SHARE)) for sequence in waiting[:1]]
    turns += [(sequence, budget) for sequence in sorted(waiting, key=left.__getitem__)]
    for sequence, most in turns:
        count = min(left[sequence] - chosen.get(sequence, 0), most, budget)
        if count <= 0:
            continue
        # the last token is not in the cache, whoever else computes it
        if sequence in chosen or left[sequence] == 1 or _is_first(sequence, cache, beginnings):
            chosen[sequence] = chosen.get(sequence, 0) + count
            budget -= count
    return list(chosen.items())


def _is_first(sequence: Sequence, cache: KVCache, beginnings: set[tuple]) -> bool:
    """Whether no other sequence of this step computes tokens of the same page."""
    request = sequence.request
    if request.prompt_logprobs is not None:
        return True
    size = cache.tree.size
    start = cache.lengths[sequence.slot] // size * size
    beginning = (request.adapter, start, *request.prompt[start : start + size])
    is_first = beginning not in beginnings
    beginnings.add(beginning)
    return is_first
