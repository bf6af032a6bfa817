"""Formats the JSON files of a folder as a markdown page: python -m benchmarks.table FOLDER writes FOLDER/table.md.

python -m benchmarks.table --docs writes the table of kernels in docs/benchmarks.md, from the newest GPU results in
benchmarks/results/.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMITS = {"copy": "copy", "matmul": "matrix product", "base": "product without LoRA"}


def spread(values: dict[str, float], scale: float = 1.0) -> str:
    """Median (minimum to maximum)."""
    return f"{values['median'] * scale:,.3g} ({values['min'] * scale:,.3g} to {values['max'] * scale:,.3g})"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def grid(header: list[str], rows: list[list]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def device(result: dict) -> str:
    rows = [[name, value] for name, value in result["machine"].items() if value is not None]
    rows.append(["copy bandwidth", f"{result['copy_bytes_per_second'] / 1e12:.3g} TB/s, read and written"])
    for dtype in ("bf16", "fp32"):
        if matmul := result.get(f"matmul_{dtype}"):
            rate = f"{matmul['flops_per_second'] / 1e12:.3g} TFLOP/s, n = {matmul['n']}, over {matmul['seconds']:.0f} s"
            rows.append([f"{dtype} matrix product", rate])
    return grid(["machine", ""], rows)


def model_name(result: dict) -> str:
    layers = [f"{result['layers']} layers"] if result["layers"] else []
    return ", ".join([result["model"], *layers, result["dtype"]])


def training(results: list[dict]) -> str:
    header = [
        "rows",
        "side",
        "seconds a step",
        "tokens/s",
        "trained tokens/s",
        "MFU",
        "peak GB",
        "micro-batches",
        "padding",
    ]
    header += ["forward, backward, optimizer (s)", "tokens/s, ours / theirs"]
    rows = []
    for result in results:
        step = result["step"]
        label = f"{result['rows']} ({step['documents']} rows, {step['tokens']} tokens; {model_name(result)})"
        for name in ("ours", "theirs"):
            side = result[name]
            rows.append(
                [
                    label,
                    name,
                    spread(side["seconds"]),
                    f"{side['tokens_per_second']:,.0f}",
                    f"{side['trained_tokens_per_second']:,.0f}",
                    percent(side["mfu"]),
                    f"{side['peak_memory_bytes'] / 1e9:.2f}",
                    f"{side['micro_batches']} of at most {side['micro_batch_tokens']}",
                    percent(side["padding"]),
                    ", ".join(f"{seconds:.3g}" for seconds in side["parts_seconds"].values()),
                    f"{result['ratio']:.2f}" if name == "ours" else "",
                ]
            )
    return grid(header, rows)


def recomputing(result: dict) -> str:
    rows = [
        [
            row["kind"],
            spread(row["seconds"]) if "seconds" in row else row["failed"],
            f"{row['tokens_per_second']:,.0f}" if "seconds" in row else "",
            f"{row['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in row else "",
        ]
        for row in result["rows"]
    ]
    label = f"{model_name(result)}, micro-batches of at most {result['tokens']} tokens"
    return f"{label}:\n\n{grid(['kind', 'seconds a step', 'tokens/s', 'peak GB'], rows)}"


def longest_kernels(results: list[dict]) -> str:
    """What takes 1% of the kernels' time of one of our steps, or more."""
    rows = []
    for result in results:
        kernels = result["ours"].get("kernels", [])
        whole = sum(kernel["seconds"] for kernel in kernels)
        launches = sum(kernel["launches"] for kernel in kernels)
        if kernels:
            rows.append([result["rows"], "all", launches, f"{1e3 * whole:,.1f}", ""])
        for kernel in kernels:
            share = kernel["seconds"] / whole
            if share >= 0.01:
                name = f"`{kernel['name'][:80]}`"
                rows.append(["", name, kernel["launches"], f"{1e3 * kernel['seconds']:,.2f}", percent(share)])
    return grid(["rows", "kernel", "launches", "ms", "of all"], rows) if rows else ""


def generating(result: dict) -> str:
    header = ["model", "batch", "prompt + new", "side", "a step (ms)", "tokens/s", "of the limit", "of copy bandwidth"]
    header += ["tokens/s, ours / theirs", "same ids"]
    rows = []
    for run in result["decoding"]:
        comparison = [
            percent(run["of_limit"]),
            percent(run["of_bandwidth"]),
            f"{run['ratio']:.2f}",
            percent(run["same_ids"]),
        ]
        for name in ("ours", "theirs", "limit"):
            rows.append(
                [
                    model_name(result),
                    run["batch"],
                    f"{run['prompt_tokens']} + {run['new_tokens']}",
                    name,
                    spread(run[name]["step_seconds"], 1e3),
                    f"{run[name]['tokens_per_second']:,.1f}",
                    *(comparison if name == "ours" else [""] * len(comparison)),
                ]
            )
    first = [
        [
            model_name(result),
            run["prompt_tokens"],
            spread(run["ours"], 1e3),
            spread(run["theirs"], 1e3),
            f"{run['ratio']:.2f}",
        ]
        for run in result["first_token"]
    ]
    first_header = ["model", "prompt", "first token, ours (ms)", "theirs (ms)", "theirs / ours"]
    return f"{grid(header, rows)}\n\n{grid(first_header, first)}"


