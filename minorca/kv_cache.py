"""The rolling key/value buffer: as many slots a sequence as its window has keys, position p in slot p mod slots.

Keys are kept rotated, so their order in the buffer does not matter, and what a full buffer holds is exactly what the next
query may see (mistral-inference's rolling buffer; Jiang et al. 2023, arXiv:2310.06825).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minorca.architecture import Architecture
from minorca.attention import Documents


class KVCache:
    """Keys and values of N sequences, [layer][N, slots, Hkv, D]. First one `prefill`, then any number of `step`s.

    Both return an attend object for `Mistral.forward`: prefill for all prompts' tokens end to end, step for one more token
    of each sequence.
    """

    def __init__(self, arch: Architecture, sequences: int, max_length: int, dtype: torch.dtype, device: torch.device):
        self.slots = min(max_length, arch.window or max_length)
        self.window = arch.window
        shape = (arch.layers, sequences, self.slots, arch.kv_heads, arch.head_dim)
        self.k_LNSKD, self.v_LNSKD = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.longest = 0
        self.lengths_N = torch.zeros(sequences, dtype=torch.int64, device=device)

    def prefill(self, cu_seqlens: Tensor) -> "_Prefill":
        """cu_seqlens [N+1] of the prompts, one a sequence."""
        return _Prefill(self, cu_seqlens)

    def step(self) -> "_Step":
        """For tokens [N], the next one of each sequence."""
        self.longest += 1
        if self.longest > self.slots != self.window:
            raise ValueError(f"the cache was made for {self.slots} tokens a sequence")
        return _Step(self)


class _Prefill(Documents):
    """Attention inside each prompt; the last `slots` keys of each stay in the cache."""

    def __init__(self, cache: KVCache, cu_seqlens: Tensor):
        super().__init__(cu_seqlens, int(cu_seqlens[-1]), cache.window, cache.lengths_N.device)
        self.cache = cache
        cache.longest = self.longest
        cache.lengths_N.copy_(torch.tensor(self.lengths))

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        slots = self.cache.slots
        for buffer, new in ((self.cache.k_LNSKD[layer], k_TKD), (self.cache.v_LNSKD[layer], v_TKD)):
            for n, document in enumerate(new.split(self.lengths)):
                length = len(document)
                kept = torch.arange(max(0, length - slots), length, device=new.device)
                buffer[n, kept % slots] = document[-slots:]
        return super().__call__(layer, q_THD, k_TKD, v_TKD)


class _Step:
    """One token a sequence: its key replaces the one that has just left the window."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.positions = cache.lengths_N.clone()
        cache.lengths_N += 1
        self.slot_N = self.positions % cache.slots
        self.rows_N = torch.arange(len(self.positions), device=self.positions.device)
        slots = torch.arange(cache.slots, device=self.positions.device)
        self.filled_N11S = (slots < cache.lengths_N[:, None])[:, None, None]

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        k_NSKD, v_NSKD = self.cache.k_LNSKD[layer], self.cache.v_LNSKD[layer]
        k_NSKD[self.rows_N, self.slot_N] = k_NKD
        v_NSKD[self.rows_N, self.slot_N] = v_NKD
        out_NH1D = F.scaled_dot_product_attention(
            q_NHD[:, :, None], k_NSKD.transpose(1, 2), v_NSKD.transpose(1, 2), attn_mask=self.filled_N11S, enable_gqa=True
        )
        return out_NH1D[:, :, 0]
