"""Pages of the cache always hold what their sequences computed, whatever is shared, evicted or passed by a window."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minorca.generate import kv_cache
from minorca.generate.kv_cache import KVCache, pages_of
from minorca.generate.prefix_tree import PrefixTree

PAGE = 4
LONGEST = 40
ARCH = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "rope_theta": 1e4}


def content(key, tokens) -> float:
    """Stands for keys and values, which follow from all tokens so far."""
    return float(hash((key, *tokens)) % 2**20)


class Simulation:
    """Slots that read prompts and write answers; instead of a model, `content` computes keys."""

    def __init__(self, seed: int, window: int | None, pages: int):
        self.draw = random.Random(seed)
        self.window = window
        arch: Any = SimpleNamespace(window=window, **ARCH)
        self.cache = KVCache(arch, 3, LONGEST, torch.float32, torch.device("cpu"), chunk=6, pages=pages)
        # of each open slot: its adapter, its prompt, all its tokens so far
        self.open = {}
        self.reused = 0

    def tokens(self, count: int) -> list[int]:
        """Of few kinds, so that sequences begin alike."""
        return [self.draw.choice((1, 1, 1, 2)) for _ in range(count)]

    def step(self):
        number = self.draw.randrange(3)
        if number not in self.open:
            self.begin(number)
        elif self.draw.random() < 0.1:
            self.end(number)
        else:
            self.go_on(number)
        for number in self.open:
            self.check(number)

    def begin(self, number: int):
        prompt = self.tokens(self.draw.randint(1, LONGEST // 2))
        if self.cache.fits(LONGEST):
            key = self.draw.choice((None, "adapter"))
            self.cache.open(number, key, LONGEST)
            self.open[number] = (key, prompt, prompt)

    def go_on(self, number: int):
        key, prompt, said = self.open[number]
        start = self.cache.lengths[number]
        if start < len(prompt):
            self.cache.extend(number, prompt)
            if self.draw.random() < 0.5:
                self.cache.extend_by_part(number, prompt)
            self.reused += self.cache.lengths[number] - start
            start = self.cache.lengths[number]
            count = self.draw.randint(1, min(6, len(prompt) - start))
            self.cache.prefill([(number, count)], count)
            self.write(number, start, start + count)
            is_end = start + count == len(prompt)
            self.cache.record(number, prompt, is_end)
            if is_end:
                self.cache.set_active(number, True)
        elif start < LONGEST:
            self.open[number] = (key, prompt, said + self.tokens(1))
            self.cache.active = [other == number for other in range(3)]
            self.cache.advance()
            self.write(number, start, start + 1)

    def end(self, number: int):
        _, _, said = self.open.pop(number)
        self.cache.close(number, self.draw.choice((said, said, None)))

    def write(self, number: int, start: int, stop: int):
        key, _, said = self.open[number]
        pages = self.cache._slots[number].pages
        for place in range(start, stop):
            self.cache.kv_L2PSKD[0, :, pages[place // PAGE], place % PAGE] = content(key, said[: place + 1])

    def check(self, number: int):
        key, _, said = self.open[number]
        slot = self.cache._slots[number]
        # what the next token sees
        first = 0 if self.window is None else max(0, slot.length - self.window + 1)
        for place in range(first, slot.length):
            value = self.cache.kv_L2PSKD[0, 0, slot.pages[place // PAGE], place % PAGE, 0, 0]
            assert value == content(key, said[: place + 1])
        assert sum(page > 0 for page in slot.pages) <= slot.reserved


def nodes_of(tree: PrefixTree) -> list:
    """All nodes that can be matched."""
    nodes = list(tree._roots.values())
    for node in nodes:
        nodes += node.children.values()
    return nodes[len(tree._roots) :]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(kv_cache, "PAGE", PAGE)


@pytest.mark.parametrize("window", [None, 1, 7, 16])
@pytest.mark.parametrize("sequences", [1, 2, 10])
def test_pages_hold_what_their_sequences_computed(window, sequences):
    for seed in range(8):
        pages = kv_cache.SPARE_PAGES + sequences * pages_of(LONGEST, window, 6)
        simulation = Simulation(seed, window, pages)
        for _ in range(600):
            simulation.step()
        assert simulation.reused > 0
        for number in list(simulation.open):
            simulation.end(number)
        tree = simulation.cache.tree
        assert tree.available == pages - 1
        nodes = nodes_of(tree)
        assert not any(node.users for node in nodes)
        held = [node.page for node in nodes if node.page is not None]
        assert len(set(held)) == len(held) == tree.cached and 0 not in held


def filled(tree: PrefixTree, key, tokens: list[int]) -> list:
    """Makes a path of full pages for these tokens, used by one sequence."""
    nodes = [tree.root(key)]
    for start in range(0, len(tokens), tree.size):
        nodes.append(tree.insert(nodes[-1], tuple(tokens[start : start + tree.size]), tree.allocate()))
    return nodes[1:]


def test_the_longest_beginning_matches():
    tree = PrefixTree(20, 4, None)
    first = filled(tree, None, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = filled(tree, None, [1, 2, 3, 4, 5, 6, 0, 0])
    assert tree.match(None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == first[:2]
    assert tree.match_part(first[1], [9, 10]) == (first[2], 1)
    assert tree.holds_rest(first[1], [9]) and not tree.holds_rest(first[1], [9, 10])
    assert tree.match(None, [1, 2, 3, 4, 5, 6, 0]) == tree.match(None, [1, 2, 3, 4, 5, 6, 0], first[:1]) == first[:1]
    assert tree.match_part(first[0], [5, 6, 0]) == (second[1], 3)
    assert tree.match(None, [1, 2, 0]) == [] and tree.match_part(tree.root(None), [1, 2, 0]) == (first[0], 2)
    assert tree.match_part(tree.root(None), [2]) == tree.match_part(tree.root(None), []) == (None, 0)
    # another adapter's
    assert tree.match("other", [1, 2, 3, 4]) == []


def test_the_least_recently_used_goes_first():
    tree = PrefixTree(4, 2, None)
    old = filled(tree, None, [1, 1])
    new = filled(tree, None, [2, 2, 3, 3])
    tree.leave(old)
    tree.leave(new)
    tree.use(old)
    tree.leave(old)
    # the end of a path before its beginning
    tree.allocate()
    assert tree.match(None, [2, 2, 3, 3]) == new[:1]
    tree.allocate()
    assert tree.match(None, [2, 2, 3, 3]) == [] and tree.match(None, [1, 1]) == old


def test_a_forgotten_adapter_serves_nothing():
    tree = PrefixTree(10, 2, None)
    running = filled(tree, "a", [1, 1])
    ended = filled(tree, "a", [2, 2, 3, 3])
    tree.leave(ended)
    tree.forget("a")
    assert tree.match("a", [1, 1]) == tree.match("a", [2, 2]) == []
    assert tree.available == 10 - 1 - 1
    tree.leave(running)
    assert tree.available == 9
    for _ in range(9):
        tree.allocate()
