"""How fast weights load: python -m benchmarks.loading [--model DIR | --gigabytes N] [--quantize nf4] [--rounds N]
[--output FOLDER]

Three methods in turn, with the files' pages in memory (warm) and dropped (cold): `read` puts all bytes into one small
buffer, the limit of the disk; `read_and_keep` puts them into as much new memory, as a model on the CPU needs too; and
`load` goes from the files to weights on the device, in the type in which they are stored.
"""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import DEVICE, ROOT, SHAPES, clock, report, spread
from minorca.files.weights import load_weights, open_model
from minorca.model.architecture import read_architecture
from minorca.model.build import build_model
from minorca.model.layout import source_tensors
from minorca.model.quantization import parse_quantization

CHUNK = 2**24


def _read(paths: list[Path], buffer_at: Callable[[int], memoryview]) -> None:
    """Reads files one after another; `buffer_at(n)` is where to put what follows the first n bytes."""
    done = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer_at(done)):
                done += count


def read(paths: list[Path]) -> None:
    buffer = memoryview(bytearray(CHUNK))
    _read(paths, lambda done: buffer)


def read_and_keep(paths: list[Path]) -> None:
    whole = torch.empty(sum(path.stat().st_size for path in paths) + 1, dtype=torch.uint8).numpy().data
    _read(paths, lambda done: whole[done : done + CHUNK])


def load(directory: Path, quantize: str) -> None:
    source = open_model(directory, parse_quantization(quantize))
    dtype = source.read(source.tensors["embedding"][0], 0, 1).dtype
    load_weights(build_model(source.arch, dtype, source.quantization).to_empty(device=DEVICE), source)


def drop(paths: list[Path]) -> None:
    """Removes files from the page cache, after writing them to the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def directory_under_test(args: argparse.Namespace) -> Iterator[Path]:
    if not args.gigabytes:
        yield args.model
        return
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        directory = Path(folder)
        config = SHAPES["7b"]
        (directory / "config.json").write_text(json.dumps(config))
        model = build_model(read_architecture(directory), torch.bfloat16)
        parameters = dict(model.named_parameters())
        layer = sum(p.nbytes for p in model.layers[0].parameters())
        rest = sum(p.nbytes for p in parameters.values()) - layer * len(model.layers)
        layers = max(1, round((args.gigabytes * 1e9 - rest) / layer))
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        tensors = {
            tensor.name: torch.randn(tensor.shape, dtype=torch.bfloat16)
            for stacked in source_tensors(read_architecture(directory), "huggingface").values()
            for tensor in stacked
        }
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        del tensors
        yield directory


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.loading", description="How fast weights load.")
    what = options.add_mutually_exclusive_group()
    what.add_argument(
        "--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR", help="default: examples/model"
    )
    what.add_argument(
        "--gigabytes", type=float, metavar="N", help="random weights of about this size, in layers of a 7B model"
    )
    options.add_argument("--quantize", choices=["none", "nf4"], default="none", help="quantize the weights that load")
    options.add_argument("--rounds", type=int, default=5, metavar="N")
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    args = options.parse_args()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    with directory_under_test(args) as directory:
        source = open_model(directory)
        paths = source.paths
        size = sum(path.stat().st_size for path in paths)
        methods = {
            "read": lambda: read(paths),
            "read_and_keep": lambda: read_and_keep(paths),
            "load": lambda: load(directory, args.quantize),
        }
        seconds: dict[str, dict[str, list[float]]] = {
            cache: {name: [] for name in methods} for cache in ("warm", "cold")
        }
        for round in range(args.rounds + 1):
            for cache, times in seconds.items():
                for name, method in methods.items():
                    if cache == "cold":
                        drop(paths)
                    started = clock()
                    method()
                    # The first round warms up.
                    if round:
                        times[name].append(clock() - started)
    speeds = {
        cache: {name: spread([size / s / 1e9 for s in values]) for name, values in methods.items()}
        for cache, methods in seconds.items()
    }
    report(
        {
            "model": f"{source.arch.layers} layers of 7b" if args.gigabytes else args.model.name,
            "quantize": args.quantize,
            "files": len(paths),
            "bytes": size,
            "gigabytes_per_second": speeds,
            "ratio": {
                cache: {name: times["load"]["median"] / times[name]["median"] for name in ("read", "read_and_keep")}
                for cache, times in speeds.items()
            },
        },
        "loading",
        args.output,
    )


if __name__ == "__main__":
    main()
