"""A whole run, top to bottom: what it starts from, its steps, and what it leaves."""

import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from minorca.config import Config
from minorca.errors import MACHINE_ERRORS, UserError, disk_reason
from minorca.host import is_first_rank
from minorca.signals import Terminated, signals_noted
from minorca.train import checkpoint, metrics, parallel
from minorca.train.best import Best
from minorca.train.build import Learner, build
from minorca.train.forecast import Forecast
from minorca.train.inputs import Inputs, check_ranks_agree, read_inputs
from minorca.train.loop import Run
from minorca.train.memory import out_of_memory, weights_do_not_fit
from minorca.train.metrics_lines import kept_lines
from minorca.train.optim import check_optimizer
from minorca.train.output import (
    check_output,
    check_settings,
    claim,
    create_output,
    output_lock,
    set_outcome_aside,
    write_settings,
)
from minorca.train.precompute import with_reference
from minorca.train.profiling import profiled
from minorca.train.ranks import World, init_distributed
from minorca.train.receipt import Receipt, kept_receipt, open_receipt
from minorca.train.revisions import pin
from minorca.train.run_length import RunLength, run_length
from minorca.train.task_evaluation import open_tasks
from minorca.waiting import waiting_policy

log = logging.getLogger("minorca.train")

# what may be reported of any of the files that a step writes
DISK_ERRORS = MACHINE_ERRORS | {errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR}


def train(
    config: Config, profile: bool = False, until: int | None = None, after_step: Callable[[], None] | None = None
) -> None:
    """A whole run, from data to what was trained. Every rank calls it.

    Args:
        until: the step after which it ends, and saves; None: the last.
        after_step: is called after every step, before its evaluation and checkpoint.

    Raises:
        UserError: whatever the user can fix, before a model is built where it can be known by then.
        KeyboardInterrupt, Terminated: after SIGINT and other signals, the step under way finished and saved.
    """
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # documented, but missing from torch's annotations
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    # before there is a process group: a plan on the CPU has one of its own
    forecast = Forecast(config) if is_first_rank() else None
    with init_distributed(config.parallel.timeout) as world, contextlib.ExitStack() as stack:
        if forecast:
            stack.callback(forecast.close)
        try:
            signum = _train(config, profile, world, stack, forecast, until, after_step)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, config, world.size) from error
        except OSError as error:
            if error.errno == errno.ENOENT and config.output in Path(os.fsdecode(error.filename or "")).parents:
                message = "was removed while the run wrote there; start the run again, in an output that stays"
                raise UserError(message, path=os.fsdecode(error.filename)) from error
            if error.errno not in DISK_ERRORS:
                raise
            reason = disk_reason(error, config.output)
            raise UserError(
                f"{reason}; what was saved is intact, and the same command resumes from there", path=config.output
            ) from error
    if signum:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)


def _train(
    config: Config,
    profile: bool,
    world: World,
    stack: contextlib.ExitStack,
    forecast: Forecast | None,
    until: int | None,
    after_step: Callable[[], None] | None,
) -> int | None:
    """Returns the signal that ended the run early, the same on every rank; `stack` undoes what the run sets up."""
    # 1. everything that can be refused, before memory is taken
    world.set_status("reading the base model's files and the data")
    config, revisions = pin(config)
    for given, pinned in revisions.items():
        log.info("%s: this run uses %s", given, pinned)
    metrics.import_wandb(config)
    check_optimizer(config.optim)
    tasks = open_tasks(config.eval)
    output = config.output
    check_output(config, profile)
    # a new output is created once nothing more can be refused
    new_output = not output.is_dir()
    if world.rank == 0 and not new_output:
        stack.enter_context(output_lock(output))
    inputs = read_inputs(config)

    # 2. where an earlier run stopped, and what is left to do
    found, state = find_earlier(config, inputs.identity)
    resumed = state.step if state else 0
    world.barrier_without_timeout("with the data read")
    check_ranks_agree(config, inputs.identity, resumed, world)
    schedule = inputs.schedule(config)
    length = run_length(config, schedule)
    finished = why_finished(state, length, config) if state else None
    if finished and config.outcome.is_dir():
        log.info("%s: %s; nothing to do", output, finished)
        # its process was killed before
        if world.rank == 0 and not (output / "curves.png").exists():
            metrics.draw(output)
        return None

    check_goes_on(config, found, state)
    if forecast:
        forecast.check(inputs.store.lengths)
    # rank 0 may have waited for it
    world.barrier_without_timeout("with the memory estimated")

    # 3. the model and its optimizer
    world.set_status("loading the model")
    try:
        learner = build(config, inputs.base, world, resumed=state is not None)
    except torch.OutOfMemoryError as error:
        raise weights_do_not_fit(error, config, world.size, bool(inputs.base.quantization)) from error
    world.barrier_without_timeout("with the model loaded")
    if learner.reference and config.dpo.precompute:
        inputs = with_reference(inputs, learner.reference, config, world)
        # the values that it has exchanged are not needed again
        learner.reference = None
    log.info("%s", learner.model.arch)
    if world.device.type == "cpu":
        log.info("%d threads; how they wait: %s", torch.get_num_threads(), waiting_policy())
    log.info("%s; %d steps, %d rows", parallel.describe(learner.model, world), length.steps, len(inputs.store))
    if found and state:
        best = _restore(found, state, learner, config, world)
        _log_changes(state, inputs.identity)
    else:
        best = Best()
        log.info("%s: no checkpoint; starting at step 1", output)

    # 4. the record, on rank 0
    record, receipt, run_id = None, None, ""
    if world.rank == 0:
        if new_output:
            stack.enter_context(create_output(output))
        rows = {source.path: dict(source.counts) for source in inputs.store.sources}
        run_id = claim(config, profile, revisions, rows)
        if not finished:
            set_outcome_aside(config.outcome, resumed)
        record, receipt = _open_record(config, inputs, world, found, state, length, run_id)

    # 5. the steps
    noted = stack.enter_context(signals_noted())
    if world.monitor:
        world.monitor.noted = noted
    if profile:
        after_step = stack.enter_context(profiled(output / "profile", world))
    updates = state.updates if state else 0
    run = Run(config, world, inputs, learner, length, best, record, noted, resumed, updates, tasks, run_id)
    run.receipt, run.until = receipt, until
    run.loop(schedule.step, after_step or (lambda: None))

    # 6. what was trained, where other programs look for it
    run.finish()
    if forecast:
        forecast.report(world.device)
    return run.stopped_by


