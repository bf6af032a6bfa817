"""Which keys a query sees, and the back ends that compute attention.

One sentence defines the mask: position i sees j with 0 <= i - j < window, inside its own document. `visible` is that
sentence; every back end is tested against it. Axes: T tokens, H query heads, K key/value heads, D head size.

The network calls an *attend* object, `attend(layer, q_THD, k_TKD, v_TKD)`, that also holds the tokens' positions:
`PackedAttention` here, and those of the key/value cache in generate/kv_cache.py.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, restore_flash_attention_impl, sdpa_kernel
from torch.torch_version import TorchVersion

from minorca_kernels import attention, rope

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn
# a build of torch without it
except ImportError:
    varlen_attn = None
# torch 2.11 groups heads without being asked, and has no name for it
_grouped = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
VARLEN_OPTIONS = {"enable_gqa": True} if _grouped else {}

log = logging.getLogger(__name__)


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """positions [Q] and [S] of one document -> bool [Q, S]: True where the query sees the key."""
    distance = q_positions[:, None] - k_positions[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def choose_backend(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    *,
    plain: bool,
    deterministic: bool,
    flash: str | None,
    varlen: bool,
) -> str:
    """The fastest back end that can run on a GPU: "FA3", "FA4", "cudnn", "varlen" (torch's FA2), or "own", our kernels.

    Args:
        capability: the GPU's.
        plain: one document and no active window; torch's interface to cuDNN supports neither.
        deterministic: gradients must repeat to the bit.
        flash: what `flash_implementation` put under varlen_attn.
        varlen: this build of torch has varlen_attn.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if not half or head_dim % 8 or head_dim > 256 or capability < (8, 0):
        return "own"
    if varlen and flash is not None and (flash == "FA3" or head_dim <= 128):
        return flash
    if plain and head_dim <= 128 and not deterministic:
        return "cudnn"
    return "varlen" if varlen else "own"


@functools.cache
def flash_implementation(capability: tuple[int, int]) -> str | None:
    """Activates FA3 or FA4 for varlen_attn, where its package is installed and made for this GPU.

    Returns:
        Its name; None: torch's FA2 stays.
    """
    name = {9: "FA3", 10: "FA4"}.get(capability[0])
    # before torch 2.13, FA4 refuses every window in backward
    if name is None or (name == "FA4" and TorchVersion(torch.__version__) < "2.13"):
        return None
    try:
        activate_flash_attention_impl(name)
    # not installed, or built for another torch
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError):
        return None
    # rounding to bf16 leaves about 0.003 in each result
    error = _varlen_error("cuda")
    if error > 0.02:
        log.warning("%s is installed but not used: its relative error against our own kernels is %.1g", name, error)
        restore_flash_attention_impl()
        return None
    return name


