"""The benchmarked cases: each kernel at a network's shapes, with its inputs, peers, minimal work and target.

The minimal bytes are every input read once and every result written once. Attention's FLOPs count the visible pairs
alone: 4 D for each query head and pair in forward, 2.5 times that in backward, as FlashAttention-2 (arXiv:2307.08691).
"""

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention

import minorca_kernels as ours
from minorca.model.attention import PackedAttention

# bytes of a bf16 element
BYTES = 2
EPS = 1e-5
# alpha / rank
SCALE = 2.0
DROPOUT = 0.05


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MISTRAL_7B = Shape(4096, 14336, 32, 8, 128, 32768)
NEMO = Shape(5120, 14336, 32, 8, 128, 131072)
SMOLLM2 = Shape(576, 1536, 9, 3, 64, 49152)
TINY = Shape(64, 96, 4, 2, 16, 128)


@dataclass(frozen=True)
class Case:
    """One row of the table. Inputs that require a gradient are differentiated, the others are frozen.

    Attributes:
        direction: "forward"; "backward", of outputs computed before; or "both", where forward computes the gradient.
        inputs: creates the inputs on a device in a dtype.
        providers: implementations by name, functions of the inputs: "ours", "plain" (the definition), and peers.
        limit: "copy" (bytes a second of a copy), "matmul" (FLOP/s of a matrix product), or "base" (the time of the
            provider of that name, a projection without its adapters).
        targets: fractions of the limit to reach, by provider.
        bytes: minimal bytes read and written.
        flops: minimal floating-point operations; 0 where memory is the limit.
    """

    kernel: str
    direction: str
    shape: str
    inputs: Callable[[torch.device, torch.dtype], tuple]
    providers: dict[str, Callable]
    limit: str
    targets: dict[str, float]
    bytes: int
    flops: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.direction}, {self.shape}"


def _liger(module: str, name: str) -> Callable:
    """An operation of Liger-Kernel, imported when called, so that it need not be installed."""

    def call(*arguments):
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply(*arguments)

    return call


def _trained(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def norms(shape: Shape, tokens: int) -> Iterator[Case]:
    stream = BYTES * tokens * shape.hidden
    name = f"{tokens} x {shape.hidden}"

    def inputs(count: int) -> Callable:
        def make(device, dtype):
            rows = [_trained(torch.randn(tokens, shape.hidden, device=device, dtype=dtype)) for _ in range(count)]
            return *rows, 1 + 0.1 * torch.randn(shape.hidden, device=device, dtype=dtype), EPS

        return make

    alone = {
        "ours": ours.rms_norm,
        "plain": ours.rms_norm_definition,
        "torch": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
        "liger": lambda x, weight, eps: _liger("rms_norm", "LigerRMSNormFunction")(x, weight, eps, 0.0, "llama", False),
    }
    added = {
        "ours": ours.add_rms_norm,
        "plain": ours.add_rms_norm_definition,
        "liger": lambda x, update, weight, eps: _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")(
            x, update, weight, eps, 0.0, "llama", False
        )[::-1],
    }
    # one fp32 number a row, kept for backward
    sums = 4 * tokens
    yield Case("RMSNorm", "forward", name, inputs(1), alone, "copy", {"ours": 0.92}, 2 * stream + sums)
    yield Case("add + RMSNorm", "forward", name, inputs(2), added, "copy", {"ours": 0.94}, 4 * stream + sums)
    yield Case("RMSNorm", "backward", name, inputs(1), alone, "copy", {"ours": 0.90}, 3 * stream + sums)
    yield Case("add + RMSNorm", "backward", name, inputs(2), added, "copy", {"ours": 0.90}, 4 * stream + sums)


def ropes(shape: Shape, tokens: int) -> Iterator[Case]:
    heads = shape.heads
    kv_heads = shape.kv_heads
    size = shape.head_dim

    def inputs(device, dtype):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
        return _trained(qkv), *ours.rope_tables(torch.arange(tokens, device=device), size, 1e6), heads, kv_heads

    def liger(qkv, cos, sin, heads, kv_heads):
        q, k, v = qkv.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], 1)
        heads_first = (t.transpose(0, 1)[None] for t in (q, k))
        q, k = _liger("rope", "LigerRopeFunction")(*heads_first, cos[None], sin[None], None, 1, size)
        return q[0].transpose(0, 1), k[0].transpose(0, 1), v

    providers = {"ours": ours.rope, "plain": ours.rope_definition, "liger": liger}
    name = f"{tokens} x ({heads} + {kv_heads}) x {size}"
    tables = 2 * 4 * tokens * size // 2
    # queries, keys and values, read and written
    size_bytes = 2 * BYTES * tokens * (heads + 2 * kv_heads) * size + tables
    yield Case("RoPE", "forward", name, inputs, providers, "copy", {"ours": 0.90}, size_bytes)
    yield Case("RoPE", "backward", name, inputs, providers, "copy", {"ours": 0.90}, size_bytes)


