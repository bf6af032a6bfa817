"""What runs are planned for: GPUs on which this engine runs, and this machine's CPU."""

import difflib
from dataclasses import dataclass, replace

import torch

from minorca.device import default_device
from minorca.errors import UserError
from minorca.host import host_memory_bytes
from minorca.plan.rates import Rates

# what a CUDA context, cuBLAS's workspace and NCCL's buffers take beside tensors: assumed
CONTEXT_BYTES = 10**9


@dataclass(frozen=True)
class Machine:
    """One rank's device.

    Attributes:
        name: as `--gpu` takes it.
        torch_names: as torch.cuda.get_device_name has it.
        memory: bytes, as torch reports them: less than the name says.
        arch: compute capability times 10; 0: the CPU.
        processors: streaming multiprocessors.
        copy: bytes a second of its memory, from NVIDIA's data sheet.
        flops: dense bf16 FLOP/s with fp32 sums, from NVIDIA's data sheet; of GeForce, from the white papers of its
            generations, or 512 a clock and multiprocessor.
        link: bytes a second, each way, to the GPUs of the same machine: NVLink, or else PCI Express.
    """

    name: str
    torch_names: tuple[str, ...]
    memory: int
    arch: int
    processors: int
    copy: float
    flops: float
    link: float

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return self.memory - CONTEXT_BYTES if self.arch else self.memory

    @property
    def rates(self) -> Rates | None:
        """What it does a second; None where nothing is assumed: a CPU, a GPU not below."""
        if not self.flops:
            return None
        return MEASURED.get(self.name) or Rates.of_data_sheet(self.copy, self.flops)


# as benchmarks/results/nvidia-h200-2026-11-26 has them; all others are shares of the data sheet
MEASURED = {
    "H200": Rates(
        copy=4.084e12,
        matmul=675e12,
        attention={
            "FA2": (321e12, 283e12),
            "FA3": (648e12, 561e12),
            "cudnn": (618e12, 510e12),
            "own": (487e12, 397e12),
        },
    )
}

_GIB = 2**30
_PCIE = 32e9
GPUS = [
    Machine("B200", ("NVIDIA B200",), int(178.3 * _GIB), 100, 148, 8.0e12, 2250e12, 900e9),
    Machine("H200", ("NVIDIA H200",), int(139.8 * _GIB), 90, 132, 4.8e12, 989e12, 450e9),
    Machine("H100", ("NVIDIA H100 80GB HBM3",), int(79.1 * _GIB), 90, 132, 3.35e12, 989e12, 450e9),
    Machine(
        "A100-80",
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        int(79.1 * _GIB),
        80,
        108,
        2.039e12,
        312e12,
        300e9,
    ),
    Machine("A100-40", ("NVIDIA A100-SXM4-40GB",), int(39.4 * _GIB), 80, 108, 1.555e12, 312e12, 300e9),
    Machine("L40S", ("NVIDIA L40S",), int(44.4 * _GIB), 89, 142, 864e9, 362e12, _PCIE),
    Machine("A10", ("NVIDIA A10",), int(22.1 * _GIB), 86, 72, 600e9, 125e12, _PCIE),
    Machine("RTX-5090", ("NVIDIA GeForce RTX 5090",), int(31.4 * _GIB), 120, 170, 1792e9, 209.5e12, 2 * _PCIE),
    Machine("RTX-4090", ("NVIDIA GeForce RTX 4090",), int(23.6 * _GIB), 89, 128, 1008e9, 165e12, _PCIE),
    Machine("RTX-4080", ("NVIDIA GeForce RTX 4080",), int(15.7 * _GIB), 89, 76, 716.8e9, 97.5e12, _PCIE),
    Machine("RTX-4070", ("NVIDIA GeForce RTX 4070",), int(11.7 * _GIB), 89, 46, 504e9, 58.3e12, _PCIE),
    Machine("RTX-4060", ("NVIDIA GeForce RTX 4060",), int(7.7 * _GIB), 89, 24, 272e9, 30.2e12, _PCIE / 2),
    Machine("RTX-3090", ("NVIDIA GeForce RTX 3090",), int(23.6 * _GIB), 86, 82, 936e9, 71e12, _PCIE),
    Machine("L4", ("NVIDIA L4",), int(22.0 * _GIB), 89, 58, 300e9, 121e12, _PCIE),
    Machine("RTX-3060", ("NVIDIA GeForce RTX 3060",), int(11.7 * _GIB), 86, 28, 360e9, 25.5e12, _PCIE),
]
_TOO_OLD = {"T4": 7.5, "V100": 7.0, "P100": 6.0, "RTX-2080": 7.5}


def machine(name: str, ranks: int) -> Machine:
    """The device of this name, of a run on so many ranks, which share the CPU's memory.

    Raises:
        UserError: it is not known, or too old.
    """
    if name.lower() == "cpu":
        return Machine("cpu", (), host_memory_bytes() // ranks, 0, 0, 0.0, 0.0, 0.0)
    known = {_plain(each): gpu for gpu in GPUS for each in (gpu.name, *gpu.torch_names)}
    matches = {gpu.name: gpu for each, gpu in known.items() if each.endswith(_plain(name))}
    if len(matches) == 1:
        return matches.popitem()[1]
    names = [gpu.name for gpu in GPUS]
    for old, capability in _TOO_OLD.items():
        if _plain(name) == _plain(old):
            raise UserError(
                f"is {old}, of compute capability {capability}; expected 8.0 or higher: {', '.join(names)}",
                field="--gpu",
            )
    near = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.4)
    hint = " or ".join(dict.fromkeys(known[each].name for each in near))
    hint = f"; did you mean {hint}?" if hint else ""
    raise UserError(f"is {name}, which is not known; expected cpu or one of {', '.join(names)}{hint}", field="--gpu")


def _plain(name: str) -> str:
    """H100 of "NVIDIA H100 80GB HBM3" stays longer; RTX-4090, rtx 4090 and RTX4090 are one."""
    return name.lower().replace("nvidia", "").replace("geforce", "").replace("-", "").replace("_", "").replace(" ", "")


def here(ranks: int) -> Machine:
    """This machine's GPU, whose speed may not be known, or else its CPU. Raises UserError: as `default_device`."""
    if default_device().type == "cpu":
        return machine("cpu", ranks)
    found = torch.cuda.get_device_properties(0)
    for gpu in GPUS:
        if found.name in gpu.torch_names:
            return replace(gpu, memory=found.total_memory)
    arch = 10 * found.major + found.minor
    return Machine(found.name, (), found.total_memory, arch, found.multi_processor_count, 0.0, 0.0, 0.0)
