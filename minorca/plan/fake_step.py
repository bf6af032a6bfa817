"""One training step of rank 0 on fake tensors: the code of a run, from the configuration as it is."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from minorca.config import Config
from minorca.data.packing import Batch, make_batch
from minorca.data.store import TokenStore
from minorca.files.weights import ModelFiles
from minorca.model.architecture import Architecture
from minorca.model.layout import source_tensors
from minorca.model.lora import adapter_parameters, seed_dropout
from minorca.model.network import Mistral
from minorca.model.quantization import Quantization, parse_quantization
from minorca.plan.devices import Machine
from minorca.plan.fake_device import fake_device
from minorca.plan.recorder import Launch, Recorder
from minorca.train.build import Learner, build
from minorca.train.inputs import with_vocabulary
from minorca.train.ranks import World
from minorca.train.step import forward_backward
from minorca_kernels import local_tensor

# from the build to the optimizer's state, nothing is trained yet
PREPARATION = ("build", "first step", "batch")


@dataclass(frozen=True)
class Recording:
    """What was recorded, and the kinds of storages, by number."""

    recorder: Recorder
    kinds: Mapping[int, str]

    @property
    def launches(self) -> Counter[Launch]:
        return Counter(self.recorder.launches)

    @cached_property
    def peak(self) -> dict[str, int]:
        """Bytes by kind."""
        return self.recorder.peak(self.kinds)

    @cached_property
    def peaks(self) -> dict[tuple[str, str], Counter[str]]:
        """Bytes by kind in each phase and part."""
        return self.recorder.peaks(self.kinds)


def extrapolated(run: Callable[[int], Recording], layers: int) -> Counter[Launch]:
    """The launches of so many layers, from runs of two and three."""
    return of_layers([run(2).launches, run(3).launches], layers - 2)


def of_layers(counts: list[Counter], more: int) -> Counter:
    """What so many more layers count than the first, from that and one of one layer more, or from one of all."""
    first, second = counts[0], counts[-1]
    return Counter({key: first[key] + more * (second[key] - first[key]) for key in first | second})


def model_files(arch: Architecture, quantization: Quantization | None = None) -> ModelFiles:
    """A directory of bf16 weights that have shapes and no values, and are quantized while they load."""
    tensors = source_tensors(arch, "huggingface")
    columns = {tensor.name: tensor.shape[1:] for stacked in tensors.values() for tensor in stacked}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(stop - start, *columns[name], dtype=torch.bfloat16)

    files: Any = SimpleNamespace(read=read, bytes=lambda name: 0)
    return ModelFiles(Path("fake"), arch, files, tensors, quantization=quantization)


def _files(config: Config, arch: Architecture) -> ModelFiles:
    """A model's directory with what a run adds to its vocabulary: `train.new_tokens`; templates add few."""
    names = config.train.new_tokens
    tok: Any = SimpleNamespace(new_tokens=names, vocab_size=arch.vocab_size + len(names))
    quantization = parse_quantization(config.model.quantize, config.model.double_quant)
    return with_vocabulary(model_files(arch, quantization), tok, config)


def shortest(objective: str) -> int:
    """The fewest tokens of a row: a token before one that is trained, or a prompt and two answers."""
    return 2 if objective == "sft" else 3


