"""Compares every kernel with the device's limits and with plain PyTorch: python -m benchmarks.kernels [--output FOLDER]

The limits are measured in the same run: the bandwidth of a copy of 1 GiB, and the sustained rate of matrix products.
Times are measured on the device between two events, of a CUDA graph where a call is short, with the L2 cache flushed
before. Inputs are random. The providers, beside ours and our peers: "plain" is the definition, "compiled" the
definition under torch.compile, "copy" a copy of the case's minimal bytes (the limit at that size, launching included),
"base" the projection without adapters.

Results are compared with the definition in fp32: the error of ours may be at most twice that of the definition in the
same dtype. Failures, and what is left when --seconds have passed, are reported as such.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.cases import TINY, Case, cases
from benchmarks.common import DEVICE, clock, report
from benchmarks.compiled import recorded
from benchmarks.device import copy_bandwidth, matmul_rate
from minorca.train.metrics import peak_flops
from minorca_kernels import DenseWeight

CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
# seconds; a longer call hides the time to launch its kernels
SHORT_CALL = 2e-3
# bytes a second, from datasheets
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}


def timed_part(case: Case, function: Callable, inputs: tuple) -> Callable:
    """The part of a case that is timed, as a call that returns its results: outputs, gradients, or both."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if case.direction == "forward":
        return torch.no_grad()(lambda: tree_leaves(function(*inputs)))

    def gradients(outs: list[Tensor], douts: list[Tensor] | None, retain_graph: bool) -> list[Tensor]:
        # the bare projection leaves its adapters unused
        found = torch.autograd.grad(outs, leaves, douts, retain_graph=retain_graph, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    def both():
        loss = function(*inputs)
        return [loss.detach(), *gradients([loss], None, False)]

    if case.direction == "both":
        return both
    # Views count as what a network computed, and leaves do not: a backward that overwrites its input copies those.
    # Autograd is not told that values change from call to call.
    inputs = tree_map(lambda t: t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t, inputs)
    outs = tree_leaves(function(*inputs))
    torch.manual_seed(1)
    douts = [torch.randn(out.shape, device=out.device, dtype=DTYPE).to(out.dtype) for out in outs]

    def backward():
        with _unsafe_preserve_version_counter(tuple(leaves)):
            return gradients(outs, douts, True)

    return backward


def random_inputs(case: Case) -> tuple:
    torch.manual_seed(0)
    return case.inputs(DEVICE, DTYPE)


def reference_results(case: Case) -> list[Tensor]:
    """The definition's results in fp32."""

    def to_fp32(leaf):
        if isinstance(leaf, DenseWeight):
            return DenseWeight(leaf.weight.detach().float())
        if isinstance(leaf, Tensor) and leaf.dtype == DTYPE:
            return leaf.detach().float().requires_grad_(leaf.requires_grad)
        return leaf

    return timed_part(case, case.providers["plain"], tree_map(to_fp32, random_inputs(case)))()


def error(results: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative error among the results, in the 2-norm, in fp32."""
    norm = torch.linalg.vector_norm
    # the results of `draw` are indices
    pairs = [(result.float(), expected.float()) for result, expected in zip(results, reference, strict=True)]
    tiny = torch.finfo(torch.float32).tiny
    return max((norm(result - expected) / norm(expected).clamp(min=tiny)).item() for result, expected in pairs)


def as_graph(call: Callable) -> Callable:
    """The call captured as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def measure_time(call: Callable, repeats: int | None) -> dict:
    """Seconds of a call that has run before: median, and the 20th and 80th percentile."""
    start = clock()
    call()
    once = clock() - start
    repeats = repeats or min(max(int(0.05 / once), 10), 50)
    graph = False
    seconds = []
    if not CUDA:
        for _ in range(repeats):
            start = clock()
            call()
            seconds.append(clock() - start)
    else:
        if once < SHORT_CALL:
            # a call that synchronises with the device cannot be captured
            with contextlib.suppress(RuntimeError):
                call = as_graph(call)
                graph = True
        cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            # a read: a write would leave modified lines, which the timed call would have to write back
            cache.sum()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        seconds = [before.elapsed_time(after) / 1e3 for before, after in events]
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles).tolist()
    return {"seconds": {"median": median, "p20": p20, "p80": p80}, "graph": graph}


def measure(case: Case, function: Callable, reference: list[Tensor] | None, repeats: int | None) -> dict:
    """A provider's time and error, and the resources of the Triton kernels that it launches."""
    with recorded(warmup=False) as kernels:
        call = timed_part(case, function, random_inputs(case))
        results = call()
    row: dict[str, Any] = {"error": error(results, reference) if reference else None}
    del results
    row["kernels"] = [
        {
            "name": kernel.metadata.name,
            "warps": kernel.metadata.num_warps,
            "registers": kernel.n_regs,
            "spills": kernel.n_spills,
            "shared": kernel.metadata.shared,
        }
        for kernel in {kernel.hash: kernel for kernel in kernels}.values()
    ]
    return row | measure_time(call, repeats)


def measure_compiled(case: Case, repeats: int | None) -> dict:
    """The definition under torch.compile."""
    # forgets other shapes, so that no dimension becomes dynamic
    torch._dynamo.reset()
    return measure(case, torch.compile(case.providers["plain"]), None, repeats)


def measure_copy(case: Case, repeats: int | None) -> dict:
    """A copy that reads and writes the case's minimal bytes."""
    source = torch.empty(case.bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return measure_time(lambda: target.copy_(source), repeats)


def attempt(function: Callable, *arguments) -> Any:
    """The function's result, or {"failed": the first line of its error}."""
    try:
        return function(*arguments)
    # a peer may raise anything; the table continues without it
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        if CUDA:
            torch.cuda.empty_cache()


def add_rates(row: dict, case: Case, limits: dict, base_seconds: float | None) -> None:
    """Adds the row's rates, and their fractions of the measured limits and of the datasheet's."""
    seconds = row["seconds"]["median"]
    row["bytes_per_second"] = case.bytes / seconds
    row["flops_per_second"] = case.flops / seconds if case.flops else None
    row["of_copy"] = row["bytes_per_second"] / limits["copy_bytes_per_second"]
    row["of_matmul"] = row["flops_per_second"] / limits["matmul_bf16"]["flops_per_second"] if case.flops else None
    row["of_base"] = base_seconds / seconds if base_seconds else None
    rate = "bytes_per_second" if case.limit == "copy" else "flops_per_second"
    peak = limits["datasheet"][rate]
    row["of_datasheet"] = row[rate] / peak if peak else None
    row["reached"] = row[f"of_{case.limit}"]


def table(selected: list[Case], limits: dict, repeats: int | None, compiling: bool, deadline: float) -> list[dict]:
    """A row for each case and provider. Compiled definitions come last: compiling takes longest."""
    rows = []

    def add(case: Case, provider: str, function: Callable, *arguments) -> None:
        row = attempt(function, *arguments) if time.monotonic() < deadline else {"skipped": "no time left"}
        about = {"kernel": case.kernel, "direction": case.direction, "shape": case.shape, "provider": provider}
        about |= {"limit": case.limit, "target": case.targets.get(provider), "bytes": case.bytes, "flops": case.flops}
        rows.append(about | row)
        print(case.name, provider, row.get("seconds") or row, file=sys.stderr, flush=True)

    for case in selected:
        reference = None
        failure = "no time left"
        if time.monotonic() < deadline:
            result = attempt(reference_results, case)
            if isinstance(result, dict):
                failure = result["failed"]
            else:
                reference = result
        for provider, function in case.providers.items():
            add(case, provider, measure, case, function, reference if provider != "base" else None, repeats)
            if provider == "ours" and reference is None:
                rows[-1]["unchecked"] = failure
        if case.limit == "copy":
            add(case, "copy", measure_copy, case, repeats)
    for case in selected:
        # attention's definition stores every score, so compiling it is not a realistic alternative
        if compiling and case.targets and case.kernel != "attention":
            add(case, "compiled", measure_compiled, case, repeats)
    for case in selected:
        name = {"kernel": case.kernel, "direction": case.direction, "shape": case.shape}
        timed = {row["provider"]: row for row in rows if "seconds" in row and name.items() <= row.items()}
        for row in timed.values():
            add_rates(row, case, limits, timed["base"]["seconds"]["median"] if "base" in timed else None)
        if "plain" in timed and "ours" in timed and timed["ours"]["error"] is not None:
            bound = 2 * timed["plain"]["error"] + torch.finfo(DTYPE).eps
            timed["ours"]["wrong"] = not timed["ours"]["error"] <= bound
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Compares every kernel with the device's limits."
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write the JSON to this folder")
    parser.add_argument("--only", metavar="NAME", help="cases whose name contains it, as in 'RMSNorm backward'")
    parser.add_argument(
        "--seconds", type=float, default=105, metavar="N", help="start no measurement after N seconds; default: 105"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="test the script: tiny sizes, two repeats, no torch.compile"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    selected = list(cases(TINY, 64, window=16, small=(8,)) if args.smoke else cases())
    selected = [case for case in selected if (args.only or "") in case.name]
    limits = {"copy_bytes_per_second": copy_bandwidth(), "matmul_bf16": matmul_rate(DTYPE)}
    name = torch.cuda.get_device_name() if CUDA else ""
    bandwidth = next((peak for known, peak in PEAK_BANDWIDTH.items() if known in name), None)
    limits["datasheet"] = {"bytes_per_second": bandwidth, "flops_per_second": peak_flops(DEVICE, DTYPE)}
    if CUDA:
        # backward runs on forward's stream, and the default stream cannot be captured
        torch.cuda.set_stream(torch.cuda.Stream())
    # compiled backwards are called more than once
    functorch_config.donated_buffer = False
    rows = table(selected, limits, 2 if args.smoke else None, not args.smoke, deadline)
    settings = {"device_type": DEVICE.type, "dtype": str(DTYPE).removeprefix("torch."), "smoke": args.smoke}
    report({**settings, **limits, "rows": rows}, "kernels", args.output)
    if wrong := [f"{row['kernel']} {row['direction']}, {row['shape']}" for row in rows if row.get("wrong")]:
        sys.exit(f"benchmarks.kernels: error: less accurate than allowed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
