"""minorca's own training and generation on a fake GPU: what a step launches, waits for and keeps in memory."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.common import SHAPES
from benchmarks.sharing import separated
from minorca.config import Config, DataConfig, LoRAConfig, ModelConfig, ParallelConfig, TrainConfig
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.architecture import Architecture, read_architecture
from minorca.model.build import build_model
from minorca.plan.fake_device import H100, fake_device
from minorca.plan.fake_step import Recording, fake_step


def architecture(layers: int) -> Architecture:
    """Mistral-7B's, with so many layers."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES["7b"] | {"num_hidden_layers": layers}))
        return read_architecture(directory)


@dataclass(frozen=True)
class Training:
    """A training step of one micro-batch on rank 0.

    Attributes:
        lengths: of the micro-batch's documents.
        trained: the share of each document, at its end, that is trained.
        later: gradients of an earlier micro-batch are there, to which this one adds.
        attention: its back end, "own" or "varlen".
        objective: sft; or dpo, in which the trained part of each document is two answers.
        shared: answers share their prompt, and have not one each.
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
    objective: Literal["sft", "dpo"] = "sft"
    shared: bool = True


def train(run: Training) -> Recording:
    """See `fake_step`."""
    config = Config(
        model=ModelConfig(path="fake", quantize=run.quantize),
        data=DataConfig(train="fake"),
        lora=LoRAConfig(rank=run.rank, dropout=run.dropout),
        train=TrainConfig(objective=run.objective),
        parallel=ParallelConfig(
            shard="fsdp" if run.ranks > 1 else "none",
            replicate=run.replicate,
            activation_checkpointing=run.checkpointing,
        ),
    )
    arch = architecture(run.layers)
    arrange = {} if run.shared else {"arrange": separated}
    return fake_step(config, arch, H100, run.ranks, run.lengths, run.trained, run.later, run.attention, **arrange)


def decode(layers: int, batch: int, prompt: int, sampling: Sampling | None = None) -> Recording:
    """Prefills equal prompts and decodes some tokens by the engine: phases build, prefill (and a step), decode."""
    with fake_device(H100) as (world, recorder):
        model = build_model(architecture(layers), torch.bfloat16).to_empty(device=world.device).eval()
        kinds = {recorder.number(p): "weights" for p in model.parameters()}
        engine = Engine(model, batch, prompt + 32)
        cache = engine.cache
        recorder.phase = "prefill"
        # of equal prompts one is prefilled, and the others' caches are copied
        for _ in range(batch):
            engine.add(Request(list(range(prompt)), 32, sampling or Sampling()))
        while sum(engine.cache.active) < batch:
            engine.step()
        recorder.phase = "decode"
        # one has been eager, maybe; the next one is captured, and then replayed
        for _ in range(3):
            engine.step()
        kinds |= {recorder.number(cache.kv_L2PSKD): "cache"}
        return Recording(recorder, {n: kind for n, kind in kinds.items() if n is not None})
