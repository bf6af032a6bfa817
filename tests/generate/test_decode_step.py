"""Captured decoding steps, without a GPU: graphs are emulated, with Triton's kernels in its interpreter."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minorca import load_model
from minorca.generate import generate
from minorca.generate.cache_attention import DecodeAttention
from minorca.generate.decode_step import _aligned_logits
from minorca.generate.engine import Engine
from minorca.generate.kv_cache import KVCache
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.build import load_adapters, read_adapter
from minorca_kernels import DenseWeight
from minorca_kernels.operator import INTERPRETED
from tests.generate.test_engine import ids, load_base, prompt, run
from tests.helpers import random_adapter


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class EmulatedGraph(TorchDispatchMode):
    """As `torch.cuda.CUDAGraph` and `torch.cuda.graph`, on the CPU: records operators, and replays them in its memory.

    Capturing leaves no trace in the tensors from outside, and garbage in those of the graph; reading a value on the
    host is refused.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        # By the address of their storage: what the graph allocated, and what was in others before it wrote there.
        self.own = {}
        self.before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        inputs = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors((args, kwargs))}
        if func._schema.is_mutable:
            self.before |= {
                pointer: (storage, storage.clone())
                for pointer, storage in inputs.items()
                if pointer not in self.own | self.before
            }
        outs = func(*args, **(kwargs or {}))
        for out in tensors(outs):
            if out.untyped_storage().data_ptr() not in inputs:
                self.own[out.untyped_storage().data_ptr()] = out.untyped_storage()
        self.calls.append((func, args, kwargs or {}, tensors(outs)))
        return outs

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, before in self.before.values():
            storage.copy_(before)
        for storage in self.own.values():
            storage.fill_(0xA5)

    def replay(self):
        for func, args, kwargs, outs in self.calls:
            for out, new in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                if out.data_ptr() != new.data_ptr():
                    out.copy_(new)


@pytest.fixture
def emulated(monkeypatch):
    """Emulates the graphs of engines that `with_graphs` returns; a list of those that were begun."""
    graphs = []

    def new_graph():
        graphs.append(EmulatedGraph())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return graphs


def with_graphs(engine: Engine) -> Engine:
    engine._decode_step._uses_graphs = True
    return engine


def requests(adapters=(None,)) -> list[Request]:
    """Greedy, drawn, filtered and penalized; of other lengths; past a page and past the window."""
    sampled = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.3, seed=2),
        Sampling(temperature=0.8, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={5: 3.0}, seed=3),
    ]
    return [
        Request(prompt(10 + 2 * n), 6 + 2 * n, sampling, adapter=adapters[n % len(adapters)])
        for n, sampling in enumerate(sampled)
    ]


triton_only = pytest.mark.skipif(not INTERPRETED, reason="the CPU's implementation reads lengths on the host")


@triton_only
@pytest.mark.parametrize("window", [None, 12])
def test_a_replayed_step_is_the_plain_step(window, emulated, save_mistral, tmp_path, monkeypatch):
    monkeypatch.setattr("minorca.generate.kv_cache.PAGE", 16)
    # rows of logits that are not aligned unless they are made so
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 130}
    directory, base = save_mistral(sliding_window=window, initializer_range=0.2, **sizes)
    random_adapter(base, tmp_path / "one", ("q", "down"))
    model = load_model(directory, torch.float32, "cpu")
    adapters = load_adapters(model, {"one": tmp_path / "one"})
    plain, captured = (
        list(map(ids, run(engine, *requests((None, "one")))))
        for engine in (Engine(model, 2, 100, adapters), with_graphs(Engine(model, 2, 100, adapters)))
    )
    assert captured == plain and len(emulated) >= 2


@triton_only
def test_steps_are_captured_anew_with_other_adapters(emulated, save_mistral, tmp_path):
    """Graphs without adapters stay: they multiply by none."""
    directory, base = save_mistral(num_hidden_layers=1, hidden_size=32, initializer_range=0.2)
    for name, target in (("one", "q"), ("two", "down")):
        random_adapter(load_base(directory), tmp_path / name, (target,))
    model = load_model(directory, torch.float32, "cpu")
    engine = with_graphs(Engine(model, 1, 50, load_adapters(model, {"one": tmp_path / "one"})))

    def answers(*adapters):
        return [ids(run(engine, Request(prompt(5), 8, adapter=adapter))[0]) for adapter in adapters]

    plain, one = answers(None, "one")
    assert len(emulated) == 2
    engine.add_adapter("two", read_adapter(model, tmp_path / "two", "cpu"))
    (two,) = generate(load_model(directory, torch.float32, "cpu", adapter=tmp_path / "two"), [prompt(5)], 8)
    assert answers(None, "one", "two") == [plain, one, two] and len({*map(tuple, (plain, one, two))}) == 3
    assert len(emulated) == 3
    engine.remove_adapter("one")
    assert answers(None, "two") == [plain, two] and len(emulated) == 4


@triton_only
def test_rows_of_logits_are_aligned():
    hidden_NH, weight_VH = torch.randn(3, 8), torch.randn(130, 8)
    logits_NV = _aligned_logits(hidden_NH, DenseWeight(weight_VH))
    assert logits_NV.shape == (3, 130) and logits_NV.stride() == (144, 1)
    torch.testing.assert_close(logits_NV, hidden_NH @ weight_VH.T)


@triton_only
def test_a_step_that_reads_the_hosts_lengths_is_detected(emulated, save_mistral, monkeypatch):
    """What a test of captured steps has to see: values of the host are fixed in a graph."""

    def decode(cache: KVCache):
        cache.lengths_N += cache.active_N
        return DecodeAttention(cache, torch.tensor(cache.lengths) - 1)

    model = load_model(save_mistral(num_hidden_layers=1, initializer_range=0.2)[0], torch.float32, "cpu")
    monkeypatch.setattr(KVCache, "decode", decode)
    (plain,), (captured,) = (
        run(engine, Request(prompt(5), 12)) for engine in (Engine(model, 1, 50), with_graphs(Engine(model, 1, 50)))
    )
    assert ids(captured)[:3] == ids(plain)[:3] and ids(captured) != ids(plain)


@pytest.mark.skipif(INTERPRETED, reason="takes long, and no kernel matters")
@pytest.mark.parametrize("fault", ["host", "memory"])
def test_a_step_that_cannot_be_captured_runs_eagerly(fault, emulated, save_mistral, monkeypatch, caplog):
    """It is logged once, and no answer changes."""
    model = load_model(save_mistral()[0], torch.float32, "cpu")
    asked = requests()
    plain = list(map(ids, run(Engine(model, 2, 100), *asked)))
    if fault == "host":
        model.layers[1].register_forward_hook(lambda module, arguments, out: print(out[0][0, 0].item()))
    else:
        monkeypatch.setattr(EmulatedGraph, "__torch_dispatch__", out_of_memory)
    with caplog.at_level(logging.WARNING):
        captured = list(map(ids, run(with_graphs(Engine(model, 2, 100)), *asked)))
    assert captured == plain and len(emulated) == 1
    (record,) = caplog.records
    assert "without CUDA graphs: a step cannot be captured" in record.getMessage()


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")
