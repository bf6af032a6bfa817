"""Fine-tuning, top to bottom: `torchrun -m minorca.train --config FILE`, or `python -m minorca.train` as one process."""

import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minorca import checkpoint, cli, metrics, parallel
from minorca.architecture import model_directory, read_architecture
from minorca.attention import Documents
from minorca.chat import resolve_template
from minorca.config import Config, config_parser, read_config, write_config
from minorca.data.packing import Batch, Plan, make_batch, plan_epoch, trained_tokens
from minorca.data.sources import read_rows
from minorca.data.store import TokenStore, render_rows
from minorca.errors import UserError
from minorca.files import publish
from minorca.loading import build_model
from minorca.lora import (
    LoRASettings,
    adapter_parameters,
    add_adapters,
    init_adapters,
    load_adapter,
    read_adapter_settings,
    room_for_adapters,
    save_adapter,
    seed_dropout,
)
from minorca.model import Mistral
from minorca.objectives import next_token_loss
from minorca.optim import adamw, clip_gradients, learning_rate
from minorca.tokenizer import check_vocabulary, load_tokenizer
from minorca.weights import load_weights, open_weights

log = logging.getLogger("minorca.train")


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)  # standard error is for errors and the bar
    logging.getLogger("minorca").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    parser = config_parser("minorca.train", "Fine-tunes a Mistral model with LoRA.")
    train(read_config(*parser.parse_known_args(argv)))
    parallel.end_process()


def read_data(config: Config) -> tuple[TokenStore, TokenStore | None]:
    """The rows to train on and those held out, rendered; prints what became of every row."""
    data, directory = config.data, model_directory(config.model.path)
    tok = load_tokenizer(directory)
    check_vocabulary(tok, read_architecture(directory).vocab_size, directory)
    template = resolve_template(tok, data.template)
    log.info("template: %s", template)

    def rendered(source: str) -> TokenStore:
        store, counts = render_rows(read_rows(source, data.limit), tok, data, template)
        log.info("%s: %s", source, ", ".join(f"{count} {what}" for what, count in counts.items()))
        if not len(store):
            raise UserError(f"{source}: no row is left to use ({dict(counts)})")
        return store

    store = rendered(data.train)
    if not isinstance(data.eval, float):
        return store, rendered(data.eval) if data.eval else None
    order = np.random.default_rng(config.train.seed).permutation(len(store))
    held_out = round(len(store) * data.eval)
    if not 0 < held_out < len(store):
        raise UserError(f"data.eval is {data.eval}: {held_out} of {len(store)} rows would be held out; give a path or another fraction")
    log.info("%d of these rows are held out, %d are trained on", held_out, len(store) - held_out)
    return store.select(sorted(order[held_out:])), store.select(sorted(order[:held_out]))


def build(config: Config, world: parallel.World) -> tuple[Mistral, LoRASettings]:
    """The model ready to train: meta device, adapters, checkpointing, sharding, then weights into what each rank keeps."""
    directory, lora = model_directory(config.model.path), config.lora
    settings = LoRASettings(lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.rslora)
    arch = read_architecture(directory)
    files, pieces = open_weights(directory, arch)
    model = build_model(arch, getattr(torch, config.model.dtype))
    add_adapters(model, settings)
    parallel.checkpoint_activations(model, config.parallel.activation_checkpointing)
    if parallel.shards(model, config.parallel, world):
        parallel.shard(model, config.parallel, world)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
    load_weights(model, files, pieces)
    room_for_adapters(model)
    init_adapters(model, config.train.seed)
    if lora.init:
        _check_init(config, settings)
        load_adapter(model, lora.init)
    return model, settings


def _check_init(config: Config, ours: LoRASettings) -> None:
    theirs = read_adapter_settings(config.lora.init)
    for key in ("rank", "alpha", "targets", "rslora"):
        here, there = getattr(ours, key), getattr(theirs, key)
        if (set(here) != set(there)) if key == "targets" else (here != there):
            raise UserError(f"lora.{key} is {here}, and the adapter {config.lora.init} has {there}; set them equal")


def batch_loss(model: Mistral, batch: Batch) -> Tensor:
    """The summed loss of a micro-batch's trained tokens."""
    # made here, not from cu_seqlens inside: FSDP moves a forward's tensors to the GPU, and reading them back would stall it
    attend = Documents(batch.cu_seqlens, len(batch.tokens), model.arch.window, batch.tokens.device)
    return model(batch.tokens, attend=attend, head=next_token_loss(batch))


def local_batch(store: TokenStore, micro_batches: list[list[int]], index: int, device: torch.device) -> Batch:
    """A rank's micro-batch; past the last one, one without targets: what all ranks do together needs every rank."""
    batch = make_batch(store, micro_batches[min(index, len(micro_batches) - 1)])
    return (batch if index < len(micro_batches) else batch.without_targets()).to(device)


