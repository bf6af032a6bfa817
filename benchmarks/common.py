"""Shared by the benchmarks: the clock, the model under test, transformers' model to compare with, and JSON reports."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minorca.host import processor_field, processor_name
from minorca.model.architecture import read_architecture
from minorca.model.build import build_model, fast_dtype, load_model
from minorca.model.layout import source_tensors
from minorca.model.network import Mistral
from minorca.model.projection import Projection

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    # config.json of Mistral-7B-v0.3
    "7b": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
}


def clock() -> float:
    """The time in seconds, after the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def kernel_times(run: Callable[[], object]) -> list[dict]:
    """The kernels that a call launches on CUDA: names, launches and seconds, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    kernels = [
        {"name": event.key, "launches": event.count, "seconds": event.self_device_time_total / 1e6} for event in events
    ]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that choose a model, and where the JSON goes."""
    options = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    options.add_argument(
        "--model", type=Path, default=ROOT / "examples" / "model", metavar="DIR", help="default: examples/model"
    )
    options.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of --model")
    options.add_argument("--layers", type=int, metavar="N", help="number of layers of --shape; default: all")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default=str(fast_dtype()).removeprefix("torch."))
    options.add_argument("--output", type=Path, metavar="FOLDER", help="write the JSON there too")
    return options


def write_config(args: argparse.Namespace, directory: str) -> None:
    """The config.json of --shape with --layers."""
    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    Path(directory, "config.json").write_text(json.dumps(SHAPES[args.shape] | layers))


@contextlib.contextmanager
def model_under_test(args: argparse.Namespace) -> Iterator[tuple[Path, Mistral]]:
    """A directory with a config.json, and minorca's model of it in args.dtype on the device, frozen."""
    dtype = getattr(torch, args.dtype)
    if not args.shape:
        yield args.model, load_model(args.model, dtype, DEVICE)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_config(args, directory)
        model = build_model(read_architecture(directory), dtype).to_empty(device=DEVICE).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)
        yield Path(directory), model


def peer(directory: Path, model: Mistral) -> nn.Module:
    """transformers' model of the directory's configuration; its weights are views of minorca's and take no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def stacked(module: str) -> Tensor:
        owner = model.get_submodule(module)
        return owner.get_parameter("base.weight" if isinstance(owner, Projection) else "weight").detach()

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            config, dtype=model.embedding.weight.dtype, attn_implementation="sdpa"
        )
    views = {
        tensor.name: view
        for module, tensors in source_tensors(model.arch, "huggingface").items()
        for tensor, view in zip(tensors, stacked(module).split([tensor.rows for tensor in tensors]))
    }
    theirs.load_state_dict(views, strict=False, assign=True)
    theirs.tie_weights()
    # its tables are not in the state dict
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(DEVICE)
    return theirs.eval()


def machine() -> dict:
    """Device, versions and commit; the commit is read from git, or else from a file COMMIT."""

    def output_of(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = DEVICE.type == "cuda"
    commit = ROOT / "COMMIT"
    written = commit.read_text().strip() if commit.exists() else ""
    driver_query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if cuda else processor_name(),
        # tells processors of one name apart: 25 is AMD's Zen 3 and 4, 26 Zen 5
        "cpu_family": processor_field("cpu family"),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # oneDNN's switch, such as AVX512_CORE_BF16 to do without AMX
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA") or torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "transformers", "peft")},
        "cuda": torch.version.cuda,
        "cuda_driver": output_of(*driver_query) if cuda else None,
        "commit": output_of("git", "describe", "--always", "--dirty") or written or None,
    }


def report(result: dict, name: str, output: Path | None) -> None:
    """Prints a result, and writes it to FOLDER/name.json."""
    text = json.dumps({"machine": machine(), **result}, indent=2)
    print(text)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(text + "\n")
