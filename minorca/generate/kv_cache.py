"""The rolling key/value cache.

The batch has N slots, each for one sequence. A slot's buffer has `capacity` positions: at most as many as the attention
window has keys, and position p of the sequence is stored at p mod capacity. Keys are stored after RoPE, so their order
in the buffer does not matter, and a full buffer holds exactly what the next query may see (mistral-inference's rolling
buffer; Jiang et al. 2023, arXiv:2310.06825). The buffers of all slots grow together, as far as the longest sequence
needs.

Axes in names: L layers, N slots, S positions of a buffer, P some of these positions, T tokens,
H query heads, K key/value heads, D head size, M = (H + 2 K) D, P = D/2 (`cos_NP`, `frequencies_P`).
"""

import torch
from torch import Tensor

from minorca.device import host_memory_bytes
from minorca.errors import UserError, memory_asked_for
from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca.model.network import Mistral
from minorca_kernels import (
    NF4Weight,
    decode_attention,
    decode_groups,
    decode_positions,
    rope_frequencies,
    rope_into_cache,
)

# Buffers grow to a multiple of this many positions.
CAPACITY_MULTIPLE = 64
# The share of the free memory that the cache may take; the rest is for activations.
MAX_MEMORY_SHARE = 0.9


class KVCache:
    """Keys and values of N sequences: one buffer [N, S, K, D] of each for every layer.

    `prefill` and `decode` return an attend object for `Mistral.forward`: for the next tokens of one slot, or for the
    next token of every active slot. `lengths` counts the tokens of each slot's sequence, including those that the
    window has passed; `active` says which slots take part in decoding. Both are kept on the host and, as `lengths_N`
    and `active_N`, on the device.

    Args:
        max_length: the maximum number of tokens of a sequence. With a window sequences may be longer.
        dtype: of keys and values.
    """

    def __init__(self, arch: Architecture, slots: int, max_length: int, dtype: torch.dtype, device: torch.device):
        self.window = arch.window
        self.max_length = max_length
        self.max_capacity = min(max_length, arch.window or max_length)
        self.capacity = 0
        self.dtype = dtype
        self.device = device
        self.lengths = [0] * slots
        self.active = [False] * slots
        self.lengths_N = torch.zeros(slots, dtype=torch.int64, device=device)
        self.active_N = torch.zeros(slots, dtype=torch.int64, device=device)
        self.frequencies_P = rope_frequencies(arch.head_dim, arch.rope_theta, device)
        self._head_shape = (arch.kv_heads, arch.head_dim)
        self.k_LNSKD = [self._buffer(0) for _ in range(arch.layers)]
        self.v_LNSKD = [self._buffer(0) for _ in range(arch.layers)]

    def _buffer(self, capacity: int) -> Tensor:
        return torch.zeros(len(self.lengths), capacity, *self._head_shape, dtype=self.dtype, device=self.device)

    def bytes(self, capacity: int) -> int:
        """The size of all buffers at this capacity."""
        kv_heads, head_dim = self._head_shape
        token_bytes = 2 * len(self.k_LNSKD) * kv_heads * head_dim * self.dtype.itemsize
        return len(self.lengths) * capacity * token_bytes

    def reserve(self, length: int) -> None:
        """Grows the buffers for sequences of `length` tokens.

        Raises:
            ValueError: `length` exceeds `max_length`, and there is no window that would let old keys be overwritten.
            UserError: memory ran out; the cache is as it was.
        """
        if length > self.max_length and self.max_capacity != self.window:
            raise ValueError(f"the cache was created for at most {self.max_length} tokens a sequence, got {length}")
        if min(length, self.max_capacity) <= self.capacity:
            return
        wanted = max(length, 2 * self.capacity)
        capacity = min(wanted + -wanted % CAPACITY_MULTIPLE, self.max_capacity)
        try:
            # One layer at a time, so that only one buffer exists twice.
            for buffers in (self.k_LNSKD, self.v_LNSKD):
                for layer, buffer in enumerate(buffers):
                    grown = self._buffer(capacity)
                    grown[:, : self.capacity] = buffer
                    buffers[layer] = grown
        except BaseException as error:
            self._undo_growth()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"the KV cache cannot grow to {self.bytes(capacity) / 1e9:.1f} GB for {len(self.lengths)} slots of "
                f"{capacity} tokens: {memory_asked_for(error)} Use fewer slots or a smaller maximum length"
            ) from error
        self.capacity = capacity

    def _undo_growth(self) -> None:
        """Positions are counted through the buffers of all slots, so layers of different capacities would disagree."""
        for buffers in (self.k_LNSKD, self.v_LNSKD):
            for layer, grown in enumerate(buffers):
                if grown.shape[1] > self.capacity:
                    # By way of the host, because the device may have no room for both.
                    kept_NSKD = torch.stack([slot_SKD[: self.capacity].cpu() for slot_SKD in grown])
                    del grown
                    buffers[layer] = kept_NSKD
                    buffers[layer] = kept_NSKD.to(self.device)

    def reserve_next(self, length: int) -> None:
        """Grows the buffers for `length` tokens and, within `max_length`, for one more.

        A decoding step writes a key for inactive slots too: at the position of their next token, where it will be
        overwritten.
        """
        self.reserve(min(length + 1, max(length, self.max_length)))

    def holds(self, slot: int, length: int) -> bool:
        """Whether a sequence can continue from the slot's first `length` tokens: all of them, or a part if none was
        overwritten."""
        return length == self.lengths[slot] or length < self.lengths[slot] < self.capacity

    def set_length(self, slot: int, length: int) -> None:
        """Declares the slot's first `length` tokens, which its buffer must hold, to be its sequence; 0 empties it."""
        self.lengths[slot] = length
        self.lengths_N[slot].fill_(length)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Makes the first `length` tokens of slot `source`, which must hold them, the sequence of slot `target`."""
        for buffer in (*self.k_LNSKD, *self.v_LNSKD):
            buffer[target, :length] = buffer[source, :length]
        self.set_length(target, length)

    def set_active(self, slot: int, active: bool) -> None:
        """Includes a slot in decoding, or excludes it."""
        self.active[slot] = active
        self.active_N[slot].fill_(int(active))

    def prefill(self, slot: int, tokens: int) -> "_PrefillAttention":
        """The attend object for the next `tokens` tokens of a slot, which count as part of its sequence from now on."""
        start = self.lengths[slot]
        self.reserve_next(start + tokens)
        attend = _PrefillAttention(self, slot, start, tokens)
        self.set_length(slot, start + tokens)
        return attend

    def advance(self) -> None:
        """The host's part of a decoding step: reserves and counts one more token for every active slot."""
        active_lengths = [length for length, active in zip(self.lengths, self.active) if active]
        self.reserve_next(1 + max(active_lengths, default=0))
        self.lengths = [length + active for length, active in zip(self.lengths, self.active)]

    def decode(self) -> "_DecodeAttention":
        """The attend object for the next token of every slot, [N], after `advance`.

        It works on the device alone, so that a CUDA graph can capture it. The output for inactive slots is meaningless.
        """
        return _DecodeAttention(self, self.lengths_N)


