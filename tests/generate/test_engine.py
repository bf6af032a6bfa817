"""The engine: answers depend on their request alone; slots are reused; a shared prompt is prefilled once."""

import contextlib
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from minorca import load_model
from minorca.errors import UserError
from minorca.generate.engine import Engine
from minorca.generate.kv_cache import KVCache, check_memory
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from minorca.model.build import load_adapters, prepack
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


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Two and three query heads a key head.
@pytest.mark.parametrize("packed, heads", [(False, 4), (True, 6)])
def test_no_bit_depends_on_the_neighbours(dtype, packed, heads, two_threads, save_mistral):
    """With the same slots and chunk: whatever the other requests are and ask for; greedy and sampled."""
    model = load_model(save_mistral(sliding_window=WINDOW, num_attention_heads=heads, head_dim=16)[0], dtype, "cpu")
    model = prepack(model) if packed else model
    asked = [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=1)]
    alone = [
        run(Engine(model, 4, 200, chunk=16), Request(prompt(45), 25, sampling, logprobs=128))[0] for sampling in asked
    ]
    others = [
        lambda: [Request(prompt(n, n), 30 - n // 2) for n in (5, 20, 40)],
        # Of the same length in every step.
        lambda: [Request(prompt(45, n), 25) for n in range(3)],
        lambda: [Request(prompt(50), 3, Sampling(temperature=2.0, repetition_penalty=2.0))],
    ]
    for sampling, expected in zip(asked, alone):
        for beside in others:
            ours = Request(prompt(45), 25, sampling, logprobs=128)
            tokens = run(Engine(model, 4, 200, chunk=16), ours, *beside())[0]
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


def test_memory_stays_within_the_window(model):
    """At most W positions a sequence, in the model's dtype; a short answer takes fewer, and past W nothing grows."""
    engine = Engine(model, 2, 4000)
    arch = model.arch
    token_bytes = 2 * arch.layers * arch.kv_heads * arch.head_dim * 4
    engine.add(Request(prompt(10), 3 * WINDOW))
    engine.add(Request(prompt(500), 20))
    sizes = []
    while engine.busy:
        engine.step()
        sizes.append(sum(t.nbytes for buffers in (engine.cache.k_LNSKD, engine.cache.v_LNSKD) for t in buffers))
    assert sizes[-1] == sizes[len(sizes) // 2] == 2 * WINDOW * token_bytes


def test_without_a_window_the_cache_grows_as_it_is_needed(save_mistral):
    model = load_model(save_mistral(sliding_window=None)[0], torch.float32, "cpu")
    engine = Engine(model, 1, 400)
    run(engine, Request(prompt(20), 5))
    assert engine.cache.capacity == 64
    run(engine, Request(prompt(20), 100))
    assert engine.cache.capacity == 128
    run(engine, Request(prompt(300), 100))
    assert engine.cache.capacity == 400


def test_a_cache_without_a_window_does_not_roll(save_mistral):
    """Past its maximum length it would overwrite keys that are still visible."""
    arch = load_model(save_mistral(sliding_window=64)[0], torch.float32, "cpu").arch
    cache = KVCache(arch, 1, 6, torch.float32, torch.device("cpu"))
    cache.prefill(0, 6)
    cache.set_active(0, True)
    with pytest.raises(ValueError, match="created for at most 6 tokens"):
        cache.advance()


class Counted:
    """Records the number of tokens of every forward of a model."""

    def __init__(self, model):
        self.tokens = []
        model.register_forward_pre_hook(lambda module, arguments: self.tokens.append(len(arguments[0])))


def test_samples_of_one_prompt_share_its_prefill(model):
    asked = Sampling(temperature=1.0, seed=5)
    apart = [run(Engine(model, 4, 200), Request(prompt(70), 20, asked, sample=n))[0] for n in range(3)]
    counted = Counted(model)
    together = run(Engine(model, 4, 200), *(Request(prompt(70), 20, asked, sample=n) for n in range(3)))
    assert list(map(ids, together)) == list(map(ids, apart)) and len({tuple(ids(tokens)) for tokens in together}) == 3
    assert counted.tokens == [70, *[4] * 19]


@pytest.mark.parametrize("window", [None, 1000, WINDOW])
def test_a_conversation_is_prefilled_once(window, save_mistral):
    """Each turn prefills only what follows the longest common prefix; all of it if the window has moved past that."""
    model = load_model(save_mistral(sliding_window=window)[0], torch.float32, "cpu")
    engine = Engine(model, 1, 500, reuse=True)
    counted = Counted(model)
    said = []
    held = []
    for turn, change in enumerate((None, None, 30, None)):
        said += prompt(20, turn)
        # As by a template that moves the system prompt.
        if change is not None:
            said[change] += 1
        same = next((i for i, (a, b) in enumerate(zip(held, said)) if a != b), len(held))
        if window == WINDOW and same < len(held):
            same = 0
        counted.tokens.clear()
        (tokens,) = run(engine, Request(list(said), 10))
        assert sum(counted.tokens) - 9 == len(said) - same
        (cold,) = run(Engine(model, 1, 500), Request(list(said), 10))
        assert ids(tokens) == ids(cold)
        said += ids(tokens)
        # Without the newest id, which is not in the cache.
        held = said[:-1]


def test_ctrl_c_within_a_step_leaves_a_consistent_cache(model):
    """The signal comes between two layers; the step is completed first, and the next turn reuses what was cached."""
    engine = Engine(model, 1, 300, reuse=True)
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
    engine = Engine(model, 1, 300, reuse=True, chunk=16)
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
    with pytest.raises(ValueError, match="reuse needs slots=1"):
        Engine(model, 2, reuse=True)


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
    message = "the KV cache needs .* GB for 8 slots of 1000000000 tokens, .* GB are free .* use fewer slots"
    with pytest.raises(UserError, match=message):
        Engine(model, 8, 10**9)


def test_weights_in_four_bits_count_as_what_they_become(save_mistral, monkeypatch):
    """On a CPU they are dense once they are used."""
    directory, theirs = save_mistral(intermediate_size=128)
    model = load_model(directory, torch.float32, "cpu", quantize="nf4")
    cache = KVCache(model.arch, 1, 8, torch.float32, torch.device("cpu"))
    dense = sum(parameter.nbytes for parameter in theirs.parameters())
    for memory, fits in ((dense, False), (dense + 10 * cache.bytes(cache.max_capacity), True)):
        sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr("minorca.device.os.sysconf", sizes.get)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="are free after loading"):
            check_memory(cache, model)


def test_memory_that_torch_keeps_is_free(model, monkeypatch):
    """After a first engine, the driver counts torch's cache of freed tensors as taken."""
    cache = KVCache(model.arch, 1, 100, torch.float32, torch.device("cpu"))
    cache.device = torch.device("cuda")
    needed = cache.bytes(cache.max_capacity)
    for reserved, fits in ((0, False), (needed, True)):
        figures = {"mem_get_info": (needed, 2 * needed), "memory_reserved": needed + reserved}
        for name, value in ({"memory_allocated": needed} | figures).items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="are free after loading"):
            check_memory(cache, model)


# Of the keys of the first and the last layer, and of the last layer's values.
@pytest.mark.parametrize("fails_at", [0, 2, 5])
def test_growth_is_all_or_nothing(fails_at, save_mistral, monkeypatch):
    """After it ran out of memory, every layer is as it was, and the sequence that needs no growth goes on unchanged."""
    model = load_model(save_mistral(num_hidden_layers=3, initializer_range=0.2)[0], torch.float32, "cpu")
    asked = lambda: Request(prompt(20), 40)  # noqa: E731
    (alone,) = run(Engine(model, 2, 400), asked())
    engine = Engine(model, 2, 400)
    cache = engine.cache
    engine.add(going := asked())
    found = [token for _ in range(5) for token in engine.step()]
    before = [(t.clone(), t.stride()) for t in (*cache.k_LNSKD, *cache.v_LNSKD)]
    allocate = cache._buffer
    calls = []

    def fail(capacity):
        calls.append(capacity)
        if len(calls) > fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory ...")
        return allocate(capacity)

    monkeypatch.setattr(cache, "_buffer", fail)
    engine.add(long := Request(prompt(200), 50))
    with pytest.raises(UserError, match=r"cannot grow to 0.0 GB for 2 slots of 256 tokens: .* allocate 2 GiB. Use"):
        engine.step()
    after = (*cache.k_LNSKD, *cache.v_LNSKD)
    assert all(torch.equal(t, kept) and t.stride() == stride for t, (kept, stride) in zip(after, before, strict=True))
    engine.cancel(long)
    while engine.busy:
        found += engine.step()
    assert ids(found) == ids(alone) and {token.request for token in found} == {going}
    # Once there is memory, it can grow.
    monkeypatch.undo()
    assert ids(run(engine, Request(prompt(200), 50))[0]) == ids(run(Engine(model, 2, 400), Request(prompt(200), 50))[0])


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
