"""The engine: answers depend on their request alone; slots are reused; a shared prompt is prefilled once."""

import contextlib
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from minorca import load_model
from minorca.errors import UserError
from minorca.generate.engine import CHUNK, IDLE_CHUNK, Engine
from minorca.generate.kv_cache import SPARE_PAGES, KVCache, affordable_pages, pages_of
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.build import load_adapters, prepack
from minorca_kernels import DenseWeight, PrepackedNF4Weight, PrepackedWeight
from tests.helpers import random_adapter, relative_error

WINDOW = 32


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def run(engine: Engine, *requests: Request) -> list[list]:
    """Runs all requests at once; returns the tokens of each."""
    outs = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for token in engine.step():
            outs[token.request].append(token)
    return list(outs.values())


def ids(tokens: list) -> list[int]:
    return [token.id for token in tokens]


def logprobs(tokens: list) -> torch.Tensor:
    """[T, V] of a request that asked for all of the vocabulary."""
    return torch.stack([torch.tensor([value for _, value in sorted(token.top)]) for token in tokens])


@pytest.fixture(autouse=True, params=[16, pytest.param(128, marks=pytest.mark.slow)])
def page(request, monkeypatch):
    """Pages that the prompts here fill, and the real ones."""
    monkeypatch.setattr("minorca.generate.kv_cache.PAGE", request.param)
    return request.param


@pytest.fixture
def model(save_mistral):
    return load_model(
        save_mistral(sliding_window=WINDOW, num_hidden_layers=3, initializer_range=0.2)[0], torch.float32, "cpu"
    )


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 512])
def test_chunks_of_any_size_equal_the_cacheless_forward(window, chunk, save_mistral):
    """Prompts around the window's length and past it, answers up to 3 windows: every id and every log-probability."""
    model = load_model(
        save_mistral(sliding_window=window, num_hidden_layers=3, initializer_range=0.2)[0], torch.float32, "cpu"
    )
    requests = [
        Request(prompt(n), 3 * WINDOW - n + 5, logprobs=128) for n in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
    ]
    for request, tokens in zip(requests, run(Engine(model, 2, 4 * WINDOW, chunk=chunk), *requests)):
        with torch.inference_mode():
            whole = model(torch.tensor(request.prompt + ids(tokens)))[len(request.prompt) - 1 : -1].log_softmax(-1)
        assert ids(tokens) == whole.argmax(-1).tolist()
        assert relative_error(logprobs(tokens), whole) < 1e-5
        assert [token.logprob for token in tokens] == pytest.approx(whole.max(-1).values.tolist(), abs=1e-4)


