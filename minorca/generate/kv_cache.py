"""The key/value cache: pages that sequences take as they grow, and share where they begin alike.

The batch has N slots, each for one sequence. A page holds the keys and values of `PAGE` positions in all layers; each
slot has a table of its pages. Full pages, and the last one of a prompt, are kept in a tree (prefix_tree.py) under the
tokens they were computed from, so that another sequence that begins with these tokens reads them instead of computing
them again; they are overwritten when their memory is needed. With a window, pages that it has passed are given back.

Axes in names: L layers, N slots, B pages of a slot, S positions of a page, P pages of the cache (P = D/2 in
`frequencies_P`), K key/value heads, D head size.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from minorca.errors import UserError
from minorca.generate.cache_attention import DecodeAttention, PrefillAttention, Segment
from minorca.generate.on_device import copy_to
from minorca.generate.prefix_tree import Node, PrefixTree
from minorca.host import host_memory_bytes
from minorca.model.architecture import Architecture
from minorca.model.network import Mistral
from minorca_kernels import NF4Weight, PrepackedNF4Weight, decode_spans, rope_frequencies

# Positions of a page, and queries of a block on the CPU.
PAGE = 128
# The share of the free memory that the cache may take; the rest is for activations.
MAX_MEMORY_SHARE = 0.9
# Pages that no sequence is counted for: the one where inactive slots write, and the source of a copy.
SPARE_PAGES = 2


@dataclass
class _Slot:
    """One sequence.

    Attributes:
        key: what its tokens' keys and values depend on beside them: its adapter.
        length: its tokens that the cache holds, with those that the window has passed.
        reserved: the most pages that it will hold at once; 0: the slot is free.
        pages: by place; 0 where the window has passed.
        nodes: of the tree, by place, for the pages that are in it.
        passed: how many of its pages the window has passed.
        left: how many of its nodes it does not use any more.
        tail: the node of its last page, which it goes on writing into.
    """

    key: Hashable = None
    length: int = 0
    reserved: int = 0
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    passed: int = 0
    left: int = 0
    tail: Node | None = None


class KVCache:
    """Keys and values of N sequences, in pages [P, S, K, D] of each layer.

    `prefill` and `decode` return an attend object for `Mistral.forward`: for the next tokens of some slots, or for the
    next token of every active slot. `lengths` counts the tokens of each slot's sequence; `active` says which slots take
    part in decoding. `reused_tokens` counts the tokens of prompts that were taken over instead of computed.

    Args:
        max_length: the maximum number of tokens of a sequence.
        dtype: of keys and values.
        chunk: the maximum number of tokens of a slot in one `prefill`.
        pages: None: as many as all slots need at most.
    """

    def __init__(
        self,
        arch: Architecture,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int = 512,
        pages: int | None = None,
    ):
        self.window = arch.window
        self.max_length = max_length
        self.chunk = chunk
        self.device = device
        self.group = arch.heads // arch.kv_heads
        self.pages = pages or slots * pages_of(max_length, arch.window, chunk) + SPARE_PAGES
        self.tree = PrefixTree(self.pages, PAGE, arch.window)
        self.frequencies_P = rope_frequencies(arch.head_dim, arch.rope_theta, device)
        # Zeros, because a masked key is multiplied by 0. The host's memory is taken when it is written to.
        self.kv_L2PSKD = torch.zeros(
            arch.layers, 2, self.pages, PAGE, arch.kv_heads, arch.head_dim, dtype=dtype, device=device
        )
        # of each layer its keys and values
        self.layers = [tuple(kv_2PSKD.unbind()) for kv_2PSKD in self.kv_L2PSKD.unbind()]
        self.active_N = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lengths_N = torch.zeros(slots, dtype=torch.int64, device=device)
        self.table_NB = torch.zeros(slots, -(-max_length // PAGE), dtype=torch.int32, device=device)
        self.active = [False] * slots
        self.reused_tokens = 0
        self._slots = [_Slot() for _ in range(slots)]
        # The pages of all slots together, at most `pages`.
        self._reserved = SPARE_PAGES

    @property
    def lengths(self) -> list[int]:
        return [slot.length for slot in self._slots]

    # ----------------------------------------------------------------------------------------------- sequences

    def fits(self, length: int) -> bool:
        """Whether a slot can be opened for a sequence of so many tokens."""
        return self._reserved + pages_of(length, self.window, self.chunk) <= self.pages

    def open(self, number: int, key: Hashable, length: int) -> None:
        """Makes a slot that of a new sequence, which will have at most `length` tokens; it must fit."""
        slot = self._slots[number] = _Slot(key, reserved=pages_of(length, self.window, self.chunk))
        self._reserved += slot.reserved

    def extend(self, number: int, prompt: Sequence[int]) -> int:
        """Takes over the full pages that the cache holds of a slot's prompt; returns how many tokens are left.

        At least the last one is: it has to be computed for its logits. Where another slot has just computed the rest of
        the same prompt it alone is, see `extend_by_part`.
        """
        slot = self._slots[number]
        if not self.is_within_page(number):
            path = self.tree.match(slot.key, prompt[:-1], slot.nodes)
            if len(path) > len(slot.nodes):
                new = path[len(slot.nodes) :]
                self.tree.use(new)
                slot.nodes = path
                slot.pages += [node.page or 0 for node in new]
                self._count_reused(slot, len(path) * PAGE)
            if self.tree.holds_rest(self._parent(slot), prompt[slot.length :]):
                return 1
        return len(prompt) - slot.length

    def extend_by_part(self, number: int, prompt: Sequence[int]) -> int:
        """Copies the part of a page with which the slot's prompt goes on, if any; returns the slot's length."""
        slot = self._slots[number]
        if not self.is_within_page(number):
            part, tokens = self.tree.match_part(self._parent(slot), prompt[slot.length : -1][:PAGE])
            if part is not None:
                self._copy(slot, part, tokens)
                self._count_reused(slot, slot.length + tokens)
        return slot.length

    def _count_reused(self, slot: _Slot, length: int) -> None:
        self.reused_tokens += length - slot.length
        slot.length = length
        self._pass(slot)

    def next_page(self, number: int, prompt: Sequence[int]) -> tuple[Node, tuple[int, ...]]:
        """The page that the slot's next token belongs to: the node before it and the page's tokens."""
        slot = self._slots[number]
        start = len(slot.nodes) * PAGE
        return self._parent(slot), tuple(prompt[start : start + PAGE])

    def is_within_page(self, number: int) -> bool:
        """Whether a part of the next token's page is computed."""
        slot = self._slots[number]
        return slot.length > len(slot.nodes) * PAGE

    def _parent(self, slot: _Slot) -> Node:
        return slot.nodes[-1] if slot.nodes else self.tree.root(slot.key)

    def _copy(self, slot: _Slot, source: Node, tokens: int) -> None:
        """Copies a page's first tokens into a new page at the slot's end."""
        # So that it is not handed out as the new page.
        self.tree.use([source])
        page = self._new_page(slot)
        self.kv_L2PSKD[:, :, page, :tokens] = self.kv_L2PSKD[:, :, source.page, :tokens]
        self.tree.leave([source])

    def _new_page(self, slot: _Slot) -> int:
        page = self.tree.allocate()
        self.kv_L2PSKD[:, :, page].zero_()
        slot.pages.append(page)
        return page

    def _pass(self, slot: _Slot) -> None:
        """Gives back the pages that the slot's next token does not see."""
        passed = min(self.tree.first_visible(slot.length), len(slot.pages))
        for place in range(slot.passed, passed):
            if place == len(slot.nodes) and slot.tail is not None:
                self.tree.take(slot.tail)
                slot.tail = None
            if place >= len(slot.nodes) and slot.pages[place]:
                self.tree.free(slot.pages[place])
            slot.pages[place] = 0
        slot.passed = max(slot.passed, passed)
        self._leave_passed(slot)

    def _leave_passed(self, slot: _Slot) -> None:
        # The last one stays in use, and so in the tree: it is the parent of what the slot computes next.
        stop = min(slot.passed, len(slot.nodes) - 1)
        if stop > slot.left:
            self.tree.leave(slot.nodes[slot.left : stop])
            slot.left = stop

    def record(self, number: int, tokens: Sequence[int], is_prompt_end: bool) -> None:
        """Makes what a slot has computed of its prompt, its first `length` tokens, available to others."""
        slot = self._slots[number]
        self._insert_full(slot, tokens[: slot.length])
        rest = tuple(tokens[len(slot.nodes) * PAGE : slot.length])
        parent = self._parent(slot)
        if is_prompt_end and rest and rest not in parent.children:
            slot.tail = self.tree.insert(parent, rest, slot.pages[-1])

    def _insert_full(self, slot: _Slot, tokens: Sequence[int]) -> None:
        for place in range(len(slot.nodes), len(tokens) // PAGE):
            self._insert(slot, tuple(tokens[place * PAGE : (place + 1) * PAGE]))

    def _insert(self, slot: _Slot, tokens: tuple[int, ...]) -> None:
        place = len(slot.nodes)
        node = self.tree.insert(self._parent(slot), tokens, slot.pages[place] or None)
        if place >= slot.passed:
            slot.pages[place] = node.page or 0
        slot.nodes.append(node)
        self._leave_passed(slot)

    def close(self, number: int, tokens: Sequence[int] | None) -> None:
        """Frees a slot.

        Args:
            tokens: those of its sequence, whose beginning, as far as it was computed, is kept for others; None: what
                was not recorded is not kept.
        """
        slot = self._slots[number]
        self.set_active(number, False)
        if slot.tail is not None:
            tail = slot.tail.tokens
            slot.pages[len(slot.nodes)] = self.tree.take(slot.tail)
            if tokens is None:
                self._insert(slot, tail)
        if tokens is not None:
            computed = tokens[: slot.length]
            self._insert_full(slot, computed)
            if rest := tuple(computed[len(slot.nodes) * PAGE :]):
                self._insert(slot, rest)
        for page in slot.pages[len(slot.nodes) :]:
            if page:
                self.tree.free(page)
        self.tree.leave(slot.nodes[slot.left :])
        self._reserved -= slot.reserved
        self._slots[number] = _Slot()

    # ------------------------------------------------------------------------------------------------ forwards

    def prefill(self, segments: Sequence[tuple[int, int]], rows: int) -> PrefillAttention:
        """The attend object for the next tokens of some slots, end to end: (slot, number of tokens) of each.

        They count as part of their sequences from now on. Up to `rows`, what the forward computes is meaningless.
        """
        placed = []
        for number, tokens in segments:
            slot = self._slots[number]
            self._pass(slot)
            start, slot.length = slot.length, slot.length + tokens
            self._reserve(slot)
            placed.append(Segment(slot.pages, start, slot.length))
        return PrefillAttention(self, placed, rows)

    def _reserve(self, slot: _Slot) -> None:
        """Allocates the pages of a slot's length."""
        if slot.length > self.max_length:
            raise ValueError(f"the cache was created for at most {self.max_length} tokens a sequence")
        while len(slot.pages) * PAGE < slot.length:
            self._new_page(slot)

    def set_active(self, number: int, active: bool) -> None:
        """Includes a slot in decoding, or excludes it."""
        if active:
            slot = self._slots[number]
            row = copy_to(self.device, torch.tensor(slot.pages, dtype=torch.int32))
            self.table_NB[number, : len(row)] = row
            self.lengths_N[number].fill_(slot.length)
        self.active[number] = active
        self.active_N[number].fill_(int(active))

    def advance(self) -> None:
        """The host's part of a decoding step: reserves and counts one more token for every active slot."""
        for number, slot in enumerate(self._slots):
            if self.active[number]:
                self._pass(slot)
                before = len(slot.pages)
                slot.length += 1
                self._reserve(slot)
                if len(slot.pages) > before:
                    self.table_NB[number, before].fill_(slot.pages[-1])

    def decode(self) -> DecodeAttention:
        """The attend object for the next token of every slot, [N], after `advance`.

        It works on the device alone, so that a CUDA graph can capture it. The output for inactive slots is meaningless.
        """
        return DecodeAttention(self, self.lengths_N)

    def spans(self) -> list:
        """What the active slots' queries see, after `advance`, for `decode_attention` on the CPU."""
        lengths = [slot.length * active for slot, active in zip(self._slots, self.active)]
        return decode_spans([slot.pages for slot in self._slots], lengths, PAGE, self.window)


def pages_of(length: int, window: int | None, chunk: int) -> int:
    """The most pages that a sequence of so many tokens holds at once."""
    pages = -(-length // PAGE)
    # The window and a chunk, neither of which begins with a page, and the last page that is in the tree.
    return pages if window is None else min(pages, -(-(window + chunk) // PAGE) + 2)


def affordable_pages(model: Mistral, slots: int, max_length: int, chunk: int) -> int:
    """The pages of a cache beside a model's weights: as many as all slots need at most, or as have room.

    Raises:
        UserError: there is no room for one sequence of `max_length` tokens.
    """
    arch, device = model.arch, model.embedding.weight.device
    if device.type == "cuda":
        # What torch keeps of freed tensors, as of an engine before this one, counts as taken for the driver.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = host_memory_bytes() - sum(parameter.nbytes for parameter in model.parameters())
        # which `prepack` makes before the first step
        dense = [
            projection.base
            for _, projection in model.projections()
            if isinstance(projection.base, NF4Weight) and not PrepackedNF4Weight.supports(projection.base, model.dtype)
        ]
        free += sum(parameter.nbytes for base in dense for parameter in base.parameters())
        free -= sum(base.out_features * base.in_features for base in dense) * model.dtype.itemsize
    page_bytes = 2 * arch.layers * PAGE * arch.kv_heads * arch.head_dim * model.dtype.itemsize
    one = pages_of(max_length, arch.window, chunk)
    room = int(MAX_MEMORY_SHARE * free) // page_bytes
    if room < one + SPARE_PAGES:
        raise UserError(
            f"the KV cache needs {(one + SPARE_PAGES) * page_bytes / 1e9:.1f} GB for one sequence of {max_length} "
            f"tokens, {max(free, 0) / 1e9:.1f} GB are free after loading; use a smaller maximum length"
        )
    return min(slots * one + SPARE_PAGES, room)