def _log_changes(state: checkpoint.State, identity: dict) -> None:
    for key, (before, after) in checkpoint.changes(state.run, identity).items():
        log.info("%s: was %r up to step %d, is %r from here on", key, before, state.step, after)


def _open_record(
    config: Config,
    inputs: Inputs,
    world: World,
    found: Path | None,
    state: checkpoint.State | None,
    length: RunLength,
    run_id: str,
) -> tuple[metrics.Record, Receipt]:
    """Opens the record and the receipt of the output directory, of which this process has the lock, and writes the
    settings there.
    """
    if state:
        checkpoint.set_damaged_aside(state, config)
    kept = kept_lines(config.output, found, state)
    receipt = open_receipt(config, inputs, world.size, found, state, kept.content)
    write_settings(config, run_id)
    return metrics.Record(config, state.step if state else 0, length.steps, kept), receipt


def find_earlier(config: Config, identity: dict) -> tuple[Path | None, checkpoint.State | None]:
    """The checkpoint that the run resumes from, and what it says; None where the run starts afresh.

    Raises:
        UserError: it cannot resume from there, or would write over a finished run.
    """
    found = checkpoint.find(config)
    if not found and config.outcome.exists():
        raise UserError(
            f"holds a finished run's {config.outcome.name} and no checkpoint; move it away, or choose another "
            "train.output",
            path=config.output,
        )
    return found, checkpoint.read_state(found, identity, config) if found else None


def check_goes_on(config: Config, found: Path | None, state: checkpoint.State | None) -> None:
    """Raises UserError: a run that is not finished cannot go on with its metrics.jsonl, its receipt.jsonl, or its
    edited settings.
    """
    kept_lines(config.output, found, state)
    kept_receipt(config.output, found, state)
    check_settings(config)


def why_finished(state: checkpoint.State, length: RunLength, config: Config) -> str | None:
    """Why no step is left after a checkpoint's; None where one is.

    Raises:
        UserError: the checkpoint is of a step after the last.
    """
    if state.step > length.steps:
        key = "epochs" if config.train.steps is None else "steps"
        raise UserError(
            f"is {getattr(config.train, key):g}, a run of {length.steps} steps, and its checkpoint is of step "
            f"{state.step}; set it higher, or choose another train.output",
            field=f"train.{key}",
        )
    if state.step == length.steps:
        return f"all {length.steps} steps are done"
    return state.best.why_stopped(config.train.early_stopping)


def _restore(found: Path, state: checkpoint.State, learner: Learner, config: Config, world: World) -> Best:
    """Fills what is trained and the optimizer; returns the best evaluation so far."""
    checkpoint.load(found, state, learner.trainable, learner.optimizer)
    log.info("resumed from %s, written by torch %s on %d ranks", found, state.torch, state.ranks)
    threads = torch.get_num_threads()
    if world.device.type == "cpu" and state.threads != threads:
        log.warning(
            "it was written with %d threads, this process has %d: sums round differently, losses agree to about 1e-6",
            state.threads,
            threads,
        )
    best = state.best
    if not config.train.keep_best or best.step < 0:
        return best
    if checkpoint.has_best(found):
        best.tensors = checkpoint.load_best(found, learner.trainable)
    elif best.step == state.step:
        best.tensors = learner.trainable.snapshot()
    else:
        message = "the best %s so far, of step %d, was not kept; the best from here on is"
        log.warning(message, config.outcome.name, best.step)
        best = Best(evaluated=best.evaluated)
    return best
