"""The plan's memory beside the measured: python -m benchmarks.memory [--output FOLDER]

Of twelve configurations on the CPU, the peak of what torch allocates in a step, counted by torch's profiler, beside the
peak that the plan gives for it; and of a 7B model on a GPU the plan's peaks, each with the bound that it must keep.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import report
from benchmarks.fake_runs import architecture
from benchmarks.table import grid
from minorca.config import Config, DataConfig, ModelConfig, choices
from minorca.config_rules import problems
from minorca.model.architecture import Architecture
from minorca.plan.advice import CHECKPOINTING, Settings, changed
from minorca.plan.apart import PlanProcess
from minorca.plan.devices import machine
from minorca.plan.estimate import Estimator, documents
from minorca.plan.fake_device import unavailable
from minorca.plan.fake_step import model_files, run_step, step_rows
from minorca.train.build import build
from minorca.train.ranks import World

# five layers, of which the plan runs two and three
SMALL = Architecture(4096, 256, 704, 5, 4, 2, 64, 1e-5, 1e4, None, False)
# so near must a plan be
NEAR = 0.03


@dataclass(frozen=True)
class Case:
    """A configuration on the CPU: packed documents of 512 tokens, two a micro-batch, where its settings say no other.

    Attributes:
        arch: what is different of SMALL.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    arch: dict[str, object] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        base = {
            "model.dtype": "float32",
            "data.seq_len": 512,
            "train.micro_batch_tokens": 1024,
            "train.batch_tokens": 8192,
            "train.output": "fake",
            "parallel.shard": "none",
        }
        config = changed(Config(model=ModelConfig("fake"), data=DataConfig("fake")), base | dict(self.settings))
        if found := next(problems(config), None):
            raise found.error
        return config

    @property
    def architecture(self) -> Architecture:
        return dataclasses.replace(SMALL, **self.arch)


CASES = [
    Case("fp32, rank 16"),
    Case("rank 64", {"lora.rank": 64}),
    Case("rank 4, query and value", {"lora.rank": 4, "lora.targets": ["q", "v"]}),
    Case("dropout 0.1", {"lora.dropout": 0.1}),
    Case("selective checkpointing", {CHECKPOINTING: "selective"}),
    Case("full checkpointing", {CHECKPOINTING: "full"}),
    Case("a micro-batch of 4,096 tokens", {"train.micro_batch_tokens": 4096}),
    Case("one document of 1,024 tokens", {"data.seq_len": 1024}),
    Case("one row a micro-batch", {"data.packing": False}),
    Case("tied, 16,384 tokens", arch={"tied": True, "vocab_size": 16384}),
    Case("a window of 128", arch={"window": 128}),
    Case("preferences", {"train.objective": "dpo", "data.format": "preference"}),
    Case("bf16", {"model.dtype": "bfloat16"}),
]

# of Mistral-7B on one H100: settings, tokens of the one document in a micro-batch, and the most GB
LARGE: list[tuple[dict[str, object], int, float]] = [
    ({CHECKPOINTING: "none"}, 8192, 41.0),
    ({CHECKPOINTING: "selective"}, 8192, 26.0),
    ({CHECKPOINTING: "full"}, 8192, 19.0),
    ({CHECKPOINTING: "offload"}, 8192, 17.0),
    ({CHECKPOINTING: "selective", "train.objective": "dpo", "data.format": "preference"}, 8192, 28.6),
    ({"model.quantize": "nf4", CHECKPOINTING: "full"}, 4096, 7.0),
    ({"model.quantize": "nf4", CHECKPOINTING: "offload"}, 4096, 6.0),
]
# of those, the ones whose settings exist
LARGE = [row for row in LARGE if all(value in choices(key) for key, value in row[0].items())]


def planned(config: Config, arch: Architecture) -> int:
    """Bytes at the peak, by the plan."""
    return Estimator(arch, machine("cpu", 1), 1)(config).memory["total"]


def measured(config: Config, arch: Architecture) -> int:
    """Bytes at the peak of the same step on real tensors, as torch's allocator reports them."""
    world = World(0, 1, torch.device("cpu"))
    rows = step_rows(config, documents(config))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner = build(config, model_files(arch), world)
        for parameter in learner.model.parameters():
            nn.init.normal_(parameter, std=0.02)
        run_step(learner, config, world, rows, True, lambda phase: None)
    return peak_bytes(profiler)


def peak_bytes(profiler: profile) -> int:
    """Most bytes in use at once, of those that were allocated while the profiler ran.

    It also reports what is freed meanwhile of earlier cases, and under sizes of whatever lay at the same address.
    """
    # torch's annotations lack what its own memory_profiler reads
    recorded: Any = profiler.profiler
    nodes = list(recorded.kineto_results.experimental_event_tree())
    changes = []
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    alive: dict[int, int] = {}
    in_use = peak = 0
    for _, address, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            alive[address] = size
            in_use += size
        else:
            in_use -= alive.pop(address, 0)
        peak = max(peak, in_use)
    return peak


def compare(case: Case) -> dict:
    """A case's row: bytes that were planned and measured."""
    plan, peak = planned(case.config, case.architecture), measured(case.config, case.architecture)
    return {"case": case.name, "planned": plan, "measured": peak, "error": plan / peak - 1}


def large() -> list[dict]:
    """The rows of 7B: bytes that are planned, and the bound."""
    rows = []
    for settings, tokens, most in LARGE:
        shape = {"data.seq_len": tokens, "train.micro_batch_tokens": tokens}
        config = changed(Config(model=ModelConfig("fake"), data=DataConfig("fake")), shape | settings)
        name = ", ".join(str(value) for value in settings.values())
        # in a process of its own: a fake GPU has to come before the first backward
        plan = PlanProcess(config, architecture(32), machine("H100", 1), 1, whole=False).result()
        peak = plan["memory_bytes"]["total"]
        rows.append({"case": f"7B, {tokens} tokens, {name}", "planned": peak, "most": most * 1e9})
    return rows


def _print(unit: str, rows: list[dict], beside: str) -> None:
    scale = {"MB": 1e6, "GB": 1e9}[unit]
    cells = []
    for row in rows:
        sizes = [f"{row[key] / scale:.2f}" for key in ("planned", beside)]
        cells.append([row["case"], *sizes, f"{row['planned'] / row[beside] - 1:+.1%}"])
    print(grid(["case", f"planned, {unit}", f"{beside}, {unit}", "difference"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="The plan beside the measured.")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write the JSON to this folder")
    args = parser.parse_args()
    rows = [compare(case) for case in CASES]
    _print("MB", rows, "measured")
    of_7b = [] if unavailable() else large()
    _print("GB", of_7b, "most")
    report({"cpu": rows, "7b": of_7b}, "memory", args.output)
    if any(abs(row["error"]) > NEAR for row in rows) or any(row["planned"] > row["most"] for row in of_7b):
        sys.exit("benchmarks.memory: error: a plan is not as near, or not as small, as it must be")


if __name__ == "__main__":
    main()
