"""What only a GPU can show: attention's kernels, logits beside transformers, and that CUDA computes what the CPU does."""

import os

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS is deterministic with it, if set before its first call

import itertools

import pytest
import torch

from benchmarks.cases import cases
from benchmarks.kernels import drawn, error, exact, prepared
from minorca import load_model
from minorca.generate import generate
from minorca.generate.engine import Engine
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.attention import PackedAttention, varlen_attn, visible
from minorca.model.build import load_adapters
from minorca_kernels import attention, attention_definition, decode_attention, decode_attention_definition
from tests.helpers import random_adapter, relative_error
from tests.model.test_attention import plain_attention
from tests.train.test_training_by_kernels import train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = torch.device("cuda")


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def back_ends(attend, q) -> list[str]:
    """Every one that can compute this, the one that would be chosen or not; FA3 and FA4 run in varlen's place."""
    head_dim, half = q.shape[-1], q.dtype != torch.float32
    found = ["own"]
    if half and varlen_attn is not None:
        found.append(attend.flash or "varlen")
    if half and len(attend.lengths) == 1 and attend.window is None and head_dim <= 128:
        found.append("cudnn")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 2, 64), (8, 2, 128), (3, 3, 80)])
@pytest.mark.parametrize("window", [64, 300, None])
@pytest.mark.parametrize(
    "factors", [(-1,), (0,), (1,), (3,), (1, 3, -1, 0)], ids=str
)  # of W: W-1, W, W+1, 3W, and all packed
def test_attention(dtype, heads, kv_heads, size, window, factors):
    """Of every back end: values and gradients at most twice as far from fp64 as the formula's, the window reached exactly."""
    w = window or 100
    lengths = [3 * w if factor == 3 else w + factor for factor in factors]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, dout = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    attend = PackedAttention(ends(lengths), sum(lengths), window, DEVICE)

    def run(function, wide):
        leaves = [t.to(wide).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(wide))]

    exact = run(lambda q, k, v: attention_definition(q, k, v, attend.first), torch.float64)
    plain = run(lambda q, k, v: plain_attention(q, k, v, attend.first), dtype)
    expected = [visible(torch.tensor([length - 1]), torch.arange(length), window)[0] for length in lengths]
    for choice in back_ends(attend, inputs[0]):
        ours = run(lambda q, k, v: attend.run(choice, q, k, v), dtype)
        for name, reference, allowed, got in zip(("out", "dq", "dk", "dv"), exact, plain, ours):
            error, bound = (
                relative_error(got, reference),
                2 * relative_error(allowed, reference) + torch.finfo(dtype).eps,
            )
            assert error <= bound, (choice, name)
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        (reached,) = torch.autograd.grad(
            attend.run(choice, q, k, v)[ends(lengths)[1:] - 1].sum(), v
        )  # from each document's last query
        assert torch.equal(reached.abs().sum((1, 2)).cpu() > 0, torch.cat(expected)), choice
        if choice == "own":
            again = run(lambda q, k, v: attend.run("own", q, k, v), dtype)
            assert all(map(torch.equal, again, ours))
    chosen = run(lambda q, k, v: attend(0, q, k, v), dtype)
    assert all(relative_error(got, reference) < 0.05 for got, reference in zip(chosen, exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [1000, None])
def test_our_attention_repeats_to_the_bit(dtype, window):
    """A long packed batch, its values inside the fused buffer: forward and backward, five times."""
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
    """Their queries against all keys so far, as the whole prompt's."""
    attend = PackedAttention(ends([1000]), 1000, window, DEVICE)
    q, k, v = (torch.randn(1000, heads, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2))
    whole = attention(q, k, v, attend.first, attend.last)
    for start, stop in ((0, 256), (256, 300), (300, 999), (999, 1000)):
        chunk = attention(q[start:stop], k[:stop], v[:stop], attend.first[start:stop], attend.last)
        assert relative_error(chunk, whole[start:stop]) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(9, 3, 64), (32, 8, 128), (8, 1, 80)])
