"""`--dry-run`: what a run would do, in words, with a row and a batch of its data; nothing is written."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable

import numpy as np
import torch

from minorca.config import Config, warmup_steps
from minorca.data.packing import BatchSchedule
from minorca.data.visible_text import branch_headings, marked_text
from minorca.model.build import build_model
from minorca.model.lora import add_adapters
from minorca.train import metrics
from minorca.train.build import check_adapters, lora_settings
from minorca.train.forecast import Forecast
from minorca.train.inputs import Inputs, read_inputs
from minorca.train.optim import check_optimizer, learning_rate
from minorca.train.output import check_output
from minorca.train.revisions import pin
from minorca.train.run import check_goes_on, find_earlier, why_finished
from minorca.train.run_length import RunLength, run_length
from minorca.train.task_evaluation import open_tasks


def dry_run(config: Config) -> None:
    """Prints how long a run is, a row as it is trained, and the first micro-batch.

    All rows are rendered as in a run, but into a temporary directory that is removed.

    Raises:
        UserError: what the run would refuse before it loads the model.
    """
    config, _ = pin(config)
    metrics.import_wandb(config)
    check_optimizer(config.optim)
    open_tasks(config.eval)
    check_output(config)
    with contextlib.closing(Forecast(config)) as forecast, tempfile.TemporaryDirectory() as directory:
        data = dataclasses.replace(config.data, store=directory)
        inputs = read_inputs(dataclasses.replace(config, data=data))
        check_adapters(config, lora_settings(config, inputs.base.new_ids), inputs.base.arch.layers)
        found, state = find_earlier(config, inputs.identity)
        schedule = inputs.schedule(config)
        length = run_length(config, schedule)
        finished = why_finished(state, length, config) if state else None
        if not (finished and config.outcome.is_dir()):
            check_goes_on(config, found, state)
        _print_model(config, inputs)
        _print_length(config, inputs, length)
        if found:
            print(f"resumes from {found}" + (f": {finished}" if finished else ""))
        if not finished:
            forecast.check(inputs.store.lengths)
            _print_step(inputs, schedule, state.step + 1 if state else 1)
    print("dry run: nothing was written")


def _print_model(config: Config, inputs: Inputs) -> None:
    model = build_model(inputs.base.arch, getattr(torch, config.model.dtype), inputs.base.quantization)
    if config.train.full:
        model.requires_grad_(True)
    else:
        add_adapters(model, lora_settings(config, inputs.base.new_ids))
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # fp32, each with a gradient and two moments of AdamW
    size = trained * (10 if config.optim.name == "adamw_8bit" else 16)
    kinds = f"nf4 and {config.model.dtype}" if inputs.base.quantization else config.model.dtype
    print(inputs.base.arch)
    print(
        f"memory before activations: {frozen / 1e9:.2f} GB of {kinds} weights, and "
        f"{size / 1e9:.2f} GB for {trained:,} trained values, their gradients and AdamW's moments"
        + (", divided among the ranks" if config.train.full else "")
    )


def _print_length(config: Config, inputs: Inputs, length: RunLength) -> None:
    train, optim, store = config.train, config.optim, inputs.store
    tokens, trained = store.lengths.sum(), store.trained_counts.sum()
    held_out = f"; {len(inputs.held_out)} rows are held out" if inputs.held_out else ""
    print(f"rows: {len(store)} of {tokens:,} tokens, {trained:,} of them trained{held_out}")
    micro_batches = train.batch_tokens // train.micro_batch_tokens
    print(f"steps: {length.steps}, each of {micro_batches} micro-batches of at most {train.micro_batch_tokens} tokens")
    if inputs.held_out:
        print(f"evaluations: before step 1, and after {_listed(length.evaluates_after, length.steps)}")
    if config.eval.tasks:
        due = _listed(length.evaluates_tasks_after, length.steps)
        print(f"tasks {', '.join(config.eval.tasks)}: before step 1, and after {due}")
    print(f"checkpoints: after {_listed(length.saves_after, length.steps)}")
    highest = warmup_steps(optim, length.steps) or 1
    rates = [f"{learning_rate(n, length.steps, optim):.3g} at step {n}" for n in (1, highest, length.steps)]
    print(f"learning rate: {', '.join(dict.fromkeys(rates))}")


def _listed(is_due: Callable[[int], bool], steps: int) -> str:
    due = [str(step) for step in range(1, steps + 1) if is_due(step)]
    shown = due if len(due) <= 10 else [*due[:9], "...", due[-1]]
    return f"step {', '.join(shown)}"


def _print_step(inputs: Inputs, schedule: BatchSchedule, number: int) -> None:
    """Prints the first row and the first micro-batch of a step."""
    store = inputs.store
    step = schedule.step(number)
    rows = step[0].tolist()
    ids, trained = store.row(rows[0])
    print(f"--- {store.locate(rows[0])}: {len(ids)} tokens, {trained.sum()} trained")
    starts, scores = store.branches(rows[0])
    print(marked_text(inputs.tok, ids, trained, branch_headings(starts.tolist(), scores.tolist(), trained)))
    lengths = store.lengths[rows]
    print(f"--- step {number}, micro-batch 1 of {len(step)}: {len(rows)} rows, {lengths.sum()} tokens")
    for row, start, length in zip(rows, np.cumsum(lengths) - lengths, lengths):
        print(f"tokens {start} to {start + length - 1}: {store.locate(row)}, {length} tokens")