def fake_rows(lengths: Sequence[int], trained: float, objective: str = "sft", precomputed: bool = False) -> TokenStore:
    """Documents of these lengths, of each of which a share, at its end, is trained: of preferences, two answers of
    equal length to a prompt of at least a token.

    precomputed: with the log-probabilities of a reference.
    """
    sizes = np.array(lengths)
    offsets = np.concatenate([[0], sizes.cumsum()])
    position = np.concatenate([np.arange(length) for length in lengths])
    mask = position >= np.repeat((1 - trained) * sizes, sizes)
    if objective == "sft":
        return TokenStore(np.zeros(offsets[-1], np.int32), mask, offsets)
    mask &= position > 0
    prompts = np.array([size - size_trained for size, size_trained in zip(sizes, np.add.reduceat(mask, offsets[:-1]))])
    starts = np.stack([prompts, (prompts + sizes) // 2], 1).flatten().astype(np.int32)
    scores = np.tile(np.array([1, 0], np.float32), len(sizes))
    return TokenStore(
        np.zeros(offsets[-1], np.int32),
        mask,
        offsets,
        branch_offsets=2 * np.arange(len(sizes) + 1),
        branch_starts=starts,
        branch_scores=scores,
        reference=np.zeros(mask.sum(), np.float32) if precomputed else None,
    )


def fake_step(
    config: Config,
    arch: Architecture,
    device: Machine,
    ranks: int,
    lengths: Sequence[int],
    trained: float = 1.0,
    later: bool = False,
    attention: str = "own",
    arrange: Callable[[Batch], Batch] = lambda batch: batch,
) -> Recording:
    """Builds what learns, then runs a step of one micro-batch: phases build, first step, batch, forward, backward,
    optimizer.

    Args:
        arch: with as many layers as are run.
        lengths: of the micro-batch's documents.
        trained: the share of each document, at its end, that is trained.
        later: gradients of an earlier micro-batch are there, to which this one adds.
        attention: its back end on a GPU, "own" or "varlen".
        arrange: what is made of the micro-batch before the step.
    """
    # adapters are not loaded: neither what it would start from nor a reference
    lora, dpo = dataclasses.replace(config.lora, init=None), dataclasses.replace(config.dpo, reference="auto")
    config = dataclasses.replace(config, lora=lora, dpo=dpo)
    first, (store, batch) = step_rows(config, lengths, trained)
    rows = [first, (store, arrange(batch))]
    with _quiet(), fake_device(device, ranks, attention) as (world, recorder):
        learner = build(config, _files(config, arch), world)

        def clock(phase: str) -> None:
            recorder.phase = phase
            if phase == "batch":
                _mark_parts(learner.model, recorder)

        run_step(learner, config, world, rows, later, clock)
        return Recording(recorder, dict(_kinds(learner, recorder)))


def step_rows(config: Config, lengths: Sequence[int], trained: float = 1.0) -> list[tuple[TokenStore, Batch]]:
    """A micro-batch of these documents, after one of the fewest tokens, which makes the optimizer's state."""
    objective, precomputed = config.train.objective, config.dpo.precompute
    first = fake_rows([shortest(objective)], 1.0, objective, precomputed)
    stores = [first, fake_rows(lengths, trained, objective, precomputed)]
    return [(store, make_batch(store, np.arange(len(store)))) for store in stores]


def run_step(
    learner: Learner,
    config: Config,
    world: World,
    rows: list[tuple[TokenStore, Batch]],
    later: bool,
    clock: Callable[[str], None],
) -> None:
    """A step of one micro-batch, as in the middle of a run; `clock` is told of its phases. See `fake_step`."""
    (first, first_batch), (store, batch) = rows
    objective = learner.objective
    learner.model.train()
    # what a first step makes stays: the optimizer's state, and copies of adapters
    clock("first step")
    forward_backward(learner, first_batch.to(world.device), objective.counts(first, np.arange(1)), True)
    learner.optimizer.step()
    if not later:
        learner.optimizer.zero_grad()
    clock("batch")
    batch = batch.to(world.device)
    seed_dropout(learner.model, config.train.seed, 1, 0)
    documents = np.arange(len(store))
    clock("forward")
    objective.prepare(store, documents, world)
    forward_backward(learner, batch, objective.counts(store, documents), True, clock)
    clock("optimizer")
    learner.trainable.sum_gradients(world)
    learner.trainable.clip_gradients(config.optim.max_grad_norm)
    learner.optimizer.step()


def _mark_parts(model: Mistral, recorder: Recorder) -> None:
    """Has the recorder note which block runs forward or backward: the first, the last, or one between.

    What a block needs is linear in the number of blocks before it: the peak of many layers is in the first or the last.
    """
    last = len(model.layers) - 1

    def mark(part: str) -> Callable:
        def note(*_) -> None:
            recorder.part = part

        return note

    for i, block in enumerate(model.layers):
        part = "last block" if i == last else "first block" if i == 0 else "middle"

        def after(_module, _inputs, outputs: tuple, i: int = i, part: str = part) -> None:
            if i == last:
                recorder.part = "head"
            # a reference's forward has no backward
            if outputs[0].requires_grad:
                outputs[0].register_hook(mark(part))

        block.register_forward_pre_hook(mark(part))
        block.register_forward_hook(after)


def _kinds(learner: Learner, recorder: Recorder) -> Iterator[tuple[int, str]]:
    """(number, kind) of the storages that outlive a step, and of gradients."""
    adapters = adapter_parameters(learner.model).values()
    state = (
        part
        for values in learner.optimizer.state.values()
        for t in values.values()
        if isinstance(t, torch.Tensor)
        for part in _stored(t)
    )
    gradients = (p.grad for p in learner.trainable.parameters.values() if p.grad is not None)
    kinds = {
        "weights": (*learner.model.parameters(), *learner.model.buffers()),
        "adapters": adapters,
        "optimizer": state,
        "gradients": gradients,
    }
    for kind, tensors in kinds.items():
        for t in tensors:
            if (number := recorder.number(t)) is not None:
                yield number, kind


def _stored(t: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor consists of on this rank: itself, or of a moment in 8 bits its codes and scales."""
    t = local_tensor(t)
    if is_traceable_wrapper_subclass(t):
        return [getattr(t, name) for name in t.__tensor_flatten__()[0]]
    return [t]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it the log says nothing of what is built."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
