"""Tests that need a GPU: attention's kernels, logits compared with transformers, and CUDA compared with the CPU."""

import os

# makes cuBLAS deterministic, if set before its first call
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import functools
import itertools

import pytest
import torch

from benchmarks.cases import cases
from benchmarks.kernels import error, random_inputs, reference_results, timed_part
from minorca import load_model
from minorca.generate import generate
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.attention import PackedAttention, flash_implementation, varlen_attn, visible
from minorca.model.build import load_adapters
from minorca_kernels import attention, attention_definition, decode_attention, decode_attention_definition
from tests.helpers import random_adapter, relative_error
from tests.model.test_attention import plain_attention
from tests.train.test_training_by_kernels import train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda")


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def backends(attend, q) -> list[str]:
    """All backends that can compute this, chosen by default or not; FA3 and FA4 run in varlen's place."""
    head_dim = q.shape[-1]
    half = q.dtype != torch.float32
    found = ["own"]
    if half and varlen_attn() is not None:
        found.append(flash_implementation(q.device) or "varlen")
    if half and len(attend.lengths) == 1 and attend.window is None and head_dim <= 128:
        found.append("cudnn")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 2, 64), (8, 2, 128), (3, 3, 80)])
@pytest.mark.parametrize("window", [64, 300, None])
# document lengths: 3 stands for 3 W, the others are added to W
@pytest.mark.parametrize("factors", [(-1,), (0,), (1,), (3,), (1, 3, -1, 0)], ids=str)
def test_attention(dtype, heads, kv_heads, size, window, factors):
    """For each backend, errors against fp64 are at most twice the formula's, and queries see exactly the window."""
    w = window or 100
    lengths = [3 * w if factor == 3 else w + factor for factor in factors]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    attend = PackedAttention(ends(lengths), sum(lengths), window, DEVICE)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    exact = run(lambda q, k, v: attention_definition(q, k, v, attend.first), torch.float64)
    plain = run(lambda q, k, v: plain_attention(q, k, v, attend.first), dtype)
    expected = [visible(torch.tensor([length - 1]), torch.arange(length), window)[0] for length in lengths]
    for choice in backends(attend, inputs[0]):
        attend_by_choice = functools.partial(attend.run, choice)
        ours = run(attend_by_choice, dtype)
        for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
            bound = 2 * relative_error(allowed, reference) + torch.finfo(dtype).eps
            assert relative_error(got, reference) <= bound, (choice, name)
        # v's gradient is nonzero where each document's last query sees it
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        last_queries = ends(lengths)[1:] - 1
        (dv,) = torch.autograd.grad(attend_by_choice(q, k, v)[last_queries].sum(), v)
        assert torch.equal(dv.abs().sum((1, 2)).cpu() > 0, torch.cat(expected)), choice
        if choice == "own":
            assert all(map(torch.equal, run(attend_by_choice, dtype), ours))
    chosen = run(lambda q, k, v: attend(0, q, k, v), dtype)
    assert all(relative_error(got, reference) < 0.05 for got, reference in zip(chosen, exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [1000, None])
def test_our_attention_repeats_to_the_bit(dtype, window):
    """A long packed batch whose values are part of a fused buffer: forward and backward, five times."""
    lengths = [5000, 3, 1500, 1689]
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k = (
        torch.randn(sum(lengths), n, 128, device=DEVICE, generator=generator).to(dtype).requires_grad_() for n in (8, 2)
    )
    v = torch.randn(sum(lengths), 12, 128, device=DEVICE, generator=generator).to(dtype)[:, -2:].requires_grad_()
    dout = torch.randn(q.shape, device=DEVICE, generator=generator).to(dtype)
    attend = PackedAttention(ends(lengths), sum(lengths), window, DEVICE)

    def run():
        out = attend.run("own", q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    expected = run()
    for _ in range(4):
        assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("window", [None, 300])
def test_chunks_of_a_prompt(window):
    """A chunk's queries attend to all keys so far, as in the whole prompt."""
    attend = PackedAttention(ends([1000]), 1000, window, DEVICE)
    q, k, v = (torch.randn(1000, heads, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2))
    whole = attention(q, k, v, attend.first, attend.last)
    for start, stop in ((0, 256), (256, 300), (300, 999), (999, 1000)):
        chunk = attention(q[start:stop], k[:stop], v[:stop], attend.first[start:stop], attend.last)
        assert relative_error(chunk, whole[start:stop]) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(9, 3, 64), (32, 8, 128), (8, 1, 80)])
@pytest.mark.parametrize("window", [None, 300])
def test_decoding_in_a_graph(dtype, heads, kv_heads, size, window):
    """A graph captured once is right for other lengths and values; no bit of a row depends on the other rows."""
    q = torch.randn(5, heads, size, device=DEVICE, dtype=dtype)
    table = torch.randperm(5 * 8, device=DEVICE).view(5, 8).int()
    k, v = torch.randn(5 * 8, 128, 2 * kv_heads, size, device=DEVICE, dtype=dtype).split(kv_heads, 2)
    own = table[0].long()
    kept = k[own], v[own]
    lengths = torch.ones(5, dtype=torch.int64, device=DEVICE)
    # compiles the kernels
    decode_attention(q, k, v, table, lengths, window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, table, lengths, window)
    results = []
    for others in ([0, 1, 999, 1000], [1024, 64, 65, 300]):
        lengths.copy_(torch.tensor([700, *others]))
        q[1:].normal_()
        for t, ours in zip((k, v), kept):
            t.normal_()
            t[own] = ours
        graph.replay()
        exact = decode_attention_definition(q.double(), k.double(), v.double(), table, lengths, window)
        plain = decode_attention_definition(q, k, v, table, lengths, window)
        assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps
        results.append(out[0].clone())
    assert torch.equal(*results)


