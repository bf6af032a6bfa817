"""A training step and decoding of Mistral-7B, predicted without a GPU: python -m benchmarks.predict

minorca's own code runs on fake tensors (fake_runs.py), with 2 and 3 layers, from which 32 follow. A kernel's time is
what its bytes or its FLOPs take, whichever is longer, and a constant. Rates are assumptions about an H100, replaced by
those that benchmarks.device and benchmarks.kernels measured where --measured names a folder of their results; what
benchmarks.train_step and benchmarks.decode measured then stands beside the predictions.
"""

import argparse
import functools
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.decode import step_bytes
from benchmarks.fake_cuda import unavailable
from benchmarks.fake_runs import Recording, Training, architecture, decode, extrapolated, train
from benchmarks.recorder import Launch
from minorca.generate.sampling import Sampling
from minorca.model.build import build_model

LAYERS = 32
# of 8,192 tokens: documents' lengths, and the share of each that is trained
BATCHES = {"4,096 tokens a document": ([4096] * 2, 1.0), "packed, 683 a document": ([683] * 11 + [679], 0.5)}
PROMPT, NEW = 512, 32
# matrix products of which no dimension is smaller are those of whole weights
WEIGHT = 512
GROUPS: tuple[str, ...] = ("matrix products", "attention", "low-rank products", "memory-bound kernels", "small kernels")


@dataclass(frozen=True)
class Rates:
    """What a GPU does a second. The defaults are assumptions about an H100 SXM, but for the host's time, which is what
    the machine of an H200 took (benchmarks/results/nvidia-h200-2026-11-26): Python, autograd and dispatch included.

    Attributes:
        copy: bytes that a copy reads and writes.
        matmul: FLOP/s of a large bf16 product.
        attention: FLOP/s in forward and backward by back end: FA2, FA3 and cuDNN from the charts of Shah et al. 2024
            (FlashAttention-3, arXiv:2407.08608), ours from its instructions.
        of_copy: the share of a copy's rate that other kernels reach.
        launch: seconds that a kernel takes however little it does.
        host: seconds of the host for a launch.
    """

    copy: float = 3.0e12
    matmul: float = 700e12
    attention: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {
            "FA2": (370e12, 322e12),
            "FA3": (648e12, 561e12),
            "cudnn": (600e12, 516e12),
            "own": (480e12, 420e12),
        }
    )
    of_copy: float = 0.93
    launch: float = 2.5e-6
    host: float = 74e-6

    @classmethod
    def measured(cls, folder: Path) -> "Rates":
        """The defaults, replaced by what is in device.json, kernels.json and train-full.json."""
        rates = cls()
        if host := (_read(folder, "train-full") or {"ours": {}})["ours"].get("host"):
            rates = replace(rates, host=host["seconds"] / host["launches"])
        if (device := _read(folder, "device")) is not None:
            matmul = device["matmul_bf16"]["flops_per_second"]
            rates = replace(rates, copy=device["copy_bytes_per_second"], matmul=matmul)
        found: dict[tuple[str, str], float] = {}
        for row in (_read(folder, "kernels") or {"rows": []})["rows"]:
            # the first case is one long document
            if row["kernel"] == "attention" and row.get("flops_per_second"):
                found.setdefault((row["provider"], row["direction"]), row["flops_per_second"])
        names = {"FA2": "varlen", "FA3": "fa3", "cudnn": "cudnn", "own": "ours"}
        attention = {
            name: (found.get((provider, "forward"), forward), found.get((provider, "backward"), backward))
            for (name, provider), (forward, backward) in zip(names.items(), rates.attention.values())
        }
        return replace(rates, attention=attention)


