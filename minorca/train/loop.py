"""Fine-tuning, top to bottom."""

import contextlib
import errno
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minorca.config import Config
from minorca.config_file import write_config
from minorca.data.packing import Step
from minorca.data.portable_files import write_files
from minorca.errors import UserError
from minorca.files.atomic import lock, publish
from minorca.model.lora import seed_dropout
from minorca.signals import Terminated, signals_noted
from minorca.train import checkpoint, metrics, parallel
from minorca.train.build import Learner, build
from minorca.train.inputs import Inputs, check_ranks_agree, read_inputs
from minorca.train.optim import learning_rate
from minorca.train.profiling import profiled
from minorca.train.ranks import World, init_distributed
from minorca.train.step import evaluate, forward_backward, local_batch, locate_nonfinite

log = logging.getLogger("minorca.train")

# what a disk reports that is full, lost, or not ours to write, under any of the files that a step writes
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EISDIR,
}


def train(config: Config, profile: bool = False) -> None:
    """A whole run, from data to the saved adapter. Every rank calls it.

    Raises:
        UserError: whatever the user can fix, before a model is built where it can be known by then.
        KeyboardInterrupt, Terminated: after SIGINT and SIGTERM, the step under way finished and saved.
    """
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # documented, but missing from torch's annotations
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    with init_distributed(config.parallel.timeout) as world, contextlib.ExitStack() as stack:
        try:
            signum = _train(config, profile, world, stack)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"{error}; what was saved is intact, and the same command resumes from there", path=config.output
            ) from error
    if signum:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


def _train(config: Config, profile: bool, world: World, stack: contextlib.ExitStack) -> int | None:
    """Returns the signal that ended the run early, the same on every rank; `stack` undoes what the run sets up."""
    # 1. everything that can be refused, before memory is taken
    world.set_status("reading the base model's files and the data")
    metrics.import_wandb(config)
    output = config.output
    _check_writable(output)
    # a new output is created once nothing more can be refused
    new_output = not output.is_dir()
    if world.rank == 0 and not new_output:
        stack.enter_context(output_lock(output))
    inputs = read_inputs(config)

    # 2. where an earlier run stopped
    found = checkpoint.find(config)
    state = checkpoint.read_state(found, inputs.identity, config) if found else None
    resumed = state.step if state else 0
    world.barrier_without_timeout("with the data read")
    check_ranks_agree(config, inputs.identity, resumed, world)
    if not found and (output / "adapter").exists():
        raise UserError(
            "holds a finished run's adapter and no checkpoint; move it away, or choose another train.output",
            path=output,
        )
    schedule = inputs.schedule(config)
    steps = config.train.steps or schedule.steps(config.train.epochs)
    if resumed >= steps and (output / "adapter").is_dir():
        log.info("%s: all %d steps are done; nothing to do", output, steps)
        return None

    # 3. the model and its optimizer
    world.set_status("loading the model")
    learner = build(config, inputs.base, world, resumed=state is not None)
    world.barrier_without_timeout("with the model loaded")
    log.info("%s", learner.model.arch)
    log.info("%s; %d steps, %d rows", parallel.describe(learner.model, world), steps, len(inputs.store))
    if found and state:
        _restore(found, state, learner, world)
    else:
        log.info("%s: no checkpoint; starting at step 1", output)

    # 4. the record, on rank 0
    record = None
    if world.rank == 0:
        if new_output:
            stack.enter_context(_create_output(output))
        checkpoint.sweep(output)
        if state:
            checkpoint.set_damaged_aside(state, config)
        write_config(config, output / "config.yaml")
        record = metrics.Record(config, resumed, steps)

    # 5. the steps
    noted = stack.enter_context(signals_noted())
    if world.monitor:
        world.monitor.noted = noted
    after_step = stack.enter_context(profiled(output / "profile", world)) if profile else lambda: None
    updates = state.updates if state else 0
    run = Run(config, world, inputs, learner, steps, record, noted, resumed, updates)
    run.loop(schedule.step, after_step)

    # 6. the adapter, where other programs look for it
    run.finish(output)
    return run.stopped_by


def _check_writable(output: Path) -> None:
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"is {output}, but {parent} is not a writable directory; choose another", field="train.output")


def _restore(found: Path, state: checkpoint.State, learner: Learner, world: World) -> None:
    checkpoint.load(found, state, learner.trainable, learner.optimizer)
    log.info("resumed from %s, written by torch %s on %d ranks", found, state.torch, state.ranks)
    threads = torch.get_num_threads()
    if world.device.type == "cpu" and state.threads != threads:
        log.warning(
            "it was written with %d threads, this process has %d: sums round differently, losses agree to about 1e-6",
            state.threads,
            threads,
        )


