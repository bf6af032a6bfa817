"""The rolling key/value buffer: at most as many slots a sequence as its window has keys, position p in slot p mod slots.

Keys are kept rotated, so their order in the buffer does not matter, and what a full buffer holds is exactly what the next
query may see (mistral-inference's rolling buffer; Jiang et al. 2023, arXiv:2310.06825). The buffers of all rows grow together,
as the longest one needs, up to the window; without a window, up to the length the cache was made for.
"""

import torch
from torch import Tensor

from minorca.model.architecture import Architecture
from minorca.model.attention import PackedAttention
from minorca_kernels import decode_attention, decode_groups

SLOTS = 64  # by a multiple of which buffers grow


class KVCache:
    """Keys and values of N sequences, one a row: [layer][N, slots, Hkv, D].

    `chunk` and `step` return an attend object for `Mistral.forward`: for the next tokens of one row, or for the next token of
    every row that is `active`. `lengths` counts the tokens of each row since its start.
    """

    def __init__(self, arch: Architecture, rows: int, max_length: int, dtype: torch.dtype, device: torch.device):
        self.window, self.max_length = arch.window, max_length
        self.limit = min(max_length, arch.window or max_length)
        self.slots, self.lengths, self.active = 0, [0] * rows, [False] * rows
        self.lengths_N, self.active_N = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.rows_N = torch.arange(rows, device=device)
        self._shape, self.dtype, self.device = (arch.kv_heads, arch.head_dim), dtype, device
        self.k_LNSKD, self.v_LNSKD = ([self._buffer(0) for _ in range(arch.layers)] for _ in range(2))

    def _buffer(self, slots: int) -> Tensor:
        return torch.zeros(len(self.lengths), slots, *self._shape, dtype=self.dtype, device=self.device)

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens.

        Raises:
            ValueError: more than the cache was made for, where old keys are still seen.
        """
        if length > self.max_length and self.limit != self.window:
            raise ValueError(f"the cache was made for {self.max_length} tokens a sequence")
        if min(length, self.limit) <= self.slots:
            return
        wanted = max(length, 2 * self.slots)
        slots = min(wanted + -wanted % SLOTS, self.limit)
        for buffers in (self.k_LNSKD, self.v_LNSKD):  # a layer at a time: little is there twice
            for layer, buffer in enumerate(buffers):
                buffers[layer] = self._buffer(slots)
                buffers[layer][:, : buffer.shape[1]] = buffer
        self.slots = slots  # once all have grown: what ran out of memory can be tried again

    def reserve_behind(self, length: int) -> None:
        """Room for rows of `length` tokens and, where there can be one, a slot behind them: there a step writes the key of a row that
        is not active, where its next token's will be."""
        self.reserve(min(length + 1, max(length, self.max_length)))

    def holds(self, row: int, length: int) -> bool:
        """Whether a sequence could go on from the row's first `length` tokens: they are all it has, or it has not come round yet."""
        return length == self.lengths[row] or length < self.lengths[row] < self.slots

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the row's first `length` tokens, which it must hold; 0 is always held."""
        self.lengths[row] = length
        self.lengths_N[row] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """A row begins with another's first `length` tokens, which that one must hold."""
        for buffer in (*self.k_LNSKD, *self.v_LNSKD):
            buffer[target, :length] = buffer[source, :length]
        self.truncate(target, length)

    def activate(self, row: int, active: bool) -> None:
        self.active[row] = active
        self.active_N[row] = int(active)

    def chunk(self, row: int, tokens: int) -> "_Chunk":
        """For the next `tokens` tokens of a row."""
        return _Chunk(self, row, tokens)

    def advance(self) -> None:
        """What the host has to do before a step: room for one more token a row, and count it."""
        self.reserve_behind(1 + max((length for length, active in zip(self.lengths, self.active) if active), default=0))
        self.lengths = [length + active for length, active in zip(self.lengths, self.active)]

    def step(self) -> "_Step":
        """After `advance`, for tokens [N], the next one of each active row; what other rows compute is not to be used. On the
        device alone, so that a CUDA graph can hold it."""
        return _Step(self)


class _Chunk(PackedAttention):
    """Attention of a row's next tokens to themselves and to what the cache holds of the tokens before."""

    def __init__(self, cache: KVCache, row: int, tokens: int):
        start = cache.lengths[row]
        self.cache, self.row, self.start, self.stop = cache, row, start, start + tokens
        cache.reserve_behind(self.stop)
        past = start if cache.window is None else min(start, cache.window - 1)
        super().__init__(None, tokens, cache.window, cache.device, past)
        self.positions = self.positions + (start - past)
        cache.truncate(row, self.stop)

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        buffers = self.cache.k_LNSKD[layer][self.row], self.cache.v_LNSKD[layer][self.row]
        slots, first = self.cache.slots, self.start - self.past
        if self.stop <= slots:  # not rolled: the buffer is the sequence
            for buffer_SKD, new in zip(buffers, (k_TKD, v_TKD)):
                buffer_SKD[self.start : self.stop] = new
            return super().__call__(layer, q_THD, *(buffer_SKD[first : self.stop] for buffer_SKD in buffers))
        old = torch.arange(first, self.start, device=q_THD.device) % slots
        out = super().__call__(layer, q_THD, *(torch.cat((b[old], new)) for b, new in zip(buffers, (k_TKD, v_TKD))))
        kept = torch.arange(max(self.start, self.stop - slots), self.stop, device=q_THD.device) % slots
        for buffer_SKD, new in zip(buffers, (k_TKD, v_TKD)):
            buffer_SKD[kept] = new[-slots:]
        return out


class _Step:
    """One token a row: its key replaces the one that has just left the window."""

    def __init__(self, cache: KVCache):
        self.cache, slots = cache, cache.slots
        self.positions = cache.lengths_N.clone()
        cache.lengths_N += cache.active_N
        self.slot_N = cache.rows_N * slots + self.positions % slots
        self.filled_N, self.groups = (self.positions + 1).clamp(max=slots) * cache.active_N, None
        if cache.device.type == "cpu":
            filled = [min(length, slots) * active for length, active in zip(cache.lengths, cache.active)]
            self.groups = decode_groups(filled, slots)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        k_NSKD, v_NSKD = self.cache.k_LNSKD[layer], self.cache.v_LNSKD[layer]
        k_NSKD.flatten(0, 1).index_copy_(0, self.slot_N, k_NKD)
        v_NSKD.flatten(0, 1).index_copy_(0, self.slot_N, v_NKD)
        return decode_attention(q_NHD, k_NSKD, v_NSKD, self.filled_N, self.groups)