def check_memory(cache: KVCache, model: Mistral) -> None:
    """Checks that a fully grown cache fits beside the weights: a running sequence could not be moved elsewhere.

    Raises:
        UserError: it does not fit.
    """
    if cache.device.type == "cuda":
        # What torch keeps of freed tensors, as of an engine before this one, counts as taken for the driver.
        unused = torch.cuda.memory_reserved(cache.device) - torch.cuda.memory_allocated(cache.device)
        free = torch.cuda.mem_get_info(cache.device)[0] + unused
    else:
        free = host_memory_bytes() - sum(parameter.nbytes for parameter in model.parameters())
        # which become dense before the first step (`prepack`)
        packed = [projection.base for _, projection in model.projections() if isinstance(projection.base, NF4Weight)]
        values = sum(base.out_features * base.in_features for base in packed)
        free += sum(parameter.nbytes for base in packed for parameter in base.parameters())
        free -= values * model.embedding.weight.itemsize
    needed = cache.bytes(cache.max_capacity)
    if needed > MAX_MEMORY_SHARE * free:
        raise UserError(
            f"the KV cache needs {needed / 1e9:.1f} GB for {len(cache.lengths)} slots of {cache.max_capacity} "
            f"tokens, {free / 1e9:.1f} GB are free after loading; use fewer slots or a smaller maximum length"
        )