def swiglus(shape: Shape, tokens: int) -> Iterator[Case]:
    providers = {
        "ours": ours.swiglu,
        "plain": ours.swiglu_definition,
        "liger": _liger("swiglu", "LigerFusedGateUpSiLUMulFunction"),
    }

    def inputs(device, dtype):
        return (_trained(torch.randn(tokens, 2 * shape.inner, device=device, dtype=dtype)),)

    part = BYTES * tokens * shape.inner
    name = f"{tokens} x {shape.inner}"
    yield Case("SwiGLU", "forward", name, inputs, providers, "copy", {"ours": 0.97}, 3 * part)
    yield Case("SwiGLU", "backward", name, inputs, providers, "copy", {"ours": 0.92}, 5 * part)


def ropes_into_cache(shape: Shape, sequences: int) -> Iterator[Case]:
    """One token of each sequence, whose key and value go into a buffer of 1,024 positions."""
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_dim

    def inputs(device, dtype):
        qkv = torch.randn(sequences, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
        caches = [torch.zeros(sequences * 1024, kv_heads, size, device=device, dtype=dtype) for _ in range(2)]
        index = torch.arange(sequences, device=device) * 1024
        return qkv, *ours.rope_tables(index, size, 1e6), *caches, index

    def with_caches(function: Callable) -> Callable:
        return lambda qkv, cos, sin, k, v, index: (function(qkv, cos, sin, k, v, index), k, v)

    providers = {
        "ours": with_caches(ours.rope_into_cache),
        "plain": with_caches(ours.rope_into_cache_definition),
    }
    # queries, keys and values, read and written
    size_bytes = sequences * (2 * BYTES * (heads + 2 * kv_heads) + 4) * size
    name = f"{sequences} x ({heads} + {kv_heads}) x {size}"
    yield Case("RoPE into cache", "forward", name, inputs, providers, "copy", {}, size_bytes)


def draws(shape: Shape, rows: int) -> Iterator[Case]:
    """The next token of each row. Logits are fp32 in every dtype; settings are columns of tables, as in the engine."""

    def inputs(device, dtype):
        logits = 4 * torch.randn(rows, shape.vocabulary, device=device)
        temperature = torch.full((rows, 6), 0.7, device=device)[:, 0]
        seed = torch.arange(4 * rows, device=device).view(rows, 4)[:, 0]
        return logits, temperature, seed, torch.arange(rows, device=device)

    providers = {"ours": ours.draw, "plain": ours.draw_definition}
    size = 4 * rows * shape.vocabulary
    yield Case("draw", "forward", f"{rows} x {shape.vocabulary}", inputs, providers, "copy", {}, size)


def _projection_sizes(shape: Shape) -> dict[str, tuple[int, list[int]]]:
    """(columns, rows of each adapter) of the frozen projections."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": (shape.hidden, [queries, keys, keys]),
        "o": (queries, [shape.hidden]),
        "gate_up": (shape.hidden, [shape.inner, shape.inner]),
        "down": (shape.inner, [shape.hidden]),
    }


def dequantizations(shape: Shape) -> Iterator[Case]:
    """The frozen projections' weights, read back from NF4 with double quantization; the largest also without."""
    for name, (columns, rows) in _projection_sizes(shape).items():
        # each row is made of whole blocks
        if columns % 64 == 0:
            yield _dequantization(name, columns, rows, True)
    yield _dequantization("gate_up, absmax in fp32", *_projection_sizes(shape)["gate_up"], False)


def _dequantization(name: str, columns: int, rows: list[int], double_quant: bool) -> Case:
    def inputs(device, dtype):
        weight = ours.NF4Weight(rows, columns, dtype, double_quant, device=device)
        # the meta device has no values
        for part in range(len(rows) if device.type != "meta" else 0):
            weight.store_part(part, lambda start, stop: torch.randn(stop - start, columns, device=device, dtype=dtype))
        # the second's dtype is that of the result
        return weight, torch.empty(0, device=device, dtype=dtype), functools.cache(lambda: _bitsandbytes(weight))

    def plain(weight, like, _):
        parts = (weight.quantized_part(part) for part in range(len(rows)))
        return torch.cat([part.dequantize(like.dtype).view(-1, columns) for part in parts])

    providers: dict[str, Callable] = {
        "ours": lambda weight, like, _: ours.dequantize_nf4(weight.tensors(), like.dtype),
        "plain": plain,
    }
    if len(rows) == 1:
        providers["bitsandbytes"] = lambda weight, like, call: call()()
    total = sum(rows) * columns
    size = total // 2 + BYTES * total + (total // 64 + total // 4096 if double_quant else total // 16)
    # below 64 MiB, launching takes most of the time
    targets = {"ours": 0.88} if size >= 2**26 else {}
    return Case("NF4", "forward", f"{name}, {sum(rows)} x {columns}", inputs, providers, "copy", targets, size)


def _bitsandbytes(weight: ours.NF4Weight) -> Callable:
    """What reads back a weight of one part, of the same bytes."""
    functional = importlib.import_module("bitsandbytes.functional")
    codes, absmax, nested_absmax, offset = weight.quantized_part(0)
    nested = functional.QuantState(nested_absmax, None, functional.create_dynamic_map().to(codes.device), 256)
    nested.dtype = torch.float32
    shape = torch.Size([weight.out_features, weight.in_features])
    state = functional.QuantState(absmax, shape, None, 64, "nf4", weight.dtype, offset, nested)
    return lambda: functional.dequantize_4bit(codes[:, None], state)


def projections(shape: Shape, tokens: int, rank: int) -> Iterator[Case]:
    """The frozen projections, each with LoRA; `down` also with SwiGLU as its input, computed in the same operation."""
    sizes = _projection_sizes(shape)
    for name in sizes:
        yield from _projection(name, tokens, *sizes[name], rank)
    yield from _projection("down of SwiGLU", tokens, *sizes["down"], rank, of_swiglu=True)


def norm_projections(shape: Shape, tokens: int, rank: int) -> Iterator[Case]:
    """Those whose input is a norm, computed in the same operation, as is the residual sum before it."""
    sizes = _projection_sizes(shape)
    for name in ("qkv", "gate_up"):
        yield from _projection(f"{name} of add + RMSNorm", tokens, *sizes[name], rank, of_norm=True)


def dropout_projections(shape: Shape, tokens: int, rank: int) -> Iterator[Case]:
    """Two of them with dropout."""
    sizes = _projection_sizes(shape)
    label = f"with dropout {DROPOUT}"
    yield from _projection(f"qkv {label}", tokens, *sizes["qkv"], rank, dropout=DROPOUT)
    yield from _projection(f"down of SwiGLU {label}", tokens, *sizes["down"], rank, of_swiglu=True, dropout=DROPOUT)


def _projection(
    name: str,
    tokens: int,
    columns: int,
    rows: list[int],
    rank: int,
    of_swiglu: bool = False,
    of_norm: bool = False,
    dropout: float = 0.0,
) -> Iterator[Case]:
    def inputs(device, dtype):
        def normal(*size, scale=0.02):
            return torch.randn(*size, device=device, dtype=dtype) * scale

        adapters, start = [], 0
        for count in rows:
            a, b = _trained(normal(rank, columns)), _trained(normal(count, rank))
            adapters.append(ours.Adapter(start, start + count, a, b, seed=start))
            start += count
        w = normal(start, columns)
        dense = ours.DenseWeight(w)
        padded = ours.PaddedWeight(w, rank * len(rows))
        x = [_trained(normal(tokens, columns * (1 + of_swiglu), scale=1)) for _ in range(1 + of_norm)]
        return [*x, 1 + normal(columns), EPS] if of_norm else x, dense, adapters, SCALE, padded

    def lora_linear(strategy: str | None) -> Callable:
        def call(x, dense, adapters, scale, padded):
            # the default as in minorca/model/lora.py
            pays = strategy is None and ours.padding_pays(sum(rows), columns, rank * len(rows), of_swiglu or of_norm)
            weight = padded if pays or strategy == "augmented" else dense
            update = {"adapters": adapters, "scale": scale, "dropout": dropout}
            if of_norm:
                return ours.norm_lora_linear(*x, weight=weight, **update)
            return ours.lora_linear(*x, weight=weight, of_swiglu=of_swiglu, strategy=strategy, **update)

        return call

    def plain(x, dense, adapters, scale, _):
        update = {"w_NK": dense.weight, "adapters": adapters, "scale": scale, "dropout": dropout}
        if of_norm:
            return ours.norm_lora_linear_definition(*x, **update)
        return ours.lora_linear_definition(*x, of_swiglu=of_swiglu, **update)

    def base(x, dense, *_):
        if of_norm:
            total, normed = ours.add_rms_norm(*x)
            return total, dense.linear(normed)
        return dense.linear(ours.swiglu(*x) if of_swiglu else x[0])

    providers = {"ours": lora_linear(None), "plain": plain, "base": base}
    if not (of_norm or dropout):
        providers |= {strategy: lora_linear(strategy) for strategy in ours.STRATEGIES}
    shape, total = f"{tokens} x {columns} -> {sum(rows)}, rank {rank}", sum(rows)
    # tensors of x's size, read or written: in forward also the update and the sum, in backward also the sum's gradient
    forward, backward = (3, 3) if of_norm else (1 + of_swiglu, 2 + 2 * of_swiglu)
    forward_bytes, backward_bytes = (
        BYTES * (count * tokens * columns + total * columns + tokens * total) for count in (forward, backward)
    )
    flops, low = 2 * tokens * columns * total, 2 * tokens * rank * (len(rows) * columns + total)
    kernel = f"LoRA {name}"
    yield Case(kernel, "forward", shape, inputs, providers, "base", {"ours": 1 / 1.04}, forward_bytes, flops + low)
    if rank == 16:
        yield Case(
            kernel, "backward", shape, inputs, providers, "base", {"ours": 1 / 1.06}, backward_bytes, flops + 2 * low
        )


def losses(shape: Shape, tokens: int) -> Iterator[Case]:
    def inputs(device, dtype):
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype) * shape.hidden**-0.5
        return _trained(x), weight, torch.randint(shape.vocabulary, (tokens,), device=device)

    providers = {
        "ours": lambda *arguments: ours.linear_cross_entropy(*arguments).sum(),
        "plain": lambda *arguments: ours.linear_cross_entropy_definition(*arguments).sum(),
        # the arguments between are Liger's defaults: no bias, no class weights and so on
        "liger": lambda x, weight, targets: _liger(
            "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
        )(x, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0],
    }
    name = f"{tokens} x {shape.hidden} -> {shape.vocabulary}"
    size = BYTES * (2 * tokens * shape.hidden + shape.vocabulary * shape.hidden)
    # logits and the hidden states' gradient: the head is frozen
    flops = 4 * tokens * shape.hidden * shape.vocabulary
    yield Case("cross-entropy", "both", name, inputs, providers, "matmul", {"ours": 0.90}, size, flops)


