"""The time that a checkpoint takes: python -m benchmarks.checkpoint [--model DIR | --shape 7b] [--saves N]
[--output FOLDER]

Saves as minorca.train does, with `keep: 2`: gather, write, synchronise to disk, hash, rename, verify the new checkpoint
and the previous one, remove the oldest. The training loop waits for all of it. The limit, measured in the same run, is
the time to write and synchronise as many bytes. Frozen weights, which are not saved, stay on the meta device.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import SHAPES, parser, report, spread
from minorca.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from minorca.model.architecture import Architecture, read_architecture
from minorca.model.build import build_model
from minorca.model.lora import LoRASettings, add_adapters
from minorca.model.network import Mistral
from minorca.train import checkpoint
from minorca.train.optim import adamw
from minorca.train.ranks import init_distributed
from minorca.train.trainable import Adapters, TrainableSet


def adapted(arch: Architecture, settings: LoRASettings) -> Mistral:
    """A model on the meta device, with adapters on the CPU."""
    model = build_model(arch, torch.bfloat16)
    add_adapters(model, settings)
    for module in model.modules():
        for name, values in list(module.named_parameters(recurse=False)):
            if values.requires_grad:
                module.register_parameter(name, nn.Parameter(torch.randn(values.shape)))
    return model


def write_seconds(directory: Path, size: int) -> float:
    """Seconds to write `size` bytes and synchronise them to disk."""
    chunk = os.urandom(2**24)
    path = directory / "bytes"
    started = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, size, len(chunk)):
            file.write(chunk[: size - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def main() -> None:
    options = parser("benchmarks.checkpoint", "The time that a checkpoint takes.")
    options.add_argument(
        "--rank", type=int, default=16, metavar="N", help="of the adapters, on all projections; default: 16"
    )
    options.add_argument("--saves", type=int, default=7, metavar="N")
    args = options.parse_args()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output) as folder, init_distributed(300) as world:
        output = Path(folder)
        config = Config(ModelConfig(str(args.model)), DataConfig(""), train=TrainConfig(output=folder))
        if args.shape:
            (output / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        settings = LoRASettings(args.rank, 2.0 * args.rank)
        model = adapted(read_architecture(output if args.shape else args.model), settings)
        trainable = TrainableSet([Adapters(model, settings, str(args.model))])
        optimizer = adamw(trainable.parameters.values(), OptimConfig())
        for parameter in trainable.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        stalls = []
        limits = []
        directory = output / "checkpoints"
        # the first two remove no older checkpoint, and are not counted
        for step in range(1, args.saves + 3):
            started = time.perf_counter()
            threads = torch.get_num_threads()
            state = checkpoint.State(checkpoint.FORMAT, step, step, world.size, threads, torch.__version__, {})
            checkpoint.save(directory, trainable, optimizer, state, config.train.keep, world)
            stalls.append(time.perf_counter() - started)
            size = sum(path.stat().st_size for path in checkpoint.published(directory)[-1].iterdir())
            limits.append(write_seconds(output, size))
    stall = spread(stalls[2:])
    every = int(config.train.checkpoint_every)
    report(
        {
            "model": args.shape or args.model.name,
            "rank": args.rank,
            "adapter_parameters": trainable.count,
            "bytes": size,
            "stall_seconds": stall,
            "write_and_sync_seconds": spread(limits[2:]),
            "checkpoint_every": every,
            # with longer steps, checkpoints take less than 1% of the time
            "step_seconds_for_one_percent": stall["median"] / every * 99,
        },
        f"checkpoint-{args.shape or args.model.name}",
        args.output,
    )


if __name__ == "__main__":
    main()