def _varlen_error(device: str) -> float:
    """The relative error of varlen_attn, as it is activated, against our kernels, in output and gradients.

    Two documents, a window, grouped heads.
    """
    lengths = [200, 184]
    window = 64
    random = torch.Generator(device).manual_seed(0)
    shapes = [(sum(lengths), heads, 128) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (
        torch.randn(shape, device=device, generator=random).bfloat16().requires_grad_() for shape in shapes
    )
    _, first, last = (t.to(device) for t in _mask_bounds(lengths, window))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    with torch.enable_grad():
        outs = _varlen(q, k, v, cu_seqlens, max(lengths), window), attention(q, k, v, first, last)
        theirs, ours = ((out, *torch.autograd.grad(out, (q, k, v), dout)) for out in outs)
    norm = torch.linalg.vector_norm
    return max((norm((a - b).float()) / norm(b.float())).item() for a, b in zip(theirs, ours))


@functools.cache
def _report(choice: str, dtype: torch.dtype, head_dim: int) -> None:
    log.info("attention by %s (%s, head size %d)", choice, str(dtype).removeprefix("torch."), head_dim)


class PackedAttention:
    """Causal attention inside each document of a flat batch of T tokens.

    Args:
        cu_seqlens: [N+1] where each document starts, and T; None: one document. Best on the host, where reading it
            waits for nothing.
        tokens: T.
        window: keys that a query sees, itself included; None: all.
        past: the number of tokens of the one document that came before; they have keys and values, and no queries.

    Attributes:
        positions: [T] int64, the position of each token in its document.
        first, last: [T] int32, the mask as our kernels take it: the first token that each one sees, and the last one
            that sees it, counted through the batch.
    """

    def __init__(self, cu_seqlens: Tensor | None, tokens: int, window: int | None, device: torch.device, past: int = 0):
        self.past = past
        starts = [0, past + tokens] if cu_seqlens is None else cu_seqlens.tolist()
        self.lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if not self.lengths or starts[0] != 0 or starts[-1] != past + tokens or min(self.lengths) < 1:
            raise ValueError(f"expected cu_seqlens to rise from 0 to the number of tokens, {tokens}; got {starts}")
        self.longest = max(self.lengths)
        # a window that no document exceeds changes nothing
        self.window = None if window is None or window >= self.longest else window
        bounds = [t[past:] for t in _mask_bounds(self.lengths, self.window)]
        vectors = [torch.tensor(starts, dtype=torch.int32), *bounds]
        # copies from pinned memory do not block
        if torch.device(device).type == "cuda":
            vectors = [t.pin_memory() for t in vectors]
        self.cu_seqlens, self.positions, self.first, self.last = (t.to(device, non_blocking=True) for t in vectors)
        self.capability = torch.cuda.get_device_capability(device) if self.first.is_cuda else None
        self.flash = flash_implementation(self.capability) if self.capability and varlen_attn is not None else None

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if self.capability is None:
            return attention(q_THD, k_TKD, v_TKD, self.first, self.last)
        # cuDNN plans anew for every length, and only round ones are likely to come again
        plain = len(self.lengths) == 1 and self.window is None and self.longest % 1024 == 0 and not self.past
        plain = (
            plain
            and not torch.compiler.is_compiling()
            and can_use_cudnn_attention(SDPAParams(*_sdpa_arguments(q_THD, k_TKD, v_TKD)))
        )
        backend = choose_backend(
            self.capability,
            q_THD.dtype,
            q_THD.shape[-1],
            plain=plain,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            flash=self.flash,
            varlen=varlen_attn is not None,
        )
        if not torch.compiler.is_compiling():
            _report(backend, q_THD.dtype, q_THD.shape[-1])
        return self.run(backend, q_THD, k_TKD, v_TKD)

    def of_qkv(self, layer: int, qkv_TN: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """The same of a fused buffer, whose queries and keys are rotated before; see `rope`."""
        return self(layer, *rope(qkv_TN, cos_TP, sin_TP, heads, kv_heads))

    def run(self, backend: str, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Attention by the back end of this name."""
        if backend == "own":
            return attention(q_THD, k_TKD, v_TKD, self.first, self.last)
        if backend == "cudnn":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                qkv = _sdpa_arguments(q_THD, k_TKD, v_TKD)[:-1]
                return F.scaled_dot_product_attention(*qkv, enable_gqa=True)[0].transpose(0, 1)
        return _varlen(q_THD, k_TKD, v_TKD, self.cu_seqlens, self.longest, self.window, self.past)


def _mask_bounds(lengths: list[int], window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token its position in its document, the first token that it sees, and the last one that sees it, the last
    two counted through the batch.
    """
    token = torch.arange(sum(lengths))
    before = torch.cat([torch.arange(length) for length in lengths])
    after = torch.cat([torch.arange(length - 1, -1, -1) for length in lengths])
    near = sum(lengths) if window is None else window - 1
    return before, (token - before.clamp(max=near)).int(), (token + after.clamp(max=near)).int()


def _varlen(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    window: int | None,
    past: int = 0,
) -> Tensor:
    if varlen_attn is None:
        raise RuntimeError("this build of torch has no varlen_attn")
    # its window counts the keys before the query: W keys in all are (W - 1, 0)
    left = -1 if window is None else window - 1
    # of fewer queries than keys, the last keys belong to the queries
    cu_seqlens_q = (cu_seqlens - past).clamp(min=0) if past else cu_seqlens
    lengths = (cu_seqlens_q, cu_seqlens, longest - past, longest)
    return varlen_attn(q_THD, k_TKD, v_TKD, *lengths, window_size=(left, 0), **VARLEN_OPTIONS)


def _sdpa_arguments(*qkv_THD: Tensor) -> tuple:
    """What torch's scaled_dot_product_attention takes for one document: [1, H, T, D], no mask, no dropout, causal,
    grouped.
    """
    return *(t.transpose(0, 1)[None] for t in qkv_THD), None, 0.0, True, True
