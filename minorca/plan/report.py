"""What a plan says: as JSON, and as a table."""

from typing import Any

from minorca.config import Config
from minorca.model.architecture import Architecture
from minorca.plan.advice import advise, largest_micro_batch
from minorca.plan.communication import communication_seconds
from minorca.plan.devices import MEASURED, Machine
from minorca.plan.estimate import KINDS, Estimator

GPUS_COMPARED = (1, 8, 64, 1024)
# where doubling the GPUs brings less than half again
DOUBLING = 1.5
MOST_GPUS = 2**20


def make_plan(config: Config, arch: Architecture, device: Machine, ranks: int, whole: bool = True) -> dict[str, Any]:
    """A run's memory and speed, in the form that JSON has.

    Args:
        whole: also what is faster and how it scales; else advice is there only where the run does not fit.
    """
    estimator = Estimator(arch, device, ranks)
    found = estimator(config)
    fits = estimator.fits(config)
    plan = {
        "device": device.name,
        "gpus": ranks if device.arch else 0,
        "ranks": ranks,
        "shard": "fsdp" if found.sharded or config.train.full else "none",
        "memory_bytes": found.memory,
        "usable_bytes": device.usable,
        "fits": fits,
        "tokens_per_second": estimator.tokens_per_second(config),
        "micro_batch_tokens": found.tokens,
        "micro_batches": found.micro_batches,
        "advice": [advice.as_json() for advice in advise(estimator, config)] if whole or not fits else [],
    }
    if whole:
        plan["largest_micro_batch_tokens"] = largest_micro_batch(estimator, config)
        plan |= _scaling(config, arch, device, estimator)
        plan["assumptions"] = _assumptions(config, device)
    return plan


def _scaling(config: Config, arch: Architecture, device: Machine, estimator: Estimator) -> dict[str, Any]:
    """A step's collectives and speed on more GPUs; nothing where the device's rates are not known."""
    own = estimator(config)
    if own.micro_seconds is None:
        return {"communication": [], "stops_scaling_at": None}
    several = own if estimator.ranks > 1 else Estimator(arch, device, GPUS_COMPARED[1])(config)
    replicate = config.parallel.replicate

    def speed(gpus: int, micro_batches: int) -> float:
        found = own if gpus == estimator.ranks else several
        seconds = found.step_seconds(device, gpus, _copies(gpus, replicate), micro_batches)
        return micro_batches * found.tokens / (seconds or float("inf"))

    single = speed(1, own.micro_batches)
    rows = []
    for gpus in GPUS_COMPARED:
        # a GPU without a micro-batch does nothing: the step grows with the GPUs
        micro_batches = max(own.micro_batches, gpus)
        found = several if gpus > 1 else own
        tokens_per_second = speed(gpus, micro_batches)
        rows.append(
            {
                "gpus": gpus,
                "batch_tokens": micro_batches * own.tokens,
                "bytes": sum(each.bytes for each in found.collectives) if gpus > 1 else 0,
                "seconds": communication_seconds(found.collectives, device, gpus, _copies(gpus, replicate)),
                "tokens_per_second": tokens_per_second,
                "efficiency": tokens_per_second / gpus / single,
            }
        )
    doubled = (n for n in _powers_of_two() if speed(2 * n, 2 * n) < DOUBLING * speed(n, n))
    return {"communication": rows, "stops_scaling_at": next(doubled, None)}


def _copies(gpus: int, replicate: int) -> int:
    return replicate if gpus % replicate == 0 else 1


def _powers_of_two():
    n = 1
    while n < MOST_GPUS:
        yield n
        n *= 2


def _assumptions(config: Config, device: Machine) -> list[str]:
    """What the figures rest on, in words."""
    found = [
        f"micro-batches are full: documents of data.seq_len {config.data.seq_len}, of which every token is trained",
        "nothing was loaded, rendered or measured",
    ]
    if not device.arch:
        return [*found, "memory is what torch's tensors take; tokens/s of a CPU are not predicted"]
    found.append("1 GB of the GPU is left to CUDA, cuBLAS and NCCL")
    if config.optim.name == "adamw_8bit":
        found.append("adamw_8bit is not compiled here, as it is in a run, which needs less memory and time for it")
    if config.model.dtype != "bfloat16" or not device.rates:
        return [*found, "tokens/s are predicted of bf16 on the GPUs that --gpu names"]
    measured = "measured on one" if device.name in MEASURED else "assumed, as shares of its data sheet"
    found.append(f"rates of the {device.name}: {measured}; 74 us of the host a launch, as measured beside an H200")
    found.append(
        "communication: NVLink or PCI Express within nodes of 8 GPUs, 400 Gb/s a GPU between them, 80% of either; "
        "gathers and scatters overlap with computation, the sum of unsharded gradients does not"
    )
    return found


# ------------------------------------------------------------------------------------------------------------- a table


def table(plan: dict[str, Any]) -> str:
    """A plan for people."""
    memory = plan["memory_bytes"]
    ranks = f"{plan['ranks']} x {plan['device']}"
    lines = [f"{ranks}, the model {'sharded by FSDP2' if plan['shard'] == 'fsdp' else 'whole on each'}"]
    lines += [f"  {kind:14}{memory[kind] / 1e9:8.2f} GB" for kind in KINDS]
    verdict = "fits" if plan["fits"] else "does not fit"
    usable = f"{plan['usable_bytes'] / 1e9:.2f}"
    lines.append(f"  {'peak of a rank':14}{memory['total'] / 1e9:8.2f} GB of {usable}: {verdict}")
    speed = plan["tokens_per_second"]
    micro_batches = f"{plan['micro_batches']} micro-batches of {plan['micro_batch_tokens']:,} tokens a step"
    lines.append(f"{f'{speed:,.0f} tokens/s predicted; ' if speed else ''}{micro_batches}")
    if largest := plan.get("largest_micro_batch_tokens"):
        lines.append(f"largest micro-batch that fits: --train.micro_batch_tokens {largest}")
    if plan["advice"]:
        lines.append("faster:" if plan["fits"] else "what fits, the fastest first:")
        lines += [f"  {advised(each)}" for each in plan["advice"]]
    elif not plan["fits"]:
        lines.append("nothing fits on this device: name one with more memory, or more of them with --gpus")
    if plan.get("communication"):
        lines += _communication_lines(plan)
    lines += [f"- {assumption}" for assumption in plan.get("assumptions", ())]
    return "\n".join(lines)


def advised(advice: dict[str, Any]) -> str:
    """A line of advice: the options, and what they give."""
    speed = advice["tokens_per_second"]
    gives = f"{advice['memory_bytes'] / 1e9:.2f} GB" + (f", {speed:,.0f} tokens/s" if speed else "")
    return f"{advice['options']}  ({gives})"


def _communication_lines(plan: dict[str, Any]) -> list[str]:
    lines = [f"  {'GPUs':>6}{'tokens a step':>16}{'communication':>16}{'tokens/s':>14}{'efficiency':>12}"]
    for row in plan["communication"]:
        cost = f"{1e3 * row['seconds']:.1f} ms"
        speed = f"{row['tokens_per_second']:,.0f}"
        lines.append(f"  {row['gpus']:>6,}{row['batch_tokens']:>16,}{cost:>16}{speed:>14}{row['efficiency']:>12.0%}")
    micro_batches = plan["micro_batches"]
    stop = plan["stops_scaling_at"]
    more = f"more than {micro_batches} need a larger train.batch_tokens; "
    limit = f"from {stop:,} on, twice as many bring less than half again" if stop else "no limit below a million"
    return [*lines, f"  {more}{limit}"]
