"""The time of a step from what it launches: a kernel takes what its bytes or its FLOPs take, whichever is longer, and a
constant.
"""

import functools
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from minorca.plan.recorder import Launch

# bytes a second between host and GPU, in one direction, of PCI Express 4.0 x16: assumed
PCIE = 25e9
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
    def of_data_sheet(cls, copy: float, flops: float) -> "Rates":
        """The same shares of a GPU's bandwidth and bf16 FLOP/s as are assumed of an H100's 3.35 TB/s and 989e12."""
        rates = cls()
        share = flops / 989e12
        attention = {name: (a * share, b * share) for name, (a, b) in rates.attention.items()}
        return cls(rates.copy * copy / 3.35e12, rates.matmul * share, attention)

    @classmethod
    def measured(cls, folder: Path) -> "Rates":
        """The defaults, replaced by what is in device.json, kernels.json and train-full.json."""
        rates = cls()
        if host := (read_result(folder, "train-full") or {"ours": {}})["ours"].get("host"):
            rates = replace(rates, host=host["seconds"] / host["launches"])
        # benchmarks.kernels measures both rates too
        if device := read_result(folder, "device") or read_result(folder, "kernels"):
            matmul = device["matmul_bf16"]["flops_per_second"]
            rates = replace(rates, copy=device["copy_bytes_per_second"], matmul=matmul)
        found: dict[tuple[str, str], float] = {}
        for row in (read_result(folder, "kernels") or {"rows": []})["rows"]:
            # the first case is one long document
            if row["kernel"] == "attention" and row.get("flops_per_second"):
                found.setdefault((row["provider"], row["direction"]), row["flops_per_second"])
        names = {"FA2": "varlen", "FA3": "fa3", "cudnn": "cudnn", "own": "ours"}
        attention = {
            name: (found.get((provider, "forward"), forward), found.get((provider, "backward"), backward))
            for (name, provider), (forward, backward) in zip(names.items(), rates.attention.values())
        }
        return replace(rates, attention=attention)


def read_result(folder: Path, name: str) -> dict | None:
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
