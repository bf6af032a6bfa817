"""minorca's own training and generation on a fake GPU: what a step launches, waits for and keeps in memory."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import SHAPES
from benchmarks.fake_cuda import fake_cuda
from benchmarks.recorder import Launch, Recorder
from minorca.config import Config, DataConfig, LoRAConfig, ModelConfig, ParallelConfig
from minorca.data.packing import make_batch
from minorca.data.store import TokenStore
from minorca.files.weights import ModelFiles
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.architecture import Architecture, read_architecture
from minorca.model.build import build_model
from minorca.model.layout import source_tensors
from minorca.model.lora import seed_dropout
from minorca.model.quantization import Quantization, parse_quantization
from minorca.train.build import build
from minorca.train.step import forward_backward


def architecture(layers: int) -> Architecture:
    """Mistral-7B's, with so many layers."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES["7b"] | {"num_hidden_layers": layers}))
        return read_architecture(directory)


def model_files(arch: Architecture, quantization: Quantization | None = None) -> ModelFiles:
    """A directory of bf16 weights that have shapes and no values, and are quantized while they load."""
    tensors = source_tensors(arch, "huggingface")
    columns = {tensor.name: tensor.shape[1:] for stacked in tensors.values() for tensor in stacked}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(stop - start, *columns[name], dtype=torch.bfloat16)

    files: Any = SimpleNamespace(read=read, bytes=lambda name: 0)
    return ModelFiles(Path("fake"), arch, files, tensors, quantization=quantization)


@dataclass(frozen=True)
class Training:
    """A training step of one micro-batch on rank 0.

    Attributes:
        lengths: of the micro-batch's documents.
        trained: the share of each document, at its end, that is trained.
        later: gradients of an earlier micro-batch are there, to which this one adds.
        attention: its back end, "own" or "varlen".
    """

    layers: int
    lengths: Sequence[int]
    trained: float = 1.0
    rank: int = 16
    dropout: float = 0.0
    checkpointing: Literal["none", "selective", "full", "offload"] = "none"
    ranks: int = 1
    replicate: int = 1
    later: bool = False
    attention: str = "own"
    quantize: Literal["none", "nf4"] = "none"


@dataclass(frozen=True)
class Recording:
    """What was recorded; `peak` in bytes by kind."""

    recorder: Recorder
    peak: dict[str, int]

    @property
    def launches(self) -> Counter[Launch]:
        return Counter(self.recorder.launches)


def extrapolated(run: Callable[[int], Recording], layers: int) -> Counter[Launch]:
    """The launches of so many layers, from runs of two and three."""
    two, three = run(2).launches, run(3).launches
    return Counter({launch: two[launch] + (layers - 2) * (three[launch] - two[launch]) for launch in two | three})


def train(run: Training) -> Recording:
    """Builds what learns, then runs one step: phases build, first step, batch, forward, backward, optimizer."""
    config = Config(
        model=ModelConfig(path="fake", quantize=run.quantize),
        data=DataConfig(train="fake"),
        lora=LoRAConfig(rank=run.rank, dropout=run.dropout),
        parallel=ParallelConfig(
            shard="fsdp" if run.ranks > 1 else "none",
            replicate=run.replicate,
            activation_checkpointing=run.checkpointing,
        ),
    )
    lengths = np.array(run.lengths)
    offsets = np.concatenate([[0], lengths.cumsum()])
    position = np.concatenate([np.arange(length) for length in lengths])
    trained = position >= np.repeat((1 - run.trained) * lengths, lengths)
    store = TokenStore(np.zeros(offsets[-1], np.int32), trained, offsets)
    batch = make_batch(store, np.arange(len(lengths)))
    first = make_batch(store, np.argsort(lengths)[:1])
    quantization = parse_quantization(run.quantize, config.model.double_quant)
    with fake_cuda(run.ranks, run.attention) as (world, recorder):
        learner = build(config, model_files(architecture(run.layers), quantization), world)
        learner.model.train()
        adapters = list(learner.trainable.parameters.values())
        kinds = {recorder.number(p): "weights" for p in learner.model.parameters()}
        kinds |= {recorder.number(p): "adapters" for p in adapters}
        # what a first step makes stays: the optimizer's state, and copies of adapters
        recorder.phase = "first step"
        forward_backward(learner, first.to(world.device), 1.0, True)
        learner.optimizer.step()
        if not run.later:
            learner.optimizer.zero_grad()
        recorder.phase = "batch"
        batch = batch.to(world.device)
        seed_dropout(learner.model, config.train.seed, 1, 0)

        def clock(phase: str) -> None:
            recorder.phase = phase

        forward_backward(learner, batch, float(store.trained.sum()), True, clock)
        recorder.phase = "optimizer"
        kinds |= {recorder.number(p.grad): "gradients" for p in adapters if p.grad is not None}
        learner.trainable.sum_gradients(world)
        learner.trainable.clip_gradients(config.optim.max_grad_norm)
        learner.optimizer.step()
        state = (t for values in learner.optimizer.state.values() for t in values.values())
        kinds |= {recorder.number(t): "optimizer" for t in state if isinstance(t, torch.Tensor) and t.is_cuda}
        return Recording(recorder, recorder.peak({n: kind for n, kind in kinds.items() if n is not None}))


def decode(layers: int, batch: int, prompt: int, sampling: Sampling | None = None) -> Recording:
    """Prefills equal prompts and decodes some tokens by the engine: phases build, prefill (and a step), decode."""
    with fake_cuda() as (world, recorder):
        model = build_model(architecture(layers), torch.bfloat16).to_empty(device=world.device).eval()
        kinds = {recorder.number(p): "weights" for p in model.parameters()}
        engine = Engine(model, batch, prompt + 32)
        cache = engine.cache
        recorder.phase = "prefill"
        # of equal prompts one is prefilled, and the others' caches are copied
        for _ in range(batch):
            engine.add(Request(list(range(prompt)), 32, sampling or Sampling()))
        while len(engine._prompt_logits) < batch:
            engine.step()
        recorder.phase = "decode"
        # one has been eager, maybe; the next one is captured, and then replayed
        for _ in range(3):
            engine.step()
        kinds |= {recorder.number(t): "cache" for t in (*cache.k_LNSKD, *cache.v_LNSKD)}
        return Recording(recorder, recorder.peak({n: kind for n, kind in kinds.items() if n is not None}))