def _varlen(longest: int, window: int | None, implementation: str | None) -> Callable:
    """torch's varlen attention: FlashAttention-2, or the implementation activated in its place."""

    def call(q, k, v, first, last, cu_seqlens):
        # missing in some builds of torch
        from torch.nn.attention.varlen import varlen_attn

        # stays active, since backward needs it too
        if implementation != attention.current_flash_attention_impl():
            if implementation:
                attention.activate_flash_attention_impl(implementation)
            else:
                attention.restore_flash_attention_impl()
        left = -1 if window is None else window - 1
        options: dict[str, Any] = {}
        # torch 2.11 always groups heads, without an option
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(left, 0), **options)

    return call


def _cudnn(q, k, v, first, last, cu_seqlens):
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def attentions(shape: Shape, lengths: list[int], window: int | None) -> Iterator[Case]:
    """Causal attention within documents of these lengths, where a query sees at most `window` keys."""
    tokens = sum(lengths)
    reach = window or max(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    start, stop = (edges.repeat_interleave(torch.tensor(lengths)) for edges in (cu_seqlens[:-1], cu_seqlens[1:]))
    token = torch.arange(tokens)
    first = torch.maximum(start, token - reach + 1)
    last = torch.minimum(stop, token + reach) - 1
    pairs = int((token - first + 1).sum())

    def inputs(device, dtype):
        counts = shape.heads, shape.kv_heads, shape.kv_heads
        qkv = [_trained(torch.randn(tokens, count, shape.head_dim, device=device, dtype=dtype)) for count in counts]
        return *qkv, *(t.int().to(device) for t in (first, last, cu_seqlens))

    providers = {
        "ours": lambda q, k, v, first, last, cu_seqlens: ours.attention(q, k, v, first, last),
        "plain": lambda q, k, v, first, last, cu_seqlens: ours.attention_definition(q, k, v, first),
        **({"cudnn": _cudnn} if len(lengths) == 1 and not window else {}),
        "varlen": _varlen(max(lengths), window, None),
        "fa3": _varlen(max(lengths), window, "FA3"),
    }
    name = f"{len(lengths)} x {lengths[0]}{f', window {window}' if window else ''}"
    # queries, keys, values and results
    size = BYTES * tokens * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    flops = 4 * shape.head_dim * shape.heads * pairs
    forward = {"ours": 0.55, "fa3": 0.80}
    backward = {"ours": 0.42, "fa3": 0.68}
    yield Case("attention", "forward", name, inputs, providers, "matmul", forward, size, flops)
    yield Case("attention", "backward", name, inputs, providers, "matmul", backward, 2 * size, 5 * flops // 2)


def tree_attentions(shape: Shape, tokens: int) -> Iterator[Case]:
    """Attention over 16 trees, each of a prompt and two branches of half its length."""
    lengths = [tokens // 16] * 15 + [tokens - tokens // 16 * 15]
    branches = [[length // 2, 3 * length // 4] for length in lengths]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    attend = PackedAttention(cu_seqlens, tokens, None, torch.device("cpu"), branches=branches)
    assert attend.tree is not None
    mask = attend.first, attend.last, attend.tree
    hidden = attend.tree[1] - attend.tree[0]
    pairs = int((torch.arange(tokens) - attend.first + 1 - hidden).sum())

    def inputs(device, dtype):
        counts = shape.heads, shape.kv_heads, shape.kv_heads
        qkv = [_trained(torch.randn(tokens, count, shape.head_dim, device=device, dtype=dtype)) for count in counts]
        return *qkv, *(t.to(device) for t in mask)

    providers = {
        "ours": ours.attention,
        "plain": lambda q, k, v, first, last, tree: ours.attention_definition(q, k, v, first, tree),
    }
    name = f"16 trees of {lengths[0] // 2} + 2 x {lengths[0] // 4}"
    size = BYTES * tokens * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    flops = 4 * shape.head_dim * shape.heads * pairs
    yield Case("attention", "forward", name, inputs, providers, "matmul", {}, size, flops)
    yield Case("attention", "backward", name, inputs, providers, "matmul", {}, 2 * size, 5 * flops // 2)


def decoding(shape: Shape, sequences: int, positions: int) -> Iterator[Case]:
    """One query for each sequence, and the keys and values of `positions`, in pages that lie in no order."""
    page = min(128, positions)
    places = positions // page

    def inputs(device, dtype):
        q = torch.randn(sequences, shape.heads, shape.head_dim, device=device, dtype=dtype)
        k, v = (
            torch.randn(sequences * places, page, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
        table = torch.randperm(sequences * places, device=device).view(sequences, places).int()
        return q, k, v, table, torch.full((sequences,), positions, device=device)

    def sdpa(q, k, v, table, lengths):
        # as if they lay in order: torch's reads no tables
        k, v = (t.view(sequences, positions, *t.shape[2:]).transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    providers = {"ours": ours.decode_attention, "plain": ours.decode_attention_definition, "torch": sdpa}
    size = 2 * BYTES * sequences * positions * shape.kv_heads * shape.head_dim
    name = f"{sequences} x {positions}"
    # below 64 MiB, launching takes most of the time
    targets = {"ours": 0.80} if size >= 2**26 else {}
    yield Case("decode attention", "forward", name, inputs, providers, "copy", targets, size)


def cases(
    shape: Shape = MISTRAL_7B, tokens: int = 8192, window: int = 4096, small: tuple[int, ...] = (512, 8)
) -> Iterator[Case]:
    """The cases with targets, of `tokens` tokens, then those without."""
    yield from norms(shape, tokens)
    yield from ropes(shape, tokens)
    yield from swiglus(shape, tokens)
    yield from projections(shape, tokens, 16)
    yield from dequantizations(shape)
    yield from losses(shape, tokens)
    for lengths, reach in (([tokens], None), ([2 * tokens], window), ([tokens // 16] * 16, None)):
        yield from attentions(shape, lengths, reach)
    for sequences in (1, 8, 32):
        yield from decoding(shape, sequences, window)
    for sequences in (1, 8, 32):
        yield from ropes_into_cache(shape, sequences)
        yield from draws(shape, sequences)
    others = itertools.chain(
        norm_projections(shape, tokens, 16),
        dropout_projections(shape, tokens, 16),
        projections(shape, tokens, 64),
        tree_attentions(shape, tokens),
        *(norms(shape, count) for count in small),
    )
    yield from (replace(case, targets={}) for case in others)
