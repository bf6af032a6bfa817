"""Fine-tuning, top to bottom."""

import contextlib
import errno
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from minorca.config import Config, write_config
from minorca.data.chat_template import resolve_template
from minorca.data.packing import Batch, BatchSchedule, make_batch, plan_epoch, trained_tokens
from minorca.data.prepare import prepare_store
from minorca.data.store import TokenStore
from minorca.data.tokenizer import check_vocabulary, load_tokenizer
from minorca.errors import UserError
from minorca.files.atomic import lock, publish
from minorca.files.weights import SourceTensor, WeightFiles, load_weights, open_weights
from minorca.model.architecture import Architecture, model_directory, read_architecture
from minorca.model.attention import PackedAttention
from minorca.model.build import build_model
from minorca.model.lora import (
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
from minorca.model.network import Mistral
from minorca.signals import Terminated, signals_noted
from minorca.train import checkpoint, metrics, parallel
from minorca.train.objectives import next_token_loss
from minorca.train.optim import adamw, clip_gradients, learning_rate
from minorca.train.profiling import profiled

log = logging.getLogger("minorca.train")

# what a disk says that is full, lost, or not for us, under any of the files that a step writes
DISK = {
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


def read_data(config: Config) -> tuple[TokenStore, TokenStore | None]:
    """The rows to train on and those held out, rendered; prints what became of every row."""
    data, directory = config.data, model_directory(config.model.path)
    tok = load_tokenizer(directory)
    check_vocabulary(tok, read_architecture(directory).vocab_size, directory)
    template = resolve_template(tok, data.template)
    log.info("template: %s", template)
    store = prepare_store(data.sources(data.train), tok, template, data)
    store.report()
    if not isinstance(data.eval, float):
        held_out = prepare_store(data.sources(data.eval), tok, template, data) if data.eval else None
        if held_out:
            held_out.report()
        return store, held_out
    order = np.random.default_rng(config.train.seed).permutation(len(store))
    count = round(len(store) * data.eval)
    if not 0 < count < len(store):
        raise UserError(
            f"data.eval is {data.eval}: {count} of {len(store)} rows would be held out; give a path or another fraction"
        )
    log.info("%d of these rows are held out, %d are trained on", count, len(store) - count)
    return store.select(np.sort(order[count:])), store.select(np.sort(order[:count]))


@dataclass
class Base:
    """The frozen model's files, opened and checked against each other."""

    arch: Architecture
    files: WeightFiles
    pieces: dict[str, list[SourceTensor]]


def open_base(config: Config) -> Base:
    directory = model_directory(config.model.path)
    arch = read_architecture(directory)
    return Base(arch, *open_weights(directory, arch))


def build(config: Config, base: Base, world: parallel.World, resumed: bool = False) -> tuple[Mistral, LoRASettings]:
    """The model ready to train: meta device, adapters, checkpointing, sharding, then weights into what each rank keeps."""
    lora = config.lora
    settings = LoRASettings(lora.rank, lora.alpha, tuple(lora.targets), lora.dropout, lora.rslora)
    if lora.init and not resumed:
        _check_init(config, settings)
    model = build_model(base.arch, getattr(torch, config.model.dtype))
    add_adapters(model, settings)
    parallel.checkpoint_activations(model, config.parallel.activation_checkpointing)
    if parallel.shards(model, config.parallel, world):
        parallel.shard(model, config.parallel, world)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
    load_weights(model, base.files, base.pieces)
    room_for_adapters(model)
    init_adapters(model, config.train.seed)
    if lora.init and not resumed:
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
    attend = PackedAttention(batch.cu_seqlens, len(batch.tokens), model.arch.window, batch.tokens.device)
    return model(batch.tokens, attend=attend, head=next_token_loss(batch))


def local_batch(store: TokenStore, micro_batches: list[np.ndarray], index: int, device: torch.device) -> Batch:
    """A rank's micro-batch; past the last one, one without targets: what all ranks do together needs every rank."""
    batch = make_batch(store, micro_batches[min(index, len(micro_batches) - 1)])
    return (batch if index < len(micro_batches) else batch.without_targets()).to(device)


def forward_backward(
    model: Mistral, batch: Batch, trained: int, last: bool, clock: Callable[[str], None] = lambda phase: None
) -> Tensor:
    """Adds a micro-batch's gradients; returns its share of the step's loss (its sum over the step's trained tokens)."""
    clock("forward")
    if isinstance(model, FSDPModule):  # one reduction a step
        model.set_requires_gradient_sync(last)
    loss = batch_loss(model, batch) / trained
    clock("backward")
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: Mistral, store: TokenStore, config: Config, world: parallel.World, noted: Sequence[int] = ()
) -> float | None:
    """The mean loss of held-out rows, per trained token; None once a rank has noted a signal. Every rank calls it."""
    model.eval()
    plan = plan_epoch(store.lengths, config.train.micro_batch_tokens, world.size, config.data.packing, seed=0, epoch=0)
    losses = []
    for micro_batches in plan:
        losses.append(batch_loss(model, local_batch(store, micro_batches, world.rank, world.device)))
        if world.sum([len(noted)])[0]:
            break
    model.train()
    whole, finished = world.sum([torch.stack(losses).sum().item(), len(losses) == len(plan)])
    return whole / int(store.trained_counts.sum()) if finished == world.size else None


def blame(
    model: Mistral,
    optimizer: torch.optim.Optimizer,
    store: TokenStore,
    micro_batches: list[np.ndarray],
    step: int,
    config: Config,
    world: parallel.World,
) -> str:
    """Where a loss or gradient that is no finite number came from: the step's micro-batches again, each alone. Every rank calls it."""
    adapters, found = adapter_parameters(model).values(), []
    for index, rows in enumerate(micro_batches):
        optimizer.zero_grad()
        seed_dropout(model, config.train.seed, step, index)
        rank = index % world.size
        batch = make_batch(store, rows)
        batch = (batch if world.rank == rank else batch.without_targets()).to(world.device)
        (loss,) = world.sum([forward_backward(model, batch, trained_tokens(store, micro_batches), last=True).item()])
        parallel.sum_gradients(adapters, world)
        norm = clip_gradients(adapters, config.optim.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found.append(f"rank {rank}, loss {loss}, gradient norm {norm}, rows {', '.join(map(store.locate, rows))}")
    return "; ".join(found) or "no micro-batch gives it again, alone: a fault of the hardware, or of their sum"


def train(config: Config, profile: bool = False) -> None:
    """A whole run, from data to the saved adapter. Every rank calls it.

    Raises:
        UserError: whatever the user can mend, before a model is built where it can be known by then.
        KeyboardInterrupt, Terminated: after SIGINT and SIGTERM, the step under way finished and saved.
    """
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    with parallel.joined(config.parallel.timeout) as world, contextlib.ExitStack() as stack:
        try:
            signum = _train(config, profile, world, stack)
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise UserError(
                f"{error}; what was saved stands, and the same command goes on from there", path=config.train.output
            ) from error
    if signum:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


def _train(config: Config, profile: bool, world: parallel.World, stack: contextlib.ExitStack) -> int | None:
    """Returns the signal that ended the run early, the same on every rank; `stack` undoes what the run sets up."""
    # 1. what can be refused: the output, the base model's files and the data, before memory is taken
    world.doing("reading the base model's files and the data")
    metrics.import_wandb(config)
    output = Path(config.train.output)
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"train.output is {output}, but {parent} is no directory that can be written; choose another")
    new = not output.is_dir()  # then it is made when all that can be refused was not
    if world.rank == 0 and not new:
        stack.enter_context(held(output))
    base = open_base(config)
    store, held_out = read_data(config)

    # 2. where an earlier run stopped
    identity = checkpoint.identity(config, base.arch, sorted(set(base.files.files.values())), store, held_out)
    found = checkpoint.find(config)
    state = checkpoint.read_state(found, identity, config) if found else None
    resumed, updates = (state.step, state.updates) if state else (0, 0)
    world.meet("with the data read")
    _check_same(config, identity, resumed, world)
    if not found and (output / "adapter").exists():
        raise UserError(
            "holds a finished run's adapter and no checkpoint; move it away, or choose another train.output",
            path=output,
        )
    c = config.train
    train_sources = config.data.sources(config.data.train)
    sources = [(start, end, source.weight) for (start, end), source in zip(store.source_ranges, train_sources)]
    schedule = BatchSchedule(
        store.lengths,
        c.micro_batch_tokens,
        c.batch_tokens // c.micro_batch_tokens,
        config.data.packing,
        c.seed,
        sources,
    )
    steps = c.steps or schedule.steps(c.epochs)
    if resumed >= steps and (output / "adapter").is_dir():
        log.info("%s: all %d steps are done; nothing to do", output, steps)
        return None

    # 3. the model and its optimizer
    world.doing("loading the model")
    model, settings = build(config, base, world, resumed=state is not None)
    world.meet("with the model loaded")
    adapters = adapter_parameters(model)
    optimizer = adamw(adapters.values(), config.optim)
    log.info("%s", model.arch)
    log.info("%s; %s", parallel.describe(model, world), f"{steps} steps, {len(store)} rows")
    if state:
        checkpoint.load(found, state, model, optimizer)
        log.info("resumed from %s, written by torch %s on %d ranks", found, state.torch, state.ranks)
        if world.device.type == "cpu" and state.threads != torch.get_num_threads():
            log.warning(
                "it was written with %d threads, and here are %d: sums round differently, losses agree to about 1e-6",
                state.threads,
                torch.get_num_threads(),
            )
    else:
        log.info("%s: no checkpoint; starting at step 1", output)
    record = None
    if world.rank == 0:
        if new:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(output))
            if checkpoint.published(output / "checkpoints"):
                raise UserError(
                    "another run has come and gone there since this one began; start this one again", path=output
                )
        checkpoint.sweep(output)
        if state:
            checkpoint.set_damaged_aside(state, config)
        write_config(config, output / "config.yaml")
        record = metrics.Record(config, resumed, steps)

    # 4. the loop: one optimizer step a turn
    count = sum(p.numel() for p in adapters.values())
    peak = metrics.peak_flops(world.device, model.embedding.weight.dtype)
    clock, stopped_by, step = metrics.Clock(world.device), None, resumed

    def held_out_loss() -> int | None:
        clock("evaluation")
        world.doing(f"evaluating after step {step}")
        loss = evaluate(model, held_out, config, world, noted)
        if loss is None:
            return agreed(world.sum(counts(noted)))
        if record:
            record.evaluation(step, loss)

    noted = stack.enter_context(signals_noted())
    if world.watch:
        world.watch.noted = noted
    after_step = stack.enter_context(profiled(output / "profile", world)) if profile else lambda: None
    # stopped in an evaluation, the checkpoint is there and its line is not
    if (
        held_out
        and (step == 0 or due(step, c.eval_every, steps))
        and world.sum([bool(record and record.evaluated)])[0] == 0
    ):
        stopped_by = held_out_loss()
    model.train()
    clock("data")
    while step < steps and not stopped_by:
        step, started = step + 1, time.perf_counter()
        world.doing(f"step {step}")
        micro_batches = schedule.step(step)
        trained = trained_tokens(store, micro_batches)
        loss = torch.zeros((), device=world.device)
        for first in range(0, len(micro_batches), world.size):
            mine, last = first + world.rank, first + world.size >= len(micro_batches)
            clock("data")
            batch = local_batch(store, micro_batches, mine, world.device)
            seed_dropout(model, c.seed, step, mine)
            loss += forward_backward(model, batch, trained, last, clock)

        clock("optimizer")
        parallel.sum_gradients(adapters.values(), world)
        grad_norm = clip_gradients(adapters.values(), config.optim.max_grad_norm)
        whole_loss, *signals = world.sum([loss.item(), *counts(noted)])
        stopped_by = agreed(signals)
        lr = learning_rate(step, steps, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        values = {"loss": whole_loss, "grad_norm": grad_norm, "lr": lr}
        if math.isfinite(grad_norm) and math.isfinite(whole_loss):  # the same on every rank
            optimizer.step()
            updates += 1
        else:
            fault = f"step {step}: the loss is {whole_loss} and the gradient's norm {grad_norm}"
            fault = f"{fault}; from {blame(model, optimizer, store, micro_batches, step, config, world)}"
            if c.nonfinite == "stop":
                mend = "set train.nonfinite to skip to go on from it, or mend the rows or lower optim.lr in a run with another train.output"
                raise UserError(f"{fault}. The last checkpoint stands; {mend}")
            log.warning("%s; skipped", fault)
            values = {name: value if math.isfinite(value) else None for name, value in values.items()} | {
                "skipped": True
            }
        optimizer.zero_grad()
        phases, seconds = clock.read(), time.perf_counter() - started
        clock("other")

        # 5. what the step was, and what is due after it
        if record:
            lengths = store.lengths[np.concatenate(micro_batches)].tolist()
            flops = metrics.training_flops(model.arch, count, lengths, trained)
            values |= {
                "tokens": sum(lengths),
                "trained_tokens": trained,
                "seconds": seconds,
                "tokens_per_second": sum(lengths) / seconds,
                "mfu": flops / seconds / world.size / peak if peak else None,
                "peak_memory_bytes": metrics.peak_memory_bytes(world.device),
            }
            record.step(step, values, phases)
        after_step()
        if held_out and due(step, c.eval_every, steps) and not stopped_by:
            stopped_by = held_out_loss()
        if due(step, c.checkpoint_every, steps) or stopped_by:
            clock("checkpoint")
            world.doing(f"saving after step {step}")
            now = checkpoint.State(step, updates, world.size, torch.get_num_threads(), torch.__version__, identity)
            checkpoint.save(output / "checkpoints", model, optimizer, now, config, settings, world)
        clock("data")

    # 6. the adapter, where others look for it
    if not stopped_by:
        tensors = {name: parallel.whole(p, world) for name, p in adapters.items()}
    if record:
        record.close(clock.read(), finished=not stopped_by)
        if stopped_by:
            log.info(
                "%s: stopped after step %d; the same command goes on from there", signal.Signals(stopped_by).name, step
            )
        else:  # last of all: it is what says that a run is finished
            shutil.rmtree(output / "adapter", ignore_errors=True)
            publish(output / "adapter", lambda path: save_adapter(path, tensors, settings, config.model.path))
            log.info("done: %s", output / "adapter")
    return stopped_by


def _check_same(config: Config, identity: dict, resumed: int, world: parallel.World) -> None:
    """UserError where the ranks were started with different settings, or read other files: what each computes must fit the others'."""
    places = (
        "model.path",
        "data.train",
        "data.eval",
        "data.store",
        "lora.init",
        "train.output",
    )  # may differ where the content does not
    values = {f"{section}.{key}": value for section, keys in config.nested().items() for key, value in keys.items()}
    values = {key: value for key, value in values.items() if key not in places}
    for name, beginning in (
        ("the base model", "the base's"),
        ("the initial adapter", "the initial"),
        ("the held-out rows", "the held-out"),
        ("the rows", ("the rows'", "data.train's")),
    ):
        values[name] = [item for item in identity.items() if item[0].startswith(beginning)]
    values["the step of the newest checkpoint"] = resumed
    if differing := world.differing(values):
        raise UserError(
            f"the ranks differ in {', '.join(differing)}; start all with the same settings on the same files, and one output that they share"
        )


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Within it no other run can write to the output directory."""
    path = output / ".lock"
    file = lock(path)
    if file is None:
        raise UserError(
            f"train.output is {output}, where another run writes ({path.read_text().strip() or 'which just began'}); wait for it, or choose another train.output"
        )
    with file:
        yield


def counts(noted: list[int]) -> list[int]:
    """How often this rank was told to stop, by SIGTERM and by SIGINT."""
    return [noted.count(signal.SIGTERM), noted.count(signal.SIGINT)]


def agreed(counts_of_all: list[float]) -> int | None:
    """The signal that any rank has noted: the same on all."""
    return next((s for s, count in zip((signal.SIGTERM, signal.SIGINT), counts_of_all) if count), None)


def due(step: int, every: int, steps: int) -> bool:
    """Whether what happens every so many steps, and after the last, happens after this one."""
    return step == steps or (every > 0 and step % every == 0)
