"""The JSON files of one folder as one markdown page: python -m benchmarks.table FOLDER writes FOLDER/table.md."""

import json
import sys
from pathlib import Path


def spread(values: dict[str, float], scale: float = 1.0) -> str:
    """Median (least to most)."""
    return "{median:,.3g} ({min:,.3g} to {max:,.3g})".format(**{name: value * scale for name, value in values.items()})


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def grid(header: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def device(result: dict) -> str:
    copy = f"{result['copy_bytes_per_second'] / 1e12:.3g} TB/s, read and written"
    limits = [["copy bandwidth", copy]]
    for dtype in ("bf16", "fp32"):
        if matmul := result.get(f"matmul_{dtype}"):
            rate = f"{matmul['flops_per_second'] / 1e12:.3g} TFLOP/s, n = {matmul['n']}, over {matmul['seconds']:.0f} s"
            limits.append([f"{dtype} matrix product", rate])
    return grid(["machine", ""], [[name, value] for name, value in result["machine"].items() if value is not None] + limits)


def name_of(result: dict) -> str:
    return f"{result['model']}{', {} layers'.format(result['layers']) if result['layers'] else ''}, {result['dtype']}"


def training(results: list[dict]) -> str:
    header = ["rows", "side", "seconds a step", "tokens/s", "trained tokens/s", "MFU", "peak GB", "micro-batches", "padding"]
    header += ["forward, backward, optimizer (s)", "tokens/s, ours / theirs"]
    rows = []
    for result in results:
        for name in ("ours", "theirs"):
            side = result[name]
            rows.append([
                f"{result['rows']} ({result['step']['documents']} rows, {result['step']['tokens']} tokens; {name_of(result)})",
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
            ])
    return grid(header, rows)


def generating(result: dict) -> str:
    header = ["model", "batch", "prompt + new", "side", "first token (ms)", "a step (ms)", "tokens/s", "of copy bandwidth"]
    header += ["tokens/s, ours / theirs", "same ids"]
    rows = []
    for run in result["runs"]:
        for name in ("ours", "theirs"):
            side = run[name]
            rows.append([
                name_of(result),
                run["batch"],
                f"{run['prompt_tokens']} + {run['new_tokens']}",
                name,
                spread(side["first_token_seconds"], 1e3),
                spread(side["step_seconds"], 1e3),
                f"{side['tokens_per_second']:,.1f}",
                percent(side["bandwidth"]),
                *([f"{run['ratio']:.2f}", percent(run["same_ids"])] if name == "ours" else ["", ""]),
            ])
    return grid(header, rows)


def page(folder: Path) -> str:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = []
    if "device" in found:
        parts += ["## Machine", device(found["device"])]
    if (tests := folder / "tests.txt").exists():
        parts += ["## Tests on the device", tests.read_text().strip().splitlines()[-1].strip("= ")]
    if steps := [result for name, result in found.items() if name.startswith("train-")]:
        parts += ["## A LoRA training step, median (least to most)", training(steps)]
    if "generation" in found:
        parts += ["## Greedy generation, median (least to most)", generating(found["generation"])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "table.md").write_text(page(folder))
    print(page(folder))