def _read(folder: Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class Prediction:
    """The time of a step.

    Attributes:
        launches: how many there are of each.
        attention_flops: of one layer's forward.
        backend: of attention.
    """

    launches: Counter[Launch]
    rates: Rates
    attention_flops: float = 0.0
    backend: str = "own"

    def group(self, launch: Launch) -> str:
        """Which of GROUPS a launch belongs to."""
        if self.attention_flops and _is_attention(launch):
            return "attention"
        if launch.flops:
            # the head of a decoding step and its projections have few rows, and no operator of ours around them
            whole = not launch.owner or min(size for shape in launch.shapes for size in shape) >= WEIGHT
            return "matrix products" if whole else "low-rank products"
        return "small kernels" if self.seconds(launch) < 2 * self.rates.launch else "memory-bound kernels"

    def seconds(self, launch: Launch) -> float:
        """The time of one launch."""
        flops, rate = launch.flops, self.rates.matmul
        if self.attention_flops and _is_attention(launch):
            backward = _is_backward(launch)
            flops = self.attention_flops * (2.5 if backward else 1) / self._attention_kernels[backward]
            rate = self.rates.attention[self.backend][backward]
        return self.rates.launch + max(launch.bytes / (self.rates.of_copy * self.rates.copy), flops / rate)

    @functools.cached_property
    def _attention_kernels(self) -> Counter[bool]:
        """How many kernels attention has in forward and in backward."""
        found = {(launch.name, _is_backward(launch)) for launch in self.launches if _is_attention(launch)}
        return Counter(backward for _, backward in found)

    @functools.cached_property
    def by_group(self) -> dict[str, float]:
        """Seconds of each group."""
        seconds: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        for launch, count in self.launches.items():
            seconds[self.group(launch)] += count * self.seconds(launch)
        return seconds

    @property
    def gpu_seconds(self) -> float:
        return sum(self.by_group.values())

    @property
    def host_seconds(self) -> float:
        """A captured graph is one launch."""
        single = sum(count for launch, count in self.launches.items() if not launch.captured)
        return self.rates.host * (single + any(launch.captured for launch in self.launches))

    @property
    def step_seconds(self) -> float:
        return max(self.gpu_seconds, self.host_seconds)

    def by_kernel(self) -> list[tuple[str, int, float]]:
        """(operator and kernel, launches, seconds), the longest first."""
        rows: dict[str, tuple[int, float]] = {}
        for launch, count in self.launches.items():
            name = f"{launch.owner or 'aten'}: {launch.name}"
            launches, seconds = rows.get(name, (0, 0.0))
            rows[name] = launches + count, seconds + count * self.seconds(launch)
        return sorted(((name, *row) for name, row in rows.items()), key=lambda row: -row[2])


def _is_attention(launch: Launch) -> bool:
    return any(word in f"{launch.owner} {launch.name}" for word in ("attn", "attention"))


def _is_backward(launch: Launch) -> bool:
    return "backward" in f"{launch.owner} {launch.name}"


def training(
    rates: Rates, name: str, rank: int, dropout: float, backend: str, quantize: Literal["none", "nf4"] = "none"
) -> Prediction:
    """A step of one micro-batch of BATCHES."""
    lengths, trained = BATCHES[name]
    attention = "own" if backend == "own" else "varlen"

    def run(layers: int) -> Recording:
        return train(Training(layers, lengths, trained, rank, dropout, attention=attention, quantize=quantize))

    launches = extrapolated(run, LAYERS)
    launches = Counter(
        {launch: n for launch, n in launches.items() if launch.phase not in ("build", "first step", "batch")}
    )
    arch = architecture(LAYERS)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Prediction(launches, rates, 4.0 * arch.heads * arch.head_dim * pairs, backend)


def decoding(rates: Rates, batch: int, sampling: Sampling | None = None) -> Prediction:
    """A step of the engine, from its graph."""
    launches = extrapolated(lambda layers: decode(layers, batch, PROMPT, sampling), LAYERS)
    return Prediction(Counter({launch: n for launch, n in launches.items() if launch.captured}), rates)


def of_copy(prediction: Prediction, batch: int) -> float:
    """The share of a copy's rate at which a decoding step reads weights and cache."""
    model = build_model(architecture(LAYERS), torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    size = step_bytes(model, weights, batch, PROMPT + NEW / 2)
    return size / prediction.rates.copy / prediction.step_seconds


def _print_step(prediction: Prediction, tokens: int, measured: float | None) -> None:
    """The waterfall from the matrix products to the step; what was measured beside it."""
    seconds = 0.0
    for group, part in prediction.by_group.items():
        if not part:
            continue
        seconds += part
        print(f"  {'+' if seconds > part else ' '} {group:22}{1e3 * part:9.2f} ms{tokens / seconds:12,.0f} tokens/s")
    count = sum(prediction.launches.values())
    bound = "GPU" if prediction.gpu_seconds >= prediction.host_seconds else "host"
    print(f"  {count} launches, {1e3 * prediction.host_seconds:.2f} ms of the host: {bound}-bound")
    if measured:
        step = tokens / prediction.step_seconds
        print(f"  predicted {step:,.0f} tokens/s, measured {measured:,.0f}: {measured / step - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description="Steps of Mistral-7B, predicted without a GPU."
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FOLDER", help="a GPU's results, for rates and to compare with"
    )
    parser.add_argument("--attention", choices=Rates().attention, default="own", help="default: own")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="also the N kernels that take longest")
    args = parser.parse_args()
    if reason := unavailable():
        parser.error(reason)
    results = {}
    if args.measured:
        results = {name: _read(args.measured, name) for name in ("train-full", "decode")}
    results = {name: result for name, result in results.items() if result and result["model"] == "7b"}
    rates = Rates.measured(args.measured) if args.measured else Rates()
    print(f"rates {'of ' + str(args.measured) if args.measured else 'assumed'}: {rates}")
    for name, (lengths, _) in BATCHES.items():
        for rank, dropout in ((16, 0.0), (16, 0.05), (64, 0.0), (64, 0.05)):
            prediction = training(rates, name, rank, dropout, args.attention)
            print(f"\nTraining, {sum(lengths):,} tokens, {name}, rank {rank}, dropout {dropout}, {args.attention}")
            same = name.startswith("packed") and (rank, dropout) == (16, 0.0) and "train-full" in results
            _print_step(prediction, sum(lengths), results["train-full"]["ours"]["tokens_per_second"] if same else None)
            _print_kernels(prediction, args.kernels)
            if (rank, dropout) == (16, 0.0):
                quantized = training(rates, name, rank, dropout, args.attention, "nf4")
                share = quantized.step_seconds / prediction.step_seconds - 1
                print(f"\nThe same with the projections in NF4: {share:+.1%} of the time")
                _print_step(quantized, sum(lengths), None)
                _print_kernels(quantized, args.kernels)
    measured = {row["batch"]: row["ours"]["tokens_per_second"] for row in results.get("decode", {}).get("decoding", [])}
    for batch in (1, 8, 32):
        prediction = decoding(rates, batch)
        share = of_copy(prediction, batch)
        print(f"\nDecoding, {batch} at once, {PROMPT} + {NEW} tokens, greedy: {share:.0%} of copy bandwidth")
        _print_step(prediction, batch, measured.get(batch))
        _print_kernels(prediction, args.kernels)


def _print_kernels(prediction: Prediction, count: int) -> None:
    for name, launches, seconds in prediction.by_kernel()[:count]:
        print(f"    {name:52}{launches:6}{1e3 * seconds:9.2f} ms")


if __name__ == "__main__":
    main()