def test_in_a_batch_as_alone(model):
    requests = lambda: [Request(prompt(n), 60, logprobs=128) for n in (3, 90, 31, 32, 33, 7)]  # noqa: E731
    together = run(Engine(model, 4, 200), *requests())
    for tokens, request in zip(together, requests()):
        (alone,) = run(Engine(model, 1, 200), request)
        assert ids(tokens) == ids(alone) and relative_error(logprobs(tokens), logprobs(alone)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Two and three query heads a key head.
@pytest.mark.parametrize("packed, heads, window", [(False, 4, WINDOW), (True, 6, WINDOW), (True, 4, None)])
def test_no_bit_depends_on_the_neighbours(dtype, packed, heads, window, two_threads, save_mistral):
    """With the same slots: whatever the other requests are and ask for, in which chunks the prompt was computed, and
    what of it an earlier prompt had computed; greedy and sampled."""
    model = load_model(save_mistral(sliding_window=window, num_attention_heads=heads, head_dim=16)[0], dtype, "cpu")
    model = prepack(model) if packed else model
    asked = [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=1)]
    long = prompt(205)
    alone = [run(Engine(model, 4, 300), Request(long, 25, sampling, logprobs=128))[0] for sampling in asked]
    others = [
        lambda: [Request(prompt(n, n), 30 - n // 2) for n in (5, 20, 40)],
        # Of the same length in every step, and of the same beginning.
        lambda: [Request(prompt(205, n), 25) for n in range(1, 3)] + [Request(long[:150] + prompt(20), 9)],
        lambda: [Request(prompt(50), 3, Sampling(temperature=2.0, repetition_penalty=2.0))],
    ]
    engines = [Engine(model, 4, 300, chunk=chunk) for chunk in (48, 100, 256)]
    run(engines[2], Request(long[:99], 1))
    for sampling, expected in zip(asked, alone):
        for engine, beside in zip(engines, others):
            ours = Request(long, 25, sampling, logprobs=128)
            *_, tokens = run(engine, *beside(), ours)
            assert ids(tokens) == ids(expected) and torch.equal(logprobs(tokens), logprobs(expected))


def test_a_penalty_ignores_what_other_requests_steps_left(model):
    """While a prompt is prefilled in chunks, the others' decoding steps write to its slot too."""
    asked = lambda: Request(prompt(60), 40, Sampling(repetition_penalty=1.5))  # noqa: E731
    (alone,) = run(Engine(model, 2, 300, chunk=8), asked())
    _, beside = run(Engine(model, 2, 300, chunk=8), Request(prompt(5), 100), asked())
    assert ids(beside) == ids(alone)


def test_waiting_requests_take_free_slots(model):
    engine = Engine(model, 2, 100)
    requests = [Request(prompt(5, n), 3 + n) for n in range(6)]
    for request in requests:
        engine.add(request)
    assert (engine.running, engine.waiting) == (0, 6)
    finished = []
    while engine.busy:
        finished += [token.request for token in engine.step() if token.finish_reason]
        assert engine.running <= 2
    assert finished == requests and (engine.running, engine.waiting) == (0, 0) and engine.cache.lengths == [0, 0]


def test_a_request_can_be_cancelled_at_any_time(model):
    """Waiting, during prefill, while decoding; other answers are unchanged."""
    (expected,) = run(Engine(model, 2, 200, chunk=8), Request(prompt(20), 30))
    for steps in range(8):
        engine = Engine(model, 2, 200, chunk=8)
        going = Request(prompt(20), 30)
        ended = [Request(prompt(40, n), 50) for n in range(3)]
        tokens = []
        for request in (going, *ended):
            engine.add(request)
        for _ in range(steps):
            tokens += engine.step()
        for request in ended:
            engine.cancel(request)
            engine.cancel(request)
        assert engine.running + engine.waiting == 1
        while engine.busy:
            new = engine.step()
            tokens += new
            assert all(token.request is going for token in new)
        assert ids([token for token in tokens if token.request is going]) == ids(expected)


def test_memory_stays_within_the_window(model, page):
    """A long sequence holds the pages of its window and of one chunk; what has ended is kept until it is needed."""
    engine = Engine(model, 2, 4000, chunk=64)
    most = pages_of(4000, WINDOW, 64)
    assert engine.cache.pages == 2 * most + SPARE_PAGES
    tree = engine.cache.tree
    engine.add(Request(prompt(10), 3 * WINDOW))
    engine.add(Request(prompt(1500), 20))
    while engine.busy:
        engine.step()
        assert tree.available >= SPARE_PAGES - 1
    assert tree.available == engine.cache.pages - 1 and tree.cached


def test_sequences_take_the_pages_that_they_need(save_mistral, page):
    model = load_model(save_mistral(sliding_window=None)[0], torch.float32, "cpu")
    engine = Engine(model, 2, 1000)
    engine.add(Request(prompt(300), 100))
    engine.add(Request(prompt(20), 100))
    for _ in range(50):
        engine.step()
    held = engine.cache.pages - 1 - engine.cache.tree.available
    assert held == sum(-(-length // page) for length in engine.cache.lengths)


def test_a_short_prompt_waits_for_no_long_one(save_mistral, page):
    """And a long one is not overtaken for ever, while short ones keep coming."""
    model = load_model(save_mistral(sliding_window=None)[0], torch.float32, "cpu")
    engine = Engine(model, 3, 3000, chunk=2 * page)
    engine.add(long := Request(prompt(2000), 1))
    engine.step()
    shorts = []
    finished = set()
    while long not in finished:
        engine.add(short := Request(prompt(10, len(shorts)), 1))
        before = engine.cache.lengths[0]
        finished |= {token.request for token in engine.step() if token.finish_reason}
        # in its own step, or in the next one, where the long one has less left than it
        assert finished >= set(shorts)
        assert long in finished or engine.cache.lengths[0] > before
        shorts.append(short)
    assert len(shorts) <= 2000 / 16 + 1


def test_requests_wait_for_pages(save_mistral, page):
    """Where not all slots can have sequences of the maximum length, none is begun that could not end."""
    model = load_model(save_mistral(sliding_window=None)[0], torch.float32, "cpu")
    few = SPARE_PAGES + 2 * pages_of(150, None, 512)
    engine = Engine(model, 4, 200)
    engine.cache = engine._decode_step._cache = KVCache(model.arch, 4, 200, torch.float32, engine.device, 256, few)
    requests = [Request(prompt(100, n), 50) for n in range(5)]
    assert list(map(ids, run(engine, *requests))) == [
        ids(run(Engine(model, 1, 200), request)[0]) for request in requests
    ]
    for request in requests:
        engine.add(request)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 3)


class Counted:
    """Records the number of tokens of every forward of a model."""

    def __init__(self, model):
        self.tokens = []
        model.register_forward_pre_hook(lambda module, arguments: self.tokens.append(len(arguments[0])))


def test_more_of_a_prompt_is_computed_at_once_while_no_answer_waits(model):
    counted = Counted(model)
    run(Engine(model, 2, 1500), Request(prompt(1200), 1))
    assert max(counted.tokens) == IDLE_CHUNK["cpu"]
    engine = Engine(model, 2, 1500)
    engine.add(Request(prompt(5), 500))
    engine.step()
    counted.tokens.clear()
    engine.add(Request(prompt(1200), 1))
    while engine.running == 2 or engine.waiting:
        engine.step()
    assert sum(counted.tokens) >= 1200 and max(counted.tokens) <= CHUNK["cpu"] < IDLE_CHUNK["cpu"]


def test_samples_of_one_prompt_share_its_prefill(model):
    """The others compute its last token alone."""
    asked = Sampling(temperature=1.0, seed=5)
    apart = [run(Engine(model, 4, 200), Request(prompt(70), 20, asked, sample=n))[0] for n in range(3)]
    counted = Counted(model)
    together = run(Engine(model, 4, 200), *(Request(prompt(70), 20, asked, sample=n) for n in range(3)))
    assert list(map(ids, together)) == list(map(ids, apart)) and len({tuple(ids(tokens)) for tokens in together}) == 3
    # filled up to multiples of 16
    assert counted.tokens == [80, 4, 16, *[4] * 19]


@pytest.mark.parametrize("window", [None, 1000, WINDOW])
def test_a_conversation_is_read_once(window, save_mistral, page):
    """Each turn computes only what follows the longest common prefix; all of it if the window has moved past that."""
    model = load_model(save_mistral(sliding_window=window)[0], torch.float32, "cpu")
    engine = Engine(model, 2, 500)
    counted = Counted(model)
    said = []
    held = []
    for turn, change in enumerate((None, None, 30, None)):
        said += prompt(20, turn)
        # As by a template that moves the system prompt.
        if change is not None:
            said[change] += 1
        same = next((i for i, (a, b) in enumerate(zip(held, said)) if a != b), len(held))
        counted.tokens.clear()
        (tokens,) = run(engine, Request(list(said), 10))
        if window != WINDOW or same == len(held):
            computed = len(said) - same
            assert sum(counted.tokens) - 2 * 9 == computed + -computed % 16
        (cold,) = run(Engine(model, 2, 500), Request(list(said), 10))
        assert ids(tokens) == ids(cold)
        said += ids(tokens)
        # Without the newest id, which is not in the cache.
        held = said[:-1]


def test_ctrl_c_within_a_step_leaves_a_consistent_cache(model):
    """The signal comes between two layers; the step is completed first, and the next turn reuses what was cached."""
    engine = Engine(model, 1, 300)
    said = prompt(40)
    layers = []

    def interrupt(module, arguments):
        layers.append(module)
        if len(layers) == 20:
            signal.raise_signal(signal.SIGINT)

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    heard = []
    with pytest.raises(KeyboardInterrupt):
        for token in engine.stream(Request(said, 100)):
            heard.append(token.id)
    hook.remove()
    assert 15 < len(heard) < 20 and not engine.busy
    said = said + heard + prompt(5)
    assert ids(run(engine, Request(said, 30))[0]) == ids(run(Engine(model, 1, 300), Request(said, 30))[0])


# During prefill, and in a decoding step.
@pytest.mark.parametrize("fails_at", [3, 4, 11])
def test_a_cache_is_not_reused_after_an_error_within_a_step(model, fails_at):
    """Some layers have cached more tokens than others then: the next turn prefills everything."""
    engine = Engine(model, 1, 300, chunk=16)
    said = prompt(40)
    calls = []

    def fail(module, arguments):
        calls.append(module)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("no memory")

    hook = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.stream(Request(said, 100)))
    hook.remove()
    assert not engine.busy
    assert ids(run(engine, Request(said, 30))[0]) == ids(run(Engine(model, 1, 300), Request(said, 30))[0])


def test_a_request_can_be_added_again(model):
    engine = Engine(model, 2, 100)
    request = Request(prompt(20), 10)
    assert ids(run(engine, request)[0]) == ids(run(engine, request)[0])


def test_an_adapter_with_infinite_values_is_refused(model, save_mistral, tmp_path):
    """Its products with zero would reach requests that do not use it."""
    directory, base = save_mistral()
    random_adapter(base, tmp_path / "adapter", ("q", "down"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name][2, 1] = torch.inf
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{tmp_path / 'adapter'}: {name} contains NaN or infinite values"):
        load_adapters(load_model(directory, torch.float32, "cpu"), {"one": tmp_path / "adapter"})


def test_a_cache_that_does_not_fit_in_memory_is_refused(save_mistral):
    model = load_model(save_mistral(sliding_window=None)[0], torch.float32, "cpu")
    message = "the KV cache needs .* GB for one sequence of 10000000000 tokens, .* GB are free .* a smaller maximum"
    with pytest.raises(UserError, match=message):
        Engine(model, 8, 10**10)


def page_bytes(model, page: int) -> int:
    arch = model.arch
    return 2 * arch.layers * page * arch.kv_heads * arch.head_dim * 4


@pytest.mark.parametrize("stay", [False, True])
def test_weights_in_four_bits_count_as_what_they_become(stay, save_mistral, monkeypatch, page):
    """On a CPU they are dense once they are used, or stay as they are."""
    directory, theirs = save_mistral(intermediate_size=128)
    model = load_model(directory, torch.float32, "cpu", quantize="nf4")
    monkeypatch.setattr(PrepackedNF4Weight, "supports", lambda weight, dtype: stay)
    taken = sum(parameter.nbytes for parameter in (model if stay else theirs).parameters())
    for memory, fits in ((taken, False), (taken + 10 * page_bytes(model, page), True)):
        sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr("minorca.host.os.sysconf", sizes.get)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="are free after loading"):
            # as many as have room
            assert affordable_pages(model, 100, 8, 512) == 9


def test_memory_that_torch_keeps_is_free(model, monkeypatch, page):
    """After a first engine, the driver counts torch's cache of freed tensors as taken."""
    needed = 10 * page_bytes(model, page)
    weight = SimpleNamespace(device=torch.device("cuda"), itemsize=4)
    model = cast(Any, SimpleNamespace(arch=model.arch, dtype=torch.float32, embedding=SimpleNamespace(weight=weight)))
    for reserved, fits in ((0, False), (needed, True)):
        figures = {"mem_get_info": (0, 2 * needed), "memory_reserved": needed + reserved}
        for name, value in ({"memory_allocated": needed} | figures).items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="are free after loading"):
            assert affordable_pages(model, 1, page, 512) == 3


def test_each_request_chooses_its_adapter(save_mistral, tmp_path):
    """Adapters of different ranks, targets and scales, and none, in one batch: all equal transformers and PEFT."""
    directory, base = save_mistral(sliding_window=WINDOW)
    settings = {
        "one": (("q", "v", "down"), {"r": 4, "lora_alpha": 12}),
        "two": (("k", "o", "gate", "up", "down"), {"r": 6, "use_rslora": True}),
    }
    for name, (targets, config) in settings.items():
        random_adapter(load_base(directory), tmp_path / name, targets, **config)
    model = load_model(directory, torch.float32, "cpu")
    engine = Engine(model, 3, 200, load_adapters(model, {name: tmp_path / name for name in settings}))
    for packed in (False, True):
        model = prepack(model) if packed else model
        requests = [Request(prompt(40), 30, adapter=name, logprobs=128) for name in (None, "one", "two")]
        for request, tokens in zip(requests, run(engine, *requests)):
            theirs = base if request.adapter is None else with_adapter(directory, tmp_path / request.adapter)
            with torch.no_grad():
                logits = theirs(torch.tensor([request.prompt + ids(tokens)])).logits[0, len(request.prompt) - 1 : -1]
            assert relative_error(logprobs(tokens), logits.log_softmax(-1)) < 1e-5
            assert ids(tokens) == logits.argmax(-1).tolist()
        # Outside the engine the model's forward is the base model's.
        with torch.no_grad():
            assert relative_error(model(torch.tensor(prompt(40))), base(torch.tensor([prompt(40)])).logits[0]) < 1e-5


def load_base(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def with_adapter(directory, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(directory), adapter).eval()


def test_prepacked_is_the_same_model(save_mistral):
    for tied in (False, True):
        directory, _ = save_mistral(tie_word_embeddings=tied)
        model = load_model(directory, torch.float32, "cpu")
        tokens = torch.tensor(prompt(30))
        with torch.inference_mode():
            plain = model(tokens)
            assert prepack(prepack(model)) is model
            assert relative_error(model(tokens), plain) < 1e-6
        # Of the norms alone: there is no second copy of a projection.
        assert sum(p.numel() for p in model.layers.parameters()) == 2 * 2 * 64


def test_one_sequence_in_bf16_needs_no_other_layout(save_mistral, monkeypatch):
    """Torch's own kernel multiplies its row, as exactly; oneDNN is on afterwards, or off where it was."""
    x, weight = torch.randn(1, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    exact = x.double() @ weight.double().T
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        with torch.inference_mode():
            assert relative_error(DenseWeight(weight).linear(x), exact) < 2**-8
        assert torch.backends.mkldnn.enabled is enabled
    model = load_model(save_mistral()[0], torch.bfloat16, "cpu")
    kinds = [{projection.base.kind for _, projection in prepack(model, rows).projections()} for rows in (1, 2)]
    assert kinds == [{"dense"}, {"prepacked"}]


def test_the_cpu_decides_on_large_weights_of_one_sequence(monkeypatch):
    """With AVX-VNNI, as Zen 5 has it, they are prepacked, and small ones not."""
    for has_vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_vnni=has_vnni: {"avx_vnni": has_vnni})
        found = [
            PrepackedWeight.is_faster(torch.empty(shape, dtype=torch.bfloat16), 1)
            for shape in ((512, 4096), (514, 4096), (514, 4160))
        ]
        assert found == [False, has_vnni, True]


def test_invalid_requests_are_named(model):
    engine = Engine(model, 1, 50)
    wrong = {
        "prompt is empty": Request([]),
        "outside the model's vocabulary of 128": Request([1, 128]),
        "max_new_tokens is 0": Request([1], 0),
        "40 prompt tokens and 11 new tokens exceed the maximum length of 50": Request([1] * 40, 11),
        "adapter is 'x'; expected one of": Request([1], 1, adapter="x"),
        "logprobs is -1": Request([1], 1, logprobs=-1),
    }
    for message, request in wrong.items():
        with pytest.raises(UserError, match=message):
            engine.add(request)
    assert not engine.busy