def test_decoding_in_a_graph(dtype, heads, kv_heads, size):
    """Captured once, it is right for all lengths and values to come; no bit of a row depends on the others."""
    q = torch.randn(5, heads, size, device=DEVICE, dtype=dtype)
    k, v = torch.randn(5, 1000, 2 * kv_heads, size, device=DEVICE, dtype=dtype).split(kv_heads, 2)
    lengths = torch.ones(5, dtype=torch.int64, device=DEVICE)
    decode_attention(q, k, v, lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths)
    results = []
    for others in ([0, 1, 999, 1000], [2000, 64, 65, 300]):
        lengths.copy_(torch.tensor([700, *others]))
        for t in (q, k, v):
            t[1:].normal_()
        graph.replay()
        exact = decode_attention_definition(q.double(), k.double(), v.double(), lengths)
        plain = decode_attention_definition(q, k, v, lengths)
        assert relative_error(out, exact) <= 2 * relative_error(plain, exact) + torch.finfo(dtype).eps
        results.append(out[0].clone())
    assert torch.equal(*results)


CASES = list(cases(tokens=2048, window=1024, small=()))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_7b_models_shapes(case):
    """Each kernel in bf16 as benchmarks.kernels runs it: the same bits twice, and at most twice as far from fp32 as the definition."""
    reference = exact(case)

    def results(provider):
        return prepared(case, case.providers[provider], drawn(case))()

    ours = results("ours")
    assert all(map(torch.equal, ours, results("ours")))
    assert error(ours, reference) <= 2 * error(results("plain"), reference) + torch.finfo(torch.bfloat16).eps / 8


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_equal_transformers(dtype, window, save_mistral):
    """Of packed documents: at most twice as far from fp64 as transformers in the same dtype, and 1e-5 in fp32."""
    directory, theirs = save_mistral(sliding_window=window)
    ours, lengths = load_model(directory, dtype, DEVICE), [1, 15, 16, 17, 48]
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
    here, there = (train(directory, torch.float32, device, 20)[0] for device in ("cuda", "cpu"))
    assert here == pytest.approx(there, rel=1e-4) and here[-1] < here[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_repeats_to_the_bit(dtype, save_mistral):
    """In PyTorch's deterministic mode: the losses of three steps and the adapters they leave."""
    directory, _ = save_mistral(sliding_window=16)
    torch.use_deterministic_algorithms(True)
    try:
        (losses, adapters), (again, adapters_again) = (train(directory, dtype, "cuda", 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again and all(map(torch.equal, adapters, adapters_again))


@pytest.mark.parametrize("window", [None, 8])
def test_generation_equals_the_cpu(window, save_mistral):
    """Greedy ids in fp32, prompts of several lengths together, past the window."""
    directory, _ = save_mistral(sliding_window=window)
    prompts = [[1, 5, 9], [7], list(range(3, 23))]
    here, there = (generate(load_model(directory, torch.float32, device), prompts, 24) for device in (DEVICE, "cpu"))
    assert here == there


def answers(engine: Engine, requests: list[Request]) -> list[list[tuple]]:
    """What each request got: ids, and the log probabilities of the likeliest."""
    outs = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for token in engine.step():
            outs[token.request].append((token.id, token.logprob, token.top, token.finish_reason))
    return list(outs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_repeats_to_the_bit_whoever_is_beside(dtype, save_mistral):
    """Steps run by graphs, in caches that grow and roll; drawn and greedy neighbours come and go, which changes what is captured."""
    model = load_model(save_mistral(sliding_window=24)[0], dtype, DEVICE)
    asked = lambda: Request([5, 9, 30], 60, Sampling(temperature=1.0, top_p=0.9, seed=4), logprobs=3)  # noqa: E731
    neighbours = [
        Request([7] * 40, 20),
        Request([8], 70, Sampling(temperature=0.7, repetition_penalty=1.2)),
        Request([9, 4], 5),
    ]
    alone, *_ = answers(Engine(model, 3, 200), [asked()])
    beside, *_ = answers(Engine(model, 3, 200), [asked(), *neighbours])
    assert alone == beside and len(alone) == 60


def test_a_stop_id_ends_an_answer_though_the_next_step_is_under_way(save_mistral):
    model = load_model(save_mistral()[0], torch.float32, DEVICE)
    whole = generate(model, [[5, 9, 30]], 40)[0]
    engine, stop = Engine(model, 2, 100), whole[7]
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