@contextlib.contextmanager
def _create_output(output: Path) -> Iterator[None]:
    output.mkdir(parents=True, exist_ok=True)
    with output_lock(output):
        if checkpoint.published(output / "checkpoints"):
            raise UserError("another run wrote here while this one was starting; start this one again", path=output)
        yield


@contextlib.contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Within it no other run can write to the output directory."""
    path = output / ".lock"
    file = lock(path)
    if file is None:
        holder = path.read_text().strip() or "which has just started"
        raise UserError(
            f"is {output}, where another run writes ({holder}); wait for it, or choose another train.output",
            field="train.output",
        )
    with file:
        yield


@dataclass
class Run:
    """The steps of one rank, from the built model to the run's end.

    Attributes:
        steps: how many the run has.
        record: on rank 0, what it writes.
        noted: the signals that this rank has received.
        step: the last step that was done.
        updates: how many of the steps updated the parameters; a skipped one does not.
        stopped_by: the signal that ends the run early, the same on every rank.
    """

    config: Config
    world: World
    inputs: Inputs
    learner: Learner
    steps: int
    record: metrics.Record | None
    noted: list[int]
    step: int
    updates: int
    stopped_by: int | None = None

    def __post_init__(self):
        self.clock = metrics.Clock(self.world.device)

    def loop(self, micro_batches_of: Callable[[int], Step], after_step: Callable[[], None]) -> None:
        """Every step that is left, with the evaluations and checkpoints that are due."""
        config = self.config.train
        self._first_evaluation()
        self.learner.model.train()
        self.clock("data")
        while self.step < self.steps and not self.stopped_by:
            self.step += 1
            self._step(micro_batches_of(self.step))
            after_step()
            if is_due(self.step, config.eval_every, self.steps) and not self.stopped_by:
                self._evaluate()
            if is_due(self.step, config.checkpoint_every, self.steps) or self.stopped_by:
                self._save()
            self.clock("data")

    def _first_evaluation(self) -> None:
        """The one before the first step, or one whose checkpoint exists and whose line does not: it was interrupted."""
        due = self.step == 0 or is_due(self.step, self.config.train.eval_every, self.steps)
        if not (self.inputs.held_out and due):
            return
        recorded = bool(self.record and self.record.evaluated)
        if self.world.sum([recorded])[0] == 0:
            self._evaluate()

    def _step(self, micro_batches: Step) -> None:
        """One optimizer step, and its line in the record."""
        started = time.perf_counter()
        self.world.set_status(f"step {self.step}")
        rows = np.concatenate(micro_batches)
        normalizer = self.learner.objective.normalizer(self.inputs.store, rows)
        loss, sums = self._gradients(micro_batches, normalizer)

        self.clock("optimizer")
        self.learner.trainable.sum_gradients(self.world)
        grad_norm = self.learner.trainable.clip_gradients(self.config.optim.max_grad_norm)
        shares = [loss.item(), *signal_counts(self.noted), *(value.item() for value in sums.values())]
        totals = self.world.sum(shares)
        whole_loss, signals = totals[0], totals[1:3]
        self.stopped_by = common_signal(signals)
        lr = learning_rate(self.step, self.steps, self.config.optim)
        values = {"loss": whole_loss, "grad_norm": grad_norm, "lr": lr}
        values |= self._update(micro_batches, lr, whole_loss, grad_norm)
        self.learner.optimizer.zero_grad()
        phases = self.clock.read()
        seconds = time.perf_counter() - started
        self.clock("other")
        if self.record:
            measured = self._measured(rows, normalizer, dict(zip(sums, totals[3:])), seconds)
            self.record.step(self.step, values | measured, phases)

    def _gradients(self, micro_batches: Step, normalizer: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of this rank's micro-batches; returns its share of the step's loss, and of further sums.

        Both are still on the device: reading them here would have it wait for the host.
        """
        world = self.world
        loss = torch.zeros((), device=world.device)
        sums: dict[str, Tensor] = {}
        for first in range(0, len(micro_batches), world.size):
            index = first + world.rank
            last = first + world.size >= len(micro_batches)
            self.clock("data")
            batch = local_batch(self.inputs.store, micro_batches, index, world.device)
            seed_dropout(self.learner.model, self.config.train.seed, self.step, index)
            outcome = forward_backward(self.learner, batch, normalizer, last, self.clock)
            loss += outcome.loss
            for name, value in outcome.sums.items():
                sums[name] = sums[name] + value if name in sums else value
        return loss, sums

    def _update(self, micro_batches: Step, lr: float, loss: float, grad_norm: float) -> dict:
        """Updates the parameters, unless the loss or gradient is NaN or infinite; returns what changes in the step's
        line.

        Raises:
            UserError: where train.nonfinite is stop.
        """
        for group in self.learner.optimizer.param_groups:
            group["lr"] = lr
        # the same on every rank
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.learner.optimizer.step()
            self.updates += 1
            return {}
        cause = locate_nonfinite(self.learner, self.inputs.store, micro_batches, self.step, self.config, self.world)
        fault = f"step {self.step}: the loss is {loss} and the gradient norm {grad_norm}; from {cause}"
        if self.config.train.nonfinite == "stop":
            raise UserError(
                f"{fault}. The last checkpoint is intact; set train.nonfinite to skip to resume from it, or fix the "
                "rows or lower optim.lr in a run with another train.output"
            )
        log.warning("%s; skipped", fault)
        values = {"loss": loss, "grad_norm": grad_norm}
        return {name: value if math.isfinite(value) else None for name, value in values.items()} | {"skipped": True}

    def _measured(self, rows: np.ndarray, normalizer: int, sums: dict[str, float], seconds: float) -> dict:
        """What a step's line says besides loss, norm and rate."""
        world, model = self.world, self.learner.model
        store = self.inputs.store
        lengths = store.lengths[rows].tolist()
        trained = int(store.trained_counts[rows].sum())
        flops = metrics.training_flops(model.arch, self.learner.trainable.count, lengths, trained)
        peak = metrics.peak_flops(world.device, model.embedding.weight.dtype)
        return {
            "tokens": sum(lengths),
            "trained_tokens": trained,
            **self.learner.objective.metrics(sums, normalizer),
            "seconds": seconds,
            "tokens_per_second": sum(lengths) / seconds,
            "mfu": flops / seconds / world.size / peak if peak else None,
            "peak_memory_bytes": metrics.peak_memory_bytes(world.device),
        }

    def _evaluate(self) -> None:
        """Evaluates the held-out rows, if there are any; a signal meanwhile ends the run."""
        if not self.inputs.held_out:
            return
        self.clock("evaluation")
        self.world.set_status(f"evaluating after step {self.step}")
        values = evaluate(self.learner, self.inputs.held_out, self.config, self.world, self.noted)
        if values is None:
            self.stopped_by = common_signal(self.world.sum(signal_counts(self.noted)))
        elif self.record:
            self.record.evaluation(self.step, values)

    def _save(self) -> None:
        self.clock("checkpoint")
        self.world.set_status(f"saving after step {self.step}")
        state = checkpoint.State(
            checkpoint.FORMAT,
            self.step,
            self.updates,
            self.world.size,
            torch.get_num_threads(),
            torch.__version__,
            self.inputs.identity,
        )
        directory = self.config.output / "checkpoints"
        checkpoint.save(
            directory, self.learner.trainable, self.learner.optimizer, state, self.config.train.keep, self.world
        )

    def finish(self, output: Path) -> None:
        """Closes the record and, of a run that has done all its steps, publishes what was trained."""
        tensors = None if self.stopped_by else self.learner.trainable.gather(self.world)
        if not self.record:
            return
        self.record.close(self.clock.read(), finished=not self.stopped_by)
        if tensors is None:
            name = signal.Signals(self.stopped_by).name
            log.info("%s: stopped after step %d; the same command resumes from there", name, self.step)
            return
        # last of all: it is what says that a run is finished
        shutil.rmtree(output / "adapter", ignore_errors=True)
        publish(output / "adapter", lambda path: self._write_adapter(path, tensors))
        log.info("done: %s", output / "adapter")

    def _write_adapter(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.learner.trainable.save(directory, tensors)
        write_files(directory, self.inputs.adapter_files)


def signal_counts(noted: list[int]) -> list[int]:
    """How often this rank received SIGTERM and SIGINT."""
    return [noted.count(signal.SIGTERM), noted.count(signal.SIGINT)]


def common_signal(counts_of_all: list[float]) -> int | None:
    """The signal that any rank has received: the same on all."""
    return next((s for s, count in zip((signal.SIGTERM, signal.SIGINT), counts_of_all) if count), None)


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether what is done every so many steps, and after the last, is done after this one."""
    return step == steps or (every > 0 and step % every == 0)
