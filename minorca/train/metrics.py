"""What a run records: metrics.jsonl, TensorBoard, Weights & Biases, curves.png, seconds by phase, and the FLOPs behind
its MFU.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import resource
import time
import uuid
from pathlib import Path

import numpy as np
import torch

from minorca.config import Config
from minorca.data.store import TokenStore
from minorca.errors import UserError
from minorca.files.atomic import sync
from minorca.model.architecture import Architecture
from minorca.model.layout import projections
from minorca.plan.devices import GPUS
from minorca.train.curves import draw_curves
from minorca.train.metrics_lines import Kept

log = logging.getLogger(__name__)

PHASES: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "other")

# of a step's line, what depends on the machine's speed
MEASURED = {"seconds", "tokens_per_second", "mfu", "peak_memory_bytes"} | {f"{phase}_seconds" for phase in PHASES}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 matrix FLOP/s; a device not in the table has no MFU rather than a guessed one."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.flops for gpu in GPUS if name in gpu.torch_names), None)


def training_flops(
    arch: Architecture, adapter_parameters: int, lengths: list[int], trained: int, full: bool = False, hidden: int = 0
) -> float:
    """FLOPs of one forward and backward over documents of these lengths, `trained` tokens of them in the loss;
    recomputation not counted. MFU is this by a step's seconds, its ranks and the device's dense bf16 peak.

    A token costs 4 FLOPs a frozen matrix parameter (forward, and the gradient of activations) and 6 a trained one: an
    adapter's, or with `full` every one; attention 4 D a query head and visible key forward, and 2.5 times that
    backward. The head meets trained tokens alone.

    Args:
        hidden: the pairs of a query and an earlier key within the window that are hidden, being of two branches.
    """
    matrix = 6 if full else 4
    block = sum(part.in_features * part.out_features for parts in projections(arch).values() for part in parts)
    products = (matrix * arch.layers * block + 6 * adapter_parameters) * sum(lengths)
    attention = 3.5 * 4 * arch.heads * arch.head_dim * arch.layers * (visible_pairs(lengths, arch.window) - hidden)
    return products + matrix * arch.vocab_size * arch.hidden_size * trained + attention


def hidden_pairs(store: TokenStore, rows: np.ndarray, window: int | None) -> int:
    """The pairs of a query and an earlier key within the window of which the query does not see the key, since they
    are of two branches.
    """
    hidden = 0
    for row in rows if store.has_branches else ():
        length, (starts, _) = int(store.lengths[row]), store.branches(row)
        prompt, *others = starts.tolist()
        branches = [stop - start for start, stop in zip(starts.tolist(), [*others, length])]
        seen = visible_pairs([prompt + branch for branch in branches], window)
        hidden += visible_pairs([length], window) - seen + (len(branches) - 1) * visible_pairs([prompt], window)
    return hidden


def visible_pairs(lengths: list[int], window: int | None) -> int:
    """The pairs of a query and a key that it sees, in documents of these lengths."""
    pairs = 0
    for n in lengths:
        w = min(n, window or n)
        pairs += w * (w + 1) // 2 + (n - w) * w
    return pairs


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds by phase: calling it with a phase's name ends the phase before.

    On CUDA the marks are events in the stream, so that work counts where it is computed, and `data` is the time that
    the GPU waits for a batch.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.phases: list[str] = []
        # of each phase its start: seconds, or on CUDA an event
        self.seconds: list[float] = []
        self.events: list[torch.cuda.Event] = []

    def __call__(self, phase: str) -> None:
        self.phases.append(phase)
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.seconds.append(time.perf_counter())

    def read(self) -> dict[str, float]:
        """The seconds of every phase since the last reading; the current phase continues."""
        self(self.phases[-1])
        if self.cuda:
            self.events[-1].synchronize()
            durations = [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(self.events)]
        else:
            durations = [end - start for start, end in itertools.pairwise(self.seconds)]
        totals: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for phase, duration in zip(self.phases, durations):
            totals[phase] += duration
        del self.phases[:-1], self.seconds[:-1], self.events[:-1]
        return totals


class Record:
    """A run's record, kept by rank 0: metrics.jsonl (a line a step, flushed at once), TensorBoard, a progress bar, and
    Weights & Biases where `train.wandb` names a project.
    """

    def __init__(self, config: Config, resumed: int, steps: int, kept: Kept | None = None):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        output = config.output
        self.path = output / "metrics.jsonl"
        self.log_every = config.train.log_every
        self.kept = kept or Kept()
        if self.kept.removed:
            log.info("%s: %d lines are written anew", self.path, self.kept.removed)
        self.file = self.path.open("ab")
        self.file.truncate(len(self.kept.content))
        sync(output)
        self.bytes = len(self.kept.content)
        self.sha256 = hashlib.sha256(self.kept.content)
        self.board = SummaryWriter(output / "tensorboard", purge_step=resumed + 1 if resumed else 0)
        self.wandb = _start_wandb(config, output, resumed)
        self.bar = tqdm(total=steps, initial=resumed, unit="step", desc="training")
        self.seconds = 0.0
        self.tokens = 0
        self.phases = dict.fromkeys(PHASES, 0.0)

    def _write(self, step: int, values: dict) -> None:
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        self.file.write(line)
        self.file.flush()
        self.bytes += len(line)
        self.sha256.update(line)
        known = {name: value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(known, step=step)

    def step(self, step: int, values: dict, phases: dict[str, float]) -> None:
        """A step of all ranks together: its loss, its own tokens, its wall-clock seconds; and of those on rank 0 the
        seconds of each phase: data, forward, backward and optimizer are its own, evaluation, checkpoint and other are
        what came between the step before and this one.
        """
        self._write(step, values | {f"{phase}_seconds": seconds for phase, seconds in phases.items()})
        self.seconds += values["seconds"]
        self.tokens += values["tokens"]
        self.phases = {phase: self.phases[phase] + seconds for phase, seconds in phases.items()}
        self.bar.update()
        if step % self.log_every == 0 or step == self.bar.total:
            loss = "skipped" if values["loss"] is None else f"{values['loss']:.4f}"
            self.bar.set_postfix(loss=loss, tokens_per_second=f"{values['tokens_per_second']:,.0f}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """An evaluation after a step: eval_loss, eval_loss/NAME of each set, and what else the objective measures."""
        self._write(step, values)
        prefix = "eval_loss/"
        sets = [f"{k.removeprefix(prefix)} {value:.4f}" for k, value in values.items() if k.startswith(prefix)]
        by_set = f" ({', '.join(sets)})" if sets else ""
        self.bar.write(f"step {step}: held-out loss {values['eval_loss']:.4f}{by_set}")

    def tasks(self, step: int, values: dict[str, float]) -> None:
        """An evaluation of tasks after a step: eval_TASK/METRIC."""
        self._write(step, values)
        listed = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in values.items())
        self.bar.write(f"step {step}: {listed}")

    def synchronised(self) -> tuple[int, str]:
        """The size and SHA-256 of metrics.jsonl, once it is on the disk."""
        os.fsync(self.file.fileno())
        return self.bytes, self.sha256.hexdigest()

    def check_file(self) -> None:
        """Raises UserError: metrics.jsonl is another file by now, and what is written to this one is lost."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                return
        remedy = "what was saved is intact; put the file back with all its lines, or move it away to go on without them"
        raise UserError(f"was removed while the run wrote there, or replaced; {remedy}", path=self.path)

    def close(self, phases: dict[str, float]) -> None:
        """Ends the record with a summary, `phases` those after the last step."""
        self.bar.close()
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()
        if self.seconds:
            spent = {phase: seconds + phases[phase] for phase, seconds in self.phases.items()}
            total = sum(spent.values())
            shares = ", ".join(f"{phase} {seconds / total:.1%}" for phase, seconds in spent.items())
            log.info("%.0f seconds, %.0f tokens/s; %s", total, self.tokens / self.seconds, shares)


def draw(output: Path) -> None:
    """Draws curves.png from the whole of metrics.jsonl. A run's result does not depend on it."""
    try:
        draw_curves(output / "metrics.jsonl", output / "curves.png")
    except Exception as error:
        log.warning("%s: cannot be drawn (%s: %s)", output / "curves.png", type(error).__name__, error)


def import_wandb(config: Config):
    """The package of Weights & Biases, or None where it is not asked for."""
    if not config.train.wandb:
        return None
    try:
        # not among the requirements
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        message = f"is {config.train.wandb}, and the package is not installed; pip install wandb, or leave the key out"
        raise UserError(message, field="train.wandb") from None
    return wandb


def _start_wandb(config: Config, output: Path, resumed: int):
    """The run of Weights & Biases, the same one after a resume: its id lies beside the metrics."""
    wandb = import_wandb(config)
    path = output / "wandb-id"
    if not wandb:
        return None
    if not resumed or not path.exists():
        path.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=config.train.wandb,
        name=output.name,
        dir=output,
        id=path.read_text(),
        resume="allow",
        config=config.nested(),
    )
