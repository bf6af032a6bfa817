"""Every kernel against the device's limits, and against the same in plain PyTorch: python -m benchmarks.kernels [--output FOLDER]

The limits are measured in the same run: what a copy of 1 GiB reads and writes a second, and what matrix products sustain. A time is
the device's own, from one event to the next, the call between them a CUDA graph where it is short, with the L2 cache flushed
before; inputs are random. "plain" is the definition as it stands, "compiled" torch.compile's of it, "copy" a copy of as many bytes
as the case needs at least (what launching leaves of the limit at that size), "base" the projection without adapters.

Results are checked against the definition in fp32: ours may be at most twice as far from it as the definition in the same dtype.
What fails, or is not reached before --seconds are over, is written down as such.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.cases import TINY, Case, cases
from benchmarks.common import DEVICE, clock, report
from benchmarks.compiled import recorded
from benchmarks.device import copy_bandwidth, matmul_rate
from minorca.train.metrics import peak_flops
from minorca_kernels import DenseWeight

CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
SHORT = 2e-3  # seconds; a longer call hides what launching its kernels takes
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # datasheets: bytes a second


def prepared(case: Case, function: Callable, inputs: tuple) -> Callable:
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
    outs = tree_leaves(function(*inputs))
    torch.manual_seed(1)
    douts = [torch.randn(out.shape, device=out.device, dtype=DTYPE).to(out.dtype) for out in outs]
    return lambda: gradients(outs, douts, True)


def drawn(case: Case) -> tuple:
    torch.manual_seed(0)
    return case.inputs(DEVICE, DTYPE)


def exact(case: Case) -> list[Tensor]:
    """The definition's results in fp32."""

    def widened(leaf):
        if isinstance(leaf, DenseWeight):
            return DenseWeight(leaf.weight.detach().float())
        if isinstance(leaf, Tensor) and leaf.dtype == DTYPE:
            return leaf.detach().float().requires_grad_(leaf.requires_grad)
        return leaf

    return prepared(case, case.providers["plain"], tree_map(widened, drawn(case)))()