CASES = list(cases(tokens=2048, window=1024, small=()))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_7b_models_shapes(case):
    """Each kernel in bf16, as in benchmarks.kernels: deterministic, its error at most twice the definition's."""
    reference = reference_results(case)

    def results(provider):
        return timed_part(case, case.providers[provider], random_inputs(case))()

    ours = results("ours")
    assert all(map(torch.equal, ours, results("ours")))
    assert error(ours, reference) <= 2 * error(results("plain"), reference) + torch.finfo(torch.bfloat16).eps / 8


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_transformers(dtype, window, save_mistral):
    """Errors against fp64 of packed documents are at most twice those of transformers; in fp32 both agree to 1e-5."""
    directory, theirs = save_mistral(sliding_window=window)
    ours = load_model(directory, dtype, DEVICE)
    lengths = [1, 15, 16, 17, 48]
    tokens = torch.randint(128, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        logits = ours(tokens, ends(lengths))
        theirs = theirs.to(DEVICE, dtype)
        same = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(lengths)])
        exact = torch.cat([theirs.double()(document[None]).logits[0] for document in tokens.split(lengths)])
    assert relative_error(logits, exact) <= 2 * relative_error(same, exact) + torch.finfo(dtype).eps
    assert dtype == torch.bfloat16 or relative_error(logits, same) <= 1e-5


def test_training_equals_the_cpu(save_mistral):
    """Twenty steps in fp32: every loss to 1e-4."""
    directory, _ = save_mistral(sliding_window=16)
    on_cuda, on_cpu = (train(directory, torch.float32, device, 20)[0] for device in ("cuda", "cpu"))
    assert on_cuda == pytest.approx(on_cpu, rel=1e-4) and on_cuda[-1] < on_cuda[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_repeats_to_the_bit(dtype, save_mistral):
    """In PyTorch's deterministic mode: the losses of three steps and the trained adapters."""
    directory, _ = save_mistral(sliding_window=16)
    torch.use_deterministic_algorithms(True)
    try:
        (losses, adapters), (again, adapters_again) = (train(directory, dtype, "cuda", 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again and all(map(torch.equal, adapters, adapters_again))


@pytest.mark.parametrize("window", [None, 8])
def test_generation_equals_the_cpu(window, save_mistral):
    """Greedy ids in fp32, for prompts of several lengths in one batch, beyond the window."""
    directory, _ = save_mistral(sliding_window=window)
    prompts = [[1, 5, 9], [7], list(range(3, 23))]
    on_cuda, on_cpu = (
        generate(load_model(directory, torch.float32, device), prompts, 24) for device in (DEVICE, "cpu")
    )
    assert on_cuda == on_cpu


def answers(engine: Engine, requests: list[Request]) -> list[list[tuple]]:
    """(id, log-probability, top log-probabilities, finish reason) of each token of each request."""
    outs = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for token in engine.step():
            outs[token.request].append((token.id, token.logprob, token.top, token.finish_reason))
    return list(outs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_repeats_to_the_bit_with_any_neighbours(dtype, save_mistral):
    """Graphs run the steps while caches grow and roll over, and sampling and greedy neighbours force new captures."""
    model = load_model(save_mistral(sliding_window=24)[0], dtype, DEVICE)

    def request() -> Request:
        return Request([5, 9, 30], 60, Sampling(temperature=1.0, top_p=0.9, seed=4), logprobs=3)

    neighbours = [
        Request([7] * 40, 20),
        Request([8], 70, Sampling(temperature=0.7, repetition_penalty=1.2)),
        Request([9, 4], 5),
    ]
    alone, *_ = answers(Engine(model, 3, 200), [request()])
    with_neighbours, *_ = answers(Engine(model, 3, 200), [request(), *neighbours])
    assert alone == with_neighbours and len(alone) == 60


def test_a_stop_id_ends_an_answer_while_the_next_step_runs(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, DEVICE)
    whole = generate(model, [[5, 9, 30]], 40)[0]
    stop = whole[7]
    engine = Engine(model, 2, 100)
    stopped, other = answers(engine, [Request([5, 9, 30], 40, stop_ids={stop}), Request([5, 9, 30], 40)])
    end = whole.index(stop) + 1
    assert [id for id, *_ in stopped] == whole[:end] and stopped[-1][-1] == "stop" and [id for id, *_ in other] == whole
    assert not engine.busy and engine.cache.lengths == [0, 0]


def test_adapters_by_row_equal_the_cpu(save_mistral, tmp_path):
    directory, base = save_mistral()
    random_adapter(base, tmp_path / "one", ("q", "v", "down"))
    found = []
    for device in (DEVICE, "cpu"):
        model = load_model(directory, torch.float32, device)
        engine = Engine(model, 2, 100, load_adapters(model, {"one": tmp_path / "one"}))
        found.append(
            [
                [id for id, *_ in answer]
                for answer in answers(engine, [Request([5, 9], 30, adapter=name) for name in (None, "one")])
            ]
        )
    assert found[0] == found[1] and found[0][0] != found[0][1]