class _PrefillAttention(PackedAttention):
    """Attention of a slot's next T tokens to themselves and to the cached tokens before them."""

    def __init__(self, cache: KVCache, slot: int, start: int, tokens: int):
        past = start if cache.window is None else min(start, cache.window - 1)
        super().__init__(None, tokens, cache.window, cache.device, past)
        self.positions = self.positions + (start - past)
        self.cache = cache
        self.slot = slot
        self.start = start
        self.stop = start + tokens

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        buffers_SKD = self.cache.k_LNSKD[layer][self.slot], self.cache.v_LNSKD[layer][self.slot]
        capacity = self.cache.capacity
        first = self.start - self.past
        if self.stop <= capacity:
            # Nothing is overwritten: the buffer is the sequence.
            for buffer_SKD, new_TKD in zip(buffers_SKD, (k_TKD, v_TKD)):
                buffer_SKD[self.start : self.stop] = new_TKD
            return super().__call__(layer, q_THD, *(buffer_SKD[first : self.stop] for buffer_SKD in buffers_SKD))
        past_P = torch.arange(first, self.start, device=q_THD.device) % capacity
        k_SKD, v_SKD = (torch.cat((old[past_P], new)) for old, new in zip(buffers_SKD, (k_TKD, v_TKD)))
        out_THD = super().__call__(layer, q_THD, k_SKD, v_SKD)
        kept_P = torch.arange(max(self.start, self.stop - capacity), self.stop, device=q_THD.device) % capacity
        for buffer_SKD, new_TKD in zip(buffers_SKD, (k_TKD, v_TKD)):
            buffer_SKD[kept_P] = new_TKD[-capacity:]
        return out_THD


class _DecodeAttention:
    """Attention of one token a slot; in a full buffer its key replaces the one that has just left the window."""

    def __init__(self, cache: KVCache, lengths_N: Tensor):
        """Counts the new tokens into `lengths_N`."""
        capacity = cache.capacity
        self.cache = cache
        self.cos_NP, self.sin_NP, self.index_N, self.filled_N = decode_positions(
            lengths_N, cache.active_N, cache.frequencies_P, capacity
        )
        self.groups = None
        if cache.device.type == "cpu":
            filled = [min(length, capacity) * active for length, active in zip(cache.lengths, cache.active)]
            self.groups = decode_groups(filled, capacity)

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """As `PackedAttention.rope_tables`; the cache knows both numbers."""
        return self.cos_NP, self.sin_NP

    def of_qkv(self, layer: int, qkv_NM: Tensor, cos_NP: Tensor, sin_NP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """As `PackedAttention.of_qkv`; the cache knows the numbers of heads."""
        k_NSKD = self.cache.k_LNSKD[layer]
        v_NSKD = self.cache.v_LNSKD[layer]
        caches = k_NSKD.flatten(0, 1), v_NSKD.flatten(0, 1)
        q_NHD = rope_into_cache(qkv_NM, cos_NP, sin_NP, *caches, self.index_N)
        return decode_attention(q_NHD, k_NSKD, v_NSKD, self.filled_N, self.groups)