def error(results: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative error of a result: of norms, in fp32."""
    norm = torch.linalg.vector_norm
    return max(
        (norm(result.float() - right) / norm(right)).item() for result, right in zip(results, reference, strict=True)
    )


def graphed(call: Callable) -> Callable:
    """A call's kernels as one CUDA graph, launched as a whole."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def timed(call: Callable, repeats: int | None) -> dict:
    """Seconds of a call that has run before: median, and the 20th and 80th percentile."""
    start = clock()
    call()
    once = clock() - start
    repeats, graph, seconds = repeats or min(max(int(0.05 / once), 10), 50), False, []
    if not CUDA:
        for _ in range(repeats):
            start = clock()
            call()
            seconds.append(clock() - start)
    else:
        if once < SHORT:
            with contextlib.suppress(RuntimeError):  # what waits for the device cannot be captured
                call, graph = graphed(call), True
        cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            cache.sum()  # read, not written: what the cache held unwritten would be written in the time of the call
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        seconds = [before.elapsed_time(after) / 1e3 for before, after in events]
    median, p20, p80 = (
        torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    )
    return {"seconds": {"median": median, "p20": p20, "p80": p80}, "graph": graph}


def measured(case: Case, function: Callable, reference: list[Tensor] | None, repeats: int | None) -> dict:
    """A provider's time and error, and what the Triton kernels that it launches itself use."""
    with recorded(warmup=False) as kernels:
        call = prepared(case, function, drawn(case))
        results = call()
    used = {kernel.hash: kernel for kernel in kernels}
    row = {"error": error(results, reference) if reference else None}
    del results
    row["kernels"] = [
        {
            "name": kernel.metadata.name,
            "warps": kernel.metadata.num_warps,
            "registers": kernel.n_regs,
            "spills": kernel.n_spills,
            "shared": kernel.metadata.shared,
        }
        for kernel in used.values()
    ]
    return row | timed(call, repeats)


def attempt(function: Callable, *arguments) -> dict:
    """The function's result, or the first line of why there is none."""
    try:
        return function(*arguments)
    except Exception as reason:  # whatever a peer raises: the table goes on without it
        return {"failed": f"{type(reason).__name__}: {reason}".splitlines()[0][:200]}
    finally:
        if CUDA:
            torch.cuda.empty_cache()


def copy(case: Case) -> Callable:
    source = torch.empty(case.bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compiled(case: Case) -> Callable:
    torch._dynamo.reset()  # no memory of other shapes, so nothing is made dynamic
    return torch.compile(case.providers["plain"])


def rated(row: dict, case: Case, limits: dict, base: float | None) -> dict:
    """The row with its rates, as fractions of what was measured here and of the datasheet."""
    seconds, peaks = row["seconds"]["median"], limits["datasheet"]
    row |= {"bytes_per_second": case.bytes / seconds, "flops_per_second": case.flops / seconds if case.flops else None}
    row["of_copy"] = row["bytes_per_second"] / limits["copy_bytes_per_second"]
    row["of_matmul"] = row["flops_per_second"] / limits["matmul_bf16"]["flops_per_second"] if case.flops else None
    row["of_base"] = base / seconds if base else None
    rate = "bytes_per_second" if case.limit == "copy" else "flops_per_second"
    return row | {"of_datasheet": row[rate] / peaks[rate] if peaks[rate] else None, "reached": row[f"of_{case.limit}"]}


def table(chosen: list[Case], limits: dict, repeats: int | None, compiling: bool, deadline: float) -> list[dict]:
    """A row a case and provider; compilation last, for it takes longest."""
    rows = []

    def add(case: Case, provider: str, function: Callable, *arguments) -> None:
        row = attempt(function, *arguments) if time.monotonic() < deadline else {"skipped": "no time left"}
        about = {"kernel": case.kernel, "direction": case.direction, "shape": case.shape, "provider": provider}
        about |= {"limit": case.limit, "target": case.targets.get(provider), "bytes": case.bytes, "flops": case.flops}
        rows.append(about | row)
        print(case.name, provider, row.get("seconds") or row, file=sys.stderr, flush=True)

    for case in chosen:
        reference = (
            attempt(lambda: {"exact": exact(case)}) if time.monotonic() < deadline else {"failed": "no time left"}
        )
        for provider, function in case.providers.items():
            add(
                case,
                provider,
                measured,
                case,
                function,
                reference.get("exact") if provider != "base" else None,
                repeats,
            )
            if provider == "ours" and "failed" in reference:
                rows[-1]["unchecked"] = reference["failed"]
        if case.limit == "copy":
            add(case, "copy", lambda: timed(copy(case), repeats))
    for case in chosen:
        # attention's definition holds every score: nobody would compile it
        if compiling and case.targets and case.kernel != "attention":
            add(case, "compiled", lambda: measured(case, compiled(case), None, repeats))
    found = {(row["kernel"], row["direction"], row["shape"], row["provider"]): row for row in rows if "seconds" in row}
    by_name = {(case.kernel, case.direction, case.shape): case for case in chosen}
    for (*name, _), row in found.items():
        base = found.get((*name, "base"))
        row |= rated(row, by_name[tuple(name)], limits, base and base["seconds"]["median"])
        if row["provider"] == "ours" and row["error"] is not None and (plain := found.get((*name, "plain"))):
            row["wrong"] = not row["error"] <= 2 * plain["error"] + torch.finfo(DTYPE).eps
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Every kernel against the device's limits."
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    parser.add_argument("--only", metavar="NAME", help="cases whose name contains it, as in 'RMSNorm backward'")
    parser.add_argument(
        "--seconds", type=float, default=105, metavar="N", help="nothing new is begun after so many; default 105"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, twice each, nothing compiled: tries the script"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    chosen = list(cases(TINY, 64, window=16, small=(8,)) if args.smoke else cases())
    chosen = [case for case in chosen if (args.only or "") in case.name]
    limits = {"copy_bytes_per_second": copy_bandwidth(), "matmul_bf16": matmul_rate(DTYPE)}
    name = torch.cuda.get_device_name() if CUDA else ""
    bandwidth = next((peak for known, peak in PEAK_BANDWIDTH.items() if known in name), None)
    limits["datasheet"] = {"bytes_per_second": bandwidth, "flops_per_second": peak_flops(DEVICE, DTYPE)}
    if CUDA:
        torch.cuda.set_stream(
            torch.cuda.Stream()
        )  # backward runs where forward ran, and the default stream cannot be captured
    torch._functorch.config.donated_buffer = False  # compiled backwards are called more than once
    rows = table(chosen, limits, 2 if args.smoke else None, not args.smoke, deadline)
    settings = {"device_type": DEVICE.type, "dtype": str(DTYPE).removeprefix("torch."), "smoke": args.smoke}
    report({**settings, **limits, "rows": rows}, "kernels", args.output)
    if wrong := [f"{row['kernel']} {row['direction']}, {row['shape']}" for row in rows if row.get("wrong")]:
        sys.exit(f"benchmarks.kernels: error: further from fp32 than twice the definition: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
