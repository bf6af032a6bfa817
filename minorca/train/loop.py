"""The steps of a run: training, evaluations and checkpoints as they are due, and what was trained at the end."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minorca.config import Config
from minorca.data.packing import Step
from minorca.data.portable_files import RECORD
from minorca.errors import UserError
from minorca.export.huggingface import config_file
from minorca.files.atomic import publish, write_files
from minorca.model.lora import seed_dropout
from minorca.signals import STOPPING
from minorca.train import checkpoint, metrics
from minorca.train.best import Best
from minorca.train.build import Learner
from minorca.train.evaluation import evaluate
from minorca.train.inputs import Inputs
from minorca.train.objectives import Counts, Sums
from minorca.train.optim import learning_rate, set_learning_rate
from minorca.train.output import set_outcome_aside
from minorca.train.ranks import World
from minorca.train.receipt import Receipt
from minorca.train.run_length import RunLength
from minorca.train.step import forward_backward, local_batch, locate_nonfinite
from minorca.train.task_evaluation import TaskEvaluation
from minorca.train.trainable import gather, take_part

log = logging.getLogger("minorca.train")

# in the order in which they give a run its exit status
SIGNALS = (*STOPPING, signal.SIGINT)


@dataclass
class Run:
    """The steps of one rank, from the built model to the run's end.

    Attributes:
        best: the best evaluation so far.
        record: on rank 0, what it writes.
        noted: the signals that this rank has received.
        step: the last step that was done.
        updates: how many of the steps updated the parameters; a skipped one does not.
        tasks: what is evaluated beside held-out rows, if anything.
        run_id: on rank 0, what the names of unfinished files have.
        receipt: on rank 0, what vouches for what the run writes.
        until: the step after which it ends, and saves, though others are left; None: there is none.
        stopped_by: the signal that ends the run early, the same on every rank.
    """

    config: Config
    world: World
    inputs: Inputs
    learner: Learner
    length: RunLength
    best: Best
    record: metrics.Record | None
    noted: list[int]
    step: int
    updates: int
    tasks: TaskEvaluation | None = None
    run_id: str = ""
    receipt: Receipt | None = None
    until: int | None = None
    stopped_by: int | None = None

    def __post_init__(self):
        self.clock = metrics.Clock(self.world.device)

    def loop(self, micro_batches_of: Callable[[int], Step], after_step: Callable[[], None]) -> None:
        """Every step that is left, with the evaluations and checkpoints that are due."""
        self._first_evaluation()
        self._first_tasks()
        self.learner.model.train()
        self.clock("data")
        while self.step < self.length.steps and self.step != self.until and not self._ends_early():
            self.step += 1
            self._step(micro_batches_of(self.step))
            after_step()
            if self.length.evaluates_after(self.step) and not self.stopped_by:
                self._evaluate()
            saves = self.length.saves_after(self.step) or self.step == self.until or self._ends_early()
            if saves:
                self._save()
            if self._evaluates_tasks() and not self.stopped_by:
                self._evaluate_tasks()
                if self.stopped_by and not saves:
                    self._save()
            self.clock("data")

    def _ends_early(self) -> bool:
        return bool(self.stopped_by or self.best.why_stopped(self.config.train.early_stopping))

    def _evaluates_tasks(self) -> bool:
        return self.length.evaluates_tasks_after(self.step) or self._ends_early()

    def _first_evaluation(self) -> None:
        """The one before the first step, or one whose checkpoint exists and whose line does not: it was interrupted."""
        due = self.step == 0 or self.length.evaluates_after(self.step)
        if not (self.inputs.held_out and due):
            return
        recorded = self.record.kept.evaluated if self.record else None
        is_recorded, loss = self.world.sum([recorded is not None, recorded or 0.0])
        if is_recorded:
            self._count_evaluation(loss)
        else:
            self._evaluate()

    def _first_tasks(self) -> None:
        """As `_first_evaluation`."""
        if self.tasks and not self.stopped_by and (self.step == 0 or self._evaluates_tasks()):
            (is_recorded,) = self.world.sum([bool(self.record and self.record.kept.has_tasks)])
            if not is_recorded:
                self._evaluate_tasks()

    def _step(self, micro_batches: Step) -> None:
        """One optimizer step, and its line in the record."""
        started = time.perf_counter()
        self.world.set_status(f"step {self.step}")
        rows = np.concatenate(micro_batches)
        objective = self.learner.objective
        counts = objective.counts(self.inputs.store, rows)
        self.clock("forward")
        objective.prepare(self.inputs.store, rows, self.world)
        sums = self._gradients(micro_batches, counts)

        self.clock("optimizer")
        self.learner.trainable.sum_gradients(self.world)
        grad_norm = self.learner.trainable.clip_gradients(self.config.optim.max_grad_norm)
        # read at once: each reading waits for the device
        shares = torch.stack(list(sums.values())).tolist()
        # their number, and with it gloo's order of sums, does not depend on how many signals there are
        interrupts = self.noted.count(signal.SIGINT)
        stops, interrupts, *totals = self.world.sum([len(self.noted) - interrupts, interrupts, *shares])
        if stops or interrupts:
            self._stop()
        totals = dict(zip(sums, totals))
        loss = objective.loss(totals, counts)
        lr = learning_rate(self.step, self.length.steps, self.config.optim)
        values = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        values |= self._update(micro_batches, lr, loss, grad_norm)
        self.learner.optimizer.zero_grad()
        phases = self.clock.read()
        seconds = time.perf_counter() - started
        self.clock("other")
        if self.record:
            measured = self._measured(rows, objective.metrics(totals, counts), seconds)
            self.record.step(self.step, values | measured, phases)

    def _gradients(self, micro_batches: Step, counts: Counts) -> Sums:
        """Adds the gradients of this rank's micro-batches; returns their sums.

        These are still on the device: reading them here would have it wait for the host.
        """
        world = self.world
        total: Sums = {}
        for first in range(0, len(micro_batches), world.size):
            index = first + world.rank
            last = first + world.size >= len(micro_batches)
            self.clock("data")
            batch = local_batch(self.inputs.store, micro_batches, index, world.device)
            seed_dropout(self.learner.model, self.config.train.seed, self.step, index)
            sums = forward_backward(self.learner, batch, counts, last, self.clock)
            total = {name: total[name] + value if total else value for name, value in sums.items()}
        return total

    def _update(self, micro_batches: Step, lr: float, loss: float, grad_norm: float) -> dict:
        """Updates the parameters, unless the loss or gradient is NaN or infinite; returns what changes in the step's
        line.

        Raises:
            UserError: where train.nonfinite is stop.
        """
        set_learning_rate(self.learner.optimizer, lr)
        # the same on every rank
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.learner.optimizer.step()
            self.updates += 1
            return {}
        cause = locate_nonfinite(self.learner, self.inputs.store, micro_batches, self.step, self.config, self.world)
        fault = f"step {self.step}: the loss is {loss} and the gradient norm {grad_norm}; from {cause}"
        if self.config.train.nonfinite == "stop":
            raise UserError(
                f"{fault}. The last checkpoint is intact; to resume from it, set train.nonfinite to skip or lower "
                "optim.lr; or fix the rows in a run with another train.output"
            )
        log.warning("%s; skipped", fault)
        values = {"loss": loss, "grad_norm": grad_norm}
        return {name: value if math.isfinite(value) else None for name, value in values.items()} | {"skipped": True}

    def _measured(self, rows: np.ndarray, metrics_of_objective: dict[str, float], seconds: float) -> dict:
        """What a step's line says besides loss, norm and rate."""
        world, model = self.world, self.learner.model
        store = self.inputs.store
        lengths = store.lengths[rows].tolist()
        trained = int(store.trained_counts[rows].sum())
        full = self.config.train.full
        # a row of the vocabulary is no product of every token
        parameters = self.learner.trainable.parameters.items()
        adapters = 0 if full else sum(p.numel() for name, p in parameters if ".layers." in name)
        hidden = metrics.hidden_pairs(store, rows, model.arch.window)
        flops = metrics.training_flops(model.arch, adapters, lengths, trained, full, hidden)
        peak = metrics.peak_flops(world.device, getattr(torch, self.config.model.dtype))
        return {
            "tokens": sum(lengths),
            "trained_tokens": trained,
            **metrics_of_objective,
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
            self._stop()
            return
        if self.record:
            self.record.evaluation(self.step, values)
        self._count_evaluation(values["eval_loss"])

    def _evaluate_tasks(self) -> None:
        """Evaluates the tasks, if there are any; a signal meanwhile ends the run."""
        if not self.tasks:
            return
        self.clock("evaluation")
        self.world.set_status(f"evaluating tasks after step {self.step}")
        values = self.tasks(self.learner.model, self.inputs.tok, self.world, self.noted)
        if values is None:
            self._stop()
        elif self.record:
            self.record.tasks(self.step, values)

    def _stop(self) -> None:
        """Ends the run by the signal that a rank has received."""
        self.stopped_by = common_signal(self.world.sum(signal_counts(self.noted)))

    def _count_evaluation(self, loss: float) -> None:
        if self.best.count(self.step, loss) and self.config.train.keep_best:
            self.best.tensors = self.learner.trainable.snapshot()

    def _save(self) -> None:
        self.clock("checkpoint")
        self.world.set_status(f"saving after step {self.step}")
        size, digest = self.record.synchronised() if self.record else (-1, "")
        state = checkpoint.State(
            checkpoint.FORMAT,
            self.step,
            self.updates,
            self.world.size,
            torch.get_num_threads(),
            torch.__version__,
            self.inputs.identity,
            **self.best.saved(),
            metrics_bytes=size,
            metrics_sha256=digest,
            receipt=(self.receipt and self.receipt.head) or "",
        )
        directory = self.config.output / "checkpoints"
        learner = self.learner
        # all weights are a model's directory, and new tokens need a tokenizer; a checkpoint has no directories within
        needs_all = self.config.train.full or self.inputs.tok.new_tokens
        is_kept = (lambda name: "/" not in name) if needs_all else (lambda name: name == RECORD)
        files = {name: content for name, content in self.inputs.files.items() if is_kept(name)}
        if self.config.train.full:
            # the final model is in model.dtype
            files["config.json"] = config_file(self.inputs.base, torch.float32)
        checkpoint.save(
            directory,
            learner.trainable,
            learner.optimizer,
            state,
            self.config.train.keep,
            self.world,
            self.best.tensors,
            files,
            self.run_id,
        )
        if self.record:
            self.record.check_file()
        if self.receipt:
            self.receipt.checkpoint(self.step, checkpoint.path_of(directory, self.step))

    def finish(self) -> None:
        """Publishes what was trained, of a run that has done all its steps, and closes the record."""
        if self.record:
            self.record.bar.close()
        if self.stopped_by:
            self._close()
            name = signal.Signals(self.stopped_by).name
            log.info("%s: stopped after step %d; the same command resumes from there", name, self.step)
            return
        if self.step < self.length.steps and not self._ends_early():
            self._close()
            return
        best = self.best.tensors
        tensors = gather(self.learner.trainable.final() if best is None else best.items(), self.world)
        if not self.record:
            take_part(tensors)
            return
        if reason := self.best.why_stopped(self.config.train.early_stopping):
            log.info("%s", reason)
        # it is what says that a run is finished; neither a picture nor what else ends the record may cost it
        outcome = self.config.outcome
        # somebody else's; the run's own is set aside when it goes on
        set_outcome_aside(outcome, self.step)
        publish(outcome, lambda path: self._write_outcome(path, tensors), self.run_id)
        self._close()
        # of a replay, nobody looks at them
        if self.until is None:
            metrics.draw(self.config.output)
        log.info("done: %s", outcome)
        if not self.config.train.full and any(".layers." not in name for name in self.learner.trainable.parameters):
            log.info(
                "vLLM and minorca.serve load no adapter that changes embedding or head; merge it for them: %s",
                self._merge_command(),
            )

    def _close(self) -> None:
        if self.record:
            self.record.close(self.clock.read())

    def _merge_command(self) -> str:
        """What merges the adapter into the base of its training, which may have to be written first."""
        base, output = self.inputs.base, self.config.output
        export, model, before = "python -m minorca.export", self.config.model.path, ""
        # quantized while it was loaded, and not in its files
        if base.quantization and not base.quantized:
            before = f"{export} --model {model} {base.quantization.options} --output {output / 'base'} && "
            model = output / "base"
        return f"{before}{export} --model {model} --adapter {self.config.outcome} --output {output / 'merged'}"

    def _write_outcome(self, directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Writes what was trained: up to the best evaluation where that is kept, else all."""
        self.learner.trainable.save(directory, tensors)
        write_files(directory, self.inputs.files)
        if self.best.tensors is not None:
            step, loss = self.best.step, self.best.loss
            (directory / "best.json").write_text(json.dumps({"step": step, "eval_loss": loss}) + "\n")
            message = "the %s is that of step %d, which has the lowest held-out loss, %.4f"
            log.info(message, self.config.outcome.name, step, loss)
        elif self.config.train.keep_best:
            message = "no evaluation gave a number; the last %s is written, not the best one"
            log.warning(message, self.config.outcome.name)
        if self.receipt:
            self.receipt.outcome(self.step, directory, self.config.outcome.name)


def signal_counts(noted: list[int]) -> list[int]:
    """How often this rank received each signal that ends a run."""
    return [noted.count(signum) for signum in SIGNALS]


def common_signal(counts_of_all: list[float]) -> int | None:
    """The signal that any rank has received: the same on all."""
    return next((signum for signum, count in zip(SIGNALS, counts_of_all) if count), None)
