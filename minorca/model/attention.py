"""Which keys a query sees, and the back ends that compute attention.

One sentence defines the mask: position i sees j with 0 <= i - j < window, inside its own document. `visible` is that
sentence; every back end is tested against it. A tree is a document whose beginning, the prompt, is shared by branches:
the prompt and each branch are one document, and have its positions. Axes: T tokens, H query heads, K key/value heads,
D head size.

The network calls an *attend* object, `attend(layer, q_THD, k_TKD, v_TKD)`, that also knows the tokens' positions:
`PackedAttention` here, and those of the key/value cache in generate/kv_cache.py.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, restore_flash_attention_impl, sdpa_kernel
from torch.torch_version import TorchVersion

from minorca_kernels import attention, rope, rope_tables

log = logging.getLogger(__name__)


@functools.cache
def varlen_attn() -> Callable[..., Any] | None:
    """torch's attention of packed documents; None: this build of torch has none.

    It is imported by the first call: that takes a second, which a CPU need not spend.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    # torch 2.11 groups heads without being asked, and has no name for it
    grouped = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return functools.partial(varlen.varlen_attn, enable_gqa=True) if grouped else varlen.varlen_attn


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None) -> Tensor:
    """positions [Q] and [S] of one document -> bool [Q, S]: True where the query sees the key."""
    distance = q_positions[:, None] - k_positions[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Case(NamedTuple):
    """What the speed of a back end depends on.

    Attributes:
        plain: one document and no active window; torch's interface to cuDNN supports neither.
        training: a backward follows.
        deterministic: results must repeat to the bit, so nothing may depend on a measurement.
        flash: what `flash_implementation` put under varlen_attn.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    plain: bool
    training: bool
    deterministic: bool
    flash: str | None


def candidates(case: Case, capability: tuple[int, int], varlen: bool) -> list[str]:
    """The back ends that may run on a GPU of this capability: "FA3", "FA4", "varlen" (torch's FA2), "cudnn", and
    "own", our kernels, which run everywhere.

    Args:
        varlen: this build of torch has varlen_attn.
    """
    half = case.dtype in (torch.bfloat16, torch.float16)
    if case.deterministic or not half or case.head_dim % 8 or case.head_dim > 256 or capability < (8, 0):
        return ["own"]
    names = []
    # FA4 takes no larger heads
    if varlen and not (case.flash == "FA4" and case.head_dim > 128):
        names.append(case.flash or "varlen")
    if case.plain and case.head_dim <= 128:
        names.append("cudnn")
    return [*names, "own"]


@functools.cache
def fastest(case: Case) -> str:
    """The back end that takes least time here, measured once a process on 8,192 tokens.

    One that fails, or whose results are not those of our kernels, is logged and passed over.
    """
    names = candidates(case, torch.cuda.get_device_capability(case.device), varlen_attn() is not None)
    seconds = {}
    if len(names) > 1:
        # the modes and hooks of autograd and of activation checkpointing belong to a thread
        with ThreadPoolExecutor(1) as thread:
            seconds = thread.submit(_measure, names, case).result()
    choice = min(seconds, key=seconds.__getitem__, default="own")
    times = "".join(f", {name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    kind = f"{str(case.dtype).removeprefix('torch.')}, {case.heads} heads of {case.head_dim}"
    log.info("attention by %s (%s%s)", choice, kind, times)
    return choice


def _measure(names: list[str], case: Case) -> dict[str, float]:
    """Seconds by back end, of those that work."""
    seconds = {}
    for name in names:
        try:
            with torch.cuda.device(case.device):
                if name != "own":
                    _check(name, case)
                seconds[name] = _seconds(name, case)
        # an optional back end may raise anything
        except Exception as error:
            log.warning("attention by %s is not used: %s", name, str(error).partition("\n")[0])
    return seconds


@functools.cache
def flash_implementation(device: torch.device) -> str | None:
    """Activates FA3 or FA4 for varlen_attn, where its package is installed, made for this GPU and right.

    Returns:
        Its name; None: torch's FA2 stays.
    """
    name = {9: "FA3", 10: "FA4"}.get(torch.cuda.get_device_capability(device)[0])
    # before torch 2.13, FA4 refuses every window in backward
    if name is None or (name == "FA4" and TorchVersion(torch.__version__) < "2.13"):
        return None
    try:
        activate_flash_attention_impl(name)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_check, name, Case(device, torch.bfloat16, 4, 2, 128, False, True, False, name)).result()
    except ModuleNotFoundError:
        return None
    # one for another GPU or another torch may raise anything
    except Exception as error:
        log.warning("%s is installed but not used: %s", name, str(error).partition("\n")[0])
        restore_flash_attention_impl()
        return None
    return name


def _check(backend: str, case: Case) -> None:
    """Raises RuntimeError where a back end's results are not those of our kernels, within what rounding to bf16 leaves.

    Two documents and a window, or one document where the case has no others.
    """
    lengths, window = ([1024], None) if case.plain else ([200, 184], 64)
    ours, theirs = (_run(name, case, lengths, window)() for name in ("own", backend))
    norm = torch.linalg.vector_norm
    error = max((norm((a - b).float()) / norm(b.float())).item() for a, b in zip(theirs, ours, strict=True))
    # bf16 leaves about 0.003 in each result
    if not error <= 0.02:
        raise RuntimeError(f"its relative error against our own kernels is {error:.1g}")


def _seconds(backend: str, case: Case) -> float:
    """The least time of three runs, after two that plan and compile."""
    run = _run(backend, case, [8192] if case.plain else [1024] * 8, None)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize(case.device)
    return min(a.elapsed_time(b) for a, b in itertools.pairwise(events[2:])) / 1e3


def _run(backend: str, case: Case, lengths: list[int], window: int | None) -> Callable[[], list[Tensor]]:
    """A call of the back end on random values; it returns the output and, in training, the gradients."""
    tokens = sum(lengths)
    random = torch.Generator(case.device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(tokens, heads, case.head_dim, device=case.device, generator=random).to(case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    leaves = [t.requires_grad_(case.training) for t in (q, k, v)]
    attend = PackedAttention(torch.tensor([0, *itertools.accumulate(lengths)]), tokens, window, case.device)

    def run() -> list[Tensor]:
        out = attend.run(backend, *leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)] if case.training else [out]

    return run


class PackedAttention:
    """Causal attention inside each document of a flat batch of T tokens.

    Args:
        cu_seqlens: [N+1] where each document starts, and T; None: one document. Best on the host, where reading it
            waits for nothing.
        tokens: T.
        window: keys that a query sees, itself included; None: all.
        past: the number of tokens of the one document that came before; they have keys and values, and no queries.
        branches: of each document where its branches start, counted from its first token; the first of them ends the
            prompt. None, or empty for a document: it has none.

    Attributes:
        positions: [T] int64, the position of each token in its document. In a tree those of each branch go on from the
            prompt's.
        first, last: [T] int32, the mask as our kernels take it: the first token that each one sees, and the last one
            that sees it, counted through the batch.
        tree: [3, T] int32, the rest of it where a document has several branches, see `attention`; else None.
    """

    def __init__(
        self,
        cu_seqlens: Tensor | None,
        tokens: int,
        window: int | None,
        device: torch.device,
        past: int = 0,
        branches: list[list[int]] | None = None,
    ):
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
        if branches:
            _check_branches(branches, self.lengths)
            # one branch only continues its prompt
            if max(map(len, branches)) > 1:
                vectors[1:] = _tree_bounds(self.lengths, branches, self.window)
        # copies from pinned memory do not block
        if torch.device(device).type == "cuda":
            vectors = [t.pin_memory() for t in vectors]
        vectors = [t.to(device, non_blocking=True) for t in vectors]
        self.cu_seqlens, self.positions, self.first, self.last, *tree = vectors
        self.tree = tree[0] if tree else None

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        # the others know no trees, and tracing cannot measure
        if self.tree is not None or not q_THD.is_cuda or torch.compiler.is_compiling():
            return self.run("own", q_THD, k_TKD, v_TKD)
        device = q_THD.device
        # cuDNN plans anew for every length, and only round ones are likely to come again
        plain = len(self.lengths) == 1 and self.window is None and self.longest % 1024 == 0 and not self.past
        plain = plain and can_use_cudnn_attention(SDPAParams(*_sdpa_arguments(q_THD, k_TKD, v_TKD)))
        heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
        modes = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
        flash = flash_implementation(device) if varlen_attn() else None
        case = Case(device, q_THD.dtype, heads, kv_heads, q_THD.shape[2], plain, *modes, flash)
        return self.run(fastest(case), q_THD, k_TKD, v_TKD)

    def rope_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' positions, each [T, D/2]; see `rope_tables`."""
        return rope_tables(self.positions, head_dim, theta)

    def of_qkv(self, layer: int, qkv_TN: Tensor, cos_TP: Tensor, sin_TP: Tensor, heads: int, kv_heads: int) -> Tensor:
        """The same of a fused buffer, whose queries and keys are rotated before; see `rope`."""
        return self(layer, *rope(qkv_TN, cos_TP, sin_TP, heads, kv_heads))

    def run(self, backend: str, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Attention by the back end of this name."""
        if backend == "own":
            return attention(q_THD, k_TKD, v_TKD, self.first, self.last, self.tree)
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


def _check_branches(branches: list[list[int]], lengths: list[int]) -> None:
    if len(branches) != len(lengths):
        raise ValueError(f"expected branches of each of {len(lengths)} documents, got those of {len(branches)}")
    for index, (starts, length) in enumerate(zip(branches, lengths)):
        edges = [0, *starts, length]
        if any(stop <= start for start, stop in itertools.pairwise(edges)):
            message = f"expected the branches of document {index} to start at rising numbers from 1 to {length - 1}"
            raise ValueError(f"{message}, got {starts}")


def _tree_bounds(
    lengths: list[int], branches: list[list[int]], window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_mask_bounds` of documents some of which are trees, and what our kernels take of a tree, [3, T]."""
    near = sum(lengths) if window is None else window - 1
    begins = [0, *itertools.accumulate(lengths)]
    # by numpy, whose arrays have values where tensors are fake
    bounds = [
        _document_bounds(length, starts, near) + np.array([[0], *[[begin]] * 5])
        for begin, length, starts in zip(begins, lengths, branches)
    ]
    positions, *others = torch.from_numpy(np.concatenate(bounds, 1))
    first, last, *tree = (t.int() for t in others)
    return positions, first, last, torch.stack(tree)


def _document_bounds(length: int, starts: list[int], near: int) -> np.ndarray:
    """Of each token of a document [6, length], counted from its first one: position, first, last, hidden_begin,
    hidden_end, reach. A token sees `near` positions before its own.
    """
    # a document without branches is a prompt with an empty one
    edges = [*(starts or [length]), length]
    prompt = edges[0]
    sizes = np.diff([0, *edges])
    token = np.arange(length)
    # of each token where its branch starts and ends; the prompt's tokens are in the first
    start = np.repeat([prompt, *edges[:-1]], sizes)
    stop = np.repeat([edges[1], *edges[1:]], sizes)
    shift = start - prompt
    position = token - shift
    earliest = np.maximum(position - near, 0)
    first = np.where(earliest < prompt, earliest, earliest + shift)
    hides = (shift > 0) & (earliest < prompt)
    hidden_begin = np.where(hides, prompt, first)
    hidden_end = np.where(hides, start, first)
    reach = np.minimum(token + near, stop - 1)
    last = reach.copy()
    # of each of the prompt's tokens the last position that sees it, counted from the prompt's end
    end = token[:prompt] + near - prompt
    last[:prompt] = np.where(end < 0, reach[:prompt], np.minimum(edges[-2] + end, length - 1))
    reach[:prompt] = length - 1
    for begin, after in reversed(list(itertools.pairwise(edges))):
        reach[:prompt] = np.where(begin + end < after - 1, begin + end, reach[:prompt])
    return np.stack([position, first, last, hidden_begin, hidden_end, reach])


def _varlen(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    window: int | None,
    past: int = 0,
) -> Tensor:
    attend = varlen_attn()
    if attend is None:
        raise RuntimeError("this build of torch has no varlen_attn")
    # its window counts the keys before the query: W keys in all are (W - 1, 0)
    left = -1 if window is None else window - 1
    # of fewer queries than keys, the last keys belong to the queries
    cu_seqlens_q = (cu_seqlens - past).clamp(min=0) if past else cu_seqlens
    lengths = (cu_seqlens_q, cu_seqlens, longest - past, longest)
    return attend(q_THD, k_TKD, v_TKD, *lengths, window_size=(left, 0))


def _sdpa_arguments(*qkv_THD: Tensor) -> tuple:
    """What torch's scaled_dot_product_attention takes for one document: [1, H, T, D], no mask, no dropout, causal,
    grouped.
    """
    return *(t.transpose(0, 1)[None] for t in qkv_THD), None, 0.0, True, True