def resources(kernels: list[dict]) -> str:
    return ", ".join(
        "{name}: {registers} registers, {spills} spills, {shared} bytes, {warps} warps".format(**kernel)
        for kernel in kernels
    )


def kernels(result: dict) -> str:
    header = [
        "kernel",
        "shape",
        "provider",
        "median (p20 to p80), µs",
        "GB/s",
        "TFLOP/s",
        "of copy",
        "of matrix product",
        "of datasheet",
    ]
    header += ["at least", "of limit", "error", "Triton kernels"]
    rows = []
    for row in result["rows"]:
        name = [f"{row['kernel']} {row['direction']}", row["shape"], row["provider"]]
        if "seconds" not in row:
            rows.append([*name, row.get("failed") or row["skipped"], *[""] * 9])
            continue
        microseconds = {quantile: 1e6 * seconds for quantile, seconds in row["seconds"].items()}
        rows.append(
            [
                *name,
                f"{microseconds['median']:,.1f} ({microseconds['p20']:,.1f} to {microseconds['p80']:,.1f})",
                f"{row['bytes_per_second'] / 1e9:,.0f}",
                f"{row['flops_per_second'] / 1e12:,.0f}" if row["flops"] else "",
                *(percent(row[of]) for of in ("of_copy", "of_matmul", "of_datasheet", "target")),
                f"{percent(row['reached'])} of {LIMITS[row['limit']]}",
                "" if row.get("error") is None else f"{row['error']:.1e}",
                resources(row.get("kernels", [])),
            ]
        )
    return grid(header, rows)


def measured_kernels(results: Path) -> Path | None:
    """A GPU's kernels.json from the newest folder, by the date in its name."""
    read = {path: json.loads(path.read_text()) for path in results.glob("*/kernels.json")}
    found = [path for path, result in read.items() if result["device_type"] == "cuda" and not result["smoke"]]
    return max(found, key=lambda path: re.findall(r"\d{4}-\d\d-\d\d", path.parent.name), default=None)


def kernel_targets(results: Path) -> str:
    """A table of the kernels with targets: the limit, the fraction of it to reach and the fraction reached."""
    from benchmarks.cases import cases

    path = measured_kernels(results)
    result: dict[str, Any] = json.loads(path.read_text()) if path else {"rows": []}
    found = {
        tuple(row[key] for key in ("kernel", "shape", "direction", "provider")): row
        for row in result["rows"]
        if "seconds" in row
    }
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for case in cases():
        for provider, target in case.targets.items():
            kernel = case.kernel if provider == "ours" else f"{case.kernel}, {provider.upper()}"
            row = rows.setdefault((kernel, case.shape, LIMITS[case.limit]), {})
            direction = "backward" if case.direction == "backward" else "forward"
            row[f"{direction}: at least"] = f"{100 * target:.3g}%"
            if case.direction == "both":
                row["backward: at least"] = "in forward"
            if measured := found.get((case.kernel, case.shape, case.direction, provider)):
                seconds = measured["seconds"]["median"]
                row[direction] = f"**{percent(measured['reached'])}**, {1e6 * seconds:,.0f} µs"
    columns = ["forward: at least", "backward: at least"]
    source = "No GPU has been measured yet."
    if path:
        columns = ["forward: at least", "forward", "backward: at least", "backward"]
        folder = path.parent.relative_to(results.parent.parent)
        figure = f"![each kernel's share of its limit](../{folder}/kernels.png)"
        source = f"Measured on {result['machine']['device']}, in `{folder}`:\n\n{figure}"
    cells = [[*names, *(row.get(column, "") for column in columns)] for names, row in rows.items()]
    return f"{grid(['kernel', 'shape', 'limit', *columns], cells)}\n\n{source}"


def with_kernels(document: str, results: Path) -> str:
    """A document with a new table of kernels between its two markers."""
    block = f"<!-- kernels -->\n{kernel_targets(results)}\n<!-- /kernels -->"
    return re.sub(r"<!-- kernels -->.*<!-- /kernels -->", lambda _: block, document, flags=re.DOTALL)


def page(folder: Path) -> str:
    """All results of a folder as markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = []
    if "device" in found:
        parts += ["## Machine", device(found["device"])]
    if (tests := folder / "tests.txt").exists():
        pattern = r"^=*\s*(\d+ (?:passed|failed|skipped).* in .*?)\s*=*$"
        summaries = re.findall(pattern, tests.read_text(), flags=re.MULTILINE)
        parts += ["## Tests on the device", "\n".join(f"- {summary}" for summary in summaries)]
    if "kernels" in found:
        parts += ["## Kernels", kernels(found["kernels"])]
    if steps := [result for name, result in found.items() if name.startswith("train-")]:
        parts += ["## A LoRA training step, median (minimum to maximum)", training(steps)]
        if kernels_of_steps := longest_kernels(steps):
            parts += ["### Kernels of one of our steps", kernels_of_steps]
    if "recompute" in found:
        parts += ["## Activation checkpointing", recomputing(found["recompute"])]
    if "decode" in found:
        parts += ["## Greedy generation, median (minimum to maximum)", generating(found["decode"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "--docs":
        document = ROOT / "docs" / "benchmarks.md"
        document.write_text(with_kernels(document.read_text(), ROOT / "benchmarks" / "results"))
        sys.exit()
    folder = Path(sys.argv[1])
    (folder / "table.md").write_text(page(folder))
    print(page(folder))