def forward_backward(model: Mistral, batch: Batch, trained: int, last: bool) -> Tensor:
    """Adds a micro-batch's gradients; returns its share of the step's loss (its sum over the step's trained tokens)."""
    if isinstance(model, FSDPModule):  # one reduction a step
        model.set_requires_gradient_sync(last)
    loss = batch_loss(model, batch) / trained
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: Mistral, store: TokenStore, config: Config, world: parallel.World) -> float:
    """The mean loss of held-out rows, per trained token. Every rank calls it."""
    model.eval()
    steps = plan_epoch(store.lengths, config.train.micro_batch_tokens, world.size, config.data.packing, seed=0, epoch=0)
    losses = [batch_loss(model, local_batch(store, micro_batches, world.rank, world.device)) for micro_batches in steps]
    model.train()
    return world.sum([torch.stack(losses).sum().item()])[0] / int(store.trained.sum())


def train(config: Config) -> None:
    """A whole run, from data to the saved adapter. Every rank calls it.

    Raises:
        UserError: whatever the user can mend, before a model is built where it can be known by then.
    """
    # 1. the data, before a process waits for another or a model is touched
    store, held_out = read_data(config)
    identity = checkpoint.identity(config, store)

    # 2. where an earlier run stopped
    output = Path(config.train.output)
    found = checkpoint.find(config)
    resumed = checkpoint.read_step(found, identity, config) if found else 0
    planned, this_epoch = 0, plan(config, store, 0)
    steps_an_epoch = len(this_epoch)
    steps = config.train.steps or config.train.epochs * steps_an_epoch
    if resumed >= steps and (output / "adapter").is_dir():
        log.info("%s: all %d steps are done; nothing to do", output, steps)
        return
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"train.output is {output}, but {parent} is no directory that can be written; choose another")

    with parallel.joined() as world:
        if world.sum([resumed])[0] != resumed * world.size:
            raise UserError(f"{output}: the ranks found different checkpoints there; it must be a directory they share")

        # 3. the model and its optimizer
        model, settings = build(config, world)
        adapters = adapter_parameters(model)
        optimizer = adamw(adapters.values(), config.optim)
        if found:
            checkpoint.load(found, resumed, model, optimizer)
            log.info("resumed from %s", found)
        count = sum(p.numel() for p in adapters.values())
        log.info("%s; %s trainable parameters; %d steps of %d an epoch; %s", model.arch, f"{count:,}", steps, steps_an_epoch, world)
        record = None
        if world.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(output)
            write_config(config, output / "config.yaml")
            record = metrics.Record(output, resumed, steps, config.train.log_every)

        def held_out_loss(step: int) -> None:
            loss = evaluate(model, held_out, config, world)
            if record:
                record.evaluation(step, loss)

        if held_out and resumed == 0:
            held_out_loss(0)

        # 4. the loop: one optimizer step a turn
        model.train()
        peak = metrics.peak_flops(world.device, model.embedding.weight.dtype)
        for step in range(resumed + 1, steps + 1):
            started = time.perf_counter()
            epoch, turn = divmod(step - 1, steps_an_epoch)
            if epoch != planned:
                planned, this_epoch = epoch, plan(config, store, epoch)
            micro_batches = this_epoch[turn]
            trained = trained_tokens(store, micro_batches)

            loss = torch.zeros((), device=world.device)
            for first in range(0, len(micro_batches), world.size):
                mine, last = first + world.rank, first + world.size >= len(micro_batches)
                seed_dropout(model, config.train.seed, step, mine)
                loss += forward_backward(model, local_batch(store, micro_batches, mine, world.device), trained, last)

            parallel.sum_gradients(adapters.values(), world)
            grad_norm = clip_gradients(adapters.values(), config.optim.max_grad_norm)
            if not math.isfinite(grad_norm):  # the same on every rank
                raise UserError(f"step {step}: the gradient's norm is {grad_norm}; the adapter is as after step {step - 1}; lower optim.lr")
            lr = learning_rate(step, steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            (whole_loss,) = world.sum([loss.item()])
            seconds = time.perf_counter() - started

            # 5. what the step was, and what is due after it
            if record:
                lengths = [int(store.lengths[row]) for rows in micro_batches for row in rows]
                flops = metrics.training_flops(model.arch, count, lengths, trained)
                mfu = flops / seconds / world.size / peak if peak else None
                record.step(step, whole_loss, grad_norm, lr, sum(lengths), trained, seconds, mfu, world)
            if held_out and due(step, config.train.eval_every, steps):
                held_out_loss(step)
            if due(step, config.train.checkpoint_every, steps):
                checkpoint.save(output / "checkpoints", model, optimizer, step, identity, config, settings, world)

        # 6. the adapter, where others look for it
        tensors = {name: parallel.whole(p) for name, p in adapters.items()}
        if record:
            shutil.rmtree(output / "adapter", ignore_errors=True)  # of an earlier end of this run
            publish(output / "adapter", lambda path: save_adapter(path, tensors, settings, config.model.path))
            record.close()
            log.info("done: %s", output / "adapter")


def plan(config: Config, store: TokenStore, epoch: int) -> Plan:
    """The steps of an epoch."""
    c = config.train
    return plan_epoch(store.lengths, c.micro_batch_tokens, c.batch_tokens // c.micro_batch_tokens, config.data.packing, c.seed, epoch)


def due(step: int, every: int, steps: int) -> bool:
    """Whether what happens every so many steps, and after the last, happens after this one."""
    return step == steps or (every > 0 and step % every == 0)


if __name__ == "__main__":
    cli.run(main)
