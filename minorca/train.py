"""Fine-tuning, top to bottom: `torchrun -m minorca.train --config FILE`, or `python -m minorca.train` as one process."""

import logging
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
from minorca.chat import resolve_template
from minorca.config import Config, config_parser, read_config, write_config
from minorca.data.packing import Batch, make_batch, plan_epoch, trained_tokens
from minorca.data.sources import read_rows
from minorca.data.store import TokenStore, render_rows
from minorca.errors import UserError
from minorca.loading import build_model
from minorca.lora import (
    LoRASettings,
    adapter_parameters,
    add_adapters,
    init_adapters,
    load_adapter,
    read_adapter_settings,
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
    init_adapters(model, config.train.seed)
    if lora.init:
        _check_init(config, settings)
        load_adapter(model, lora.init, settings)
    return model, settings


def _check_init(config: Config, ours: LoRASettings) -> None:
    theirs = read_adapter_settings(config.lora.init)
    for key in ("rank", "alpha", "targets", "rslora"):
        here, there = getattr(ours, key), getattr(theirs, key)
        if (set(here) != set(there)) if key == "targets" else (here != there):
            raise UserError(f"lora.{key} is {here}, and the adapter {config.lora.init} has {there}; set them equal")


def forward_backward(model: Mistral, batch: Batch, trained: int, last: bool) -> Tensor:
    """Adds a micro-batch's gradients; returns its share of the step's loss (its sum over the step's trained tokens)."""
    if isinstance(model, FSDPModule):  # one reduction a step
        model.set_requires_gradient_sync(last)
    loss = model(batch.tokens, batch.cu_seqlens, head=next_token_loss(batch)) / trained
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(model: Mistral, store: TokenStore, config: Config, world: parallel.World) -> float:
    """The mean loss of held-out rows, per trained token."""
    model.eval()
    steps = plan_epoch(store.lengths, config.train.micro_batch_tokens, world.size, config.data.packing, seed=0, epoch=0)
    loss = torch.zeros((), device=world.device)
    for micro_batches in steps:
        batch = make_batch(store, micro_batches[min(world.rank, len(micro_batches) - 1)])
        if world.rank >= len(micro_batches):
            batch = batch.without_targets()
        batch = batch.to(world.device)
        loss += model(batch.tokens, batch.cu_seqlens, head=next_token_loss(batch))
    model.train()
    return world.sum([loss.item()])[0] / int(store.trained.sum())


def train(config: Config) -> None:
    """A whole run, from data to the saved adapter. Every rank calls it."""
    output = Path(config.train.output)

    # 1. the data, before a process waits for another or a model is touched
    store, held_out = read_data(config)
    per_step = config.train.batch_tokens // config.train.micro_batch_tokens

    def plan(epoch: int) -> list[list[list[int]]]:
        return plan_epoch(store.lengths, config.train.micro_batch_tokens, per_step, config.data.packing, config.train.seed, epoch)

    steps_an_epoch = len(plan(0))
    steps = config.train.steps or config.train.epochs * steps_an_epoch

    # 2. where an earlier run stopped
    found, resumed = checkpoint.find(config), 0
    if found:
        resumed = checkpoint.read_step(found, config)
        log.info("resuming from %s", found)
    if resumed >= steps and (output / "adapter").is_dir():
        log.info("%s: all %d steps are done; nothing to do", output, steps)
        return

    # 3. the model and its optimizer
    world = parallel.start()
    model, settings = build(config, world)
    adapters = adapter_parameters(model)
    optimizer = adamw(adapters.values(), config.optim)
    if found:
        checkpoint.load(found, resumed, model, optimizer, settings)
    count = sum(p.numel() for p in adapters.values())
    log.info("%s; %s trainable parameters; %d steps of %d an epoch; %s", model.arch, f"{count:,}", steps, steps_an_epoch, world)
    record = None
    if world.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
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
    this_epoch = None
    for step in range(resumed + 1, steps + 1):
        started = time.perf_counter()
        epoch, turn = divmod(step - 1, steps_an_epoch)
        if this_epoch is None or turn == 0:
            this_epoch = plan(epoch)
        micro_batches = this_epoch[turn]
        trained = trained_tokens(store, micro_batches)

        loss = torch.zeros((), device=world.device)
        for first in range(0, len(micro_batches), world.size):
            mine = first + world.rank
            batch = make_batch(store, micro_batches[min(mine, len(micro_batches) - 1)])
            if mine >= len(micro_batches):  # nothing is left for this rank, but what all ranks do together needs it
                batch = batch.without_targets()
            seed_dropout(model, config.train.seed, step, mine)
            loss += forward_backward(model, batch.to(world.device), trained, last=first + world.size >= len(micro_batches))

        parallel.sum_gradients(adapters.values(), world)
        grad_norm = clip_gradients(adapters.values(), config.optim.max_grad_norm)
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
            flops = metrics.training_flops(model.arch, count, lengths)
            record.step(step, whole_loss, grad_norm, lr, sum(lengths), trained, seconds, flops, world)
        if held_out and due(step, config.train.eval_every, steps):
            held_out_loss(step)
        if due(step, config.train.checkpoint_every, steps):
            checkpoint.save(output / "checkpoints", model, optimizer, step, config, settings, world)

    # 6. the adapter, where others look for it
    tensors = {name: parallel.whole(p) for name, p in adapters.items()}
    if record:
        shutil.rmtree(output / "adapter", ignore_errors=True)  # of an earlier end of this run
        checkpoint.publish(output / "adapter", lambda path: save_adapter(path, tensors, settings, config.model.path))
        record.close()
        log.info("done: %s", output / "adapter")
    parallel.stop()


def due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


if __name__ == "__main__":
    cli.run(main)
