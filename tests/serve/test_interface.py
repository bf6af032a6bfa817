"""The interface that clients of OpenAI and vLLM use, beyond plain answers: asked of the command by OpenAI's client."""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import minorca
from minorca import load_model, load_tokenizer
from minorca.generate.engine import Engine
from minorca.generate.request import Request, Token
from minorca.generate.sampling import Sampling
from minorca.serve.choice import Choice, TokenTexts
from minorca.serve.completions import CompletionRequest
from minorca.serve.echo import make_echo
from tests.evaluate.harness_oracle import save_bpe
from tests.generate.test_engine import ids, run
from tests.serve.test_serve import (  # noqa: F401
    ASK,
    IN_FP32,
    SAYS,
    assert_error,
    client,
    directory,
    greedy,
    prompt_of,
    server,
    serving,
    talk,
    talker,
    talking,
)

TEXT = "Once upon a time"
BASE = {"model": "tiny", "temperature": 0}


def join(chunks) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def post(server, path: str, **body) -> dict:  # noqa: F811
    response = httpx.post(f"{server.url}{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0, "temperature": 1.0, "seed": 4},
        {"logit_bias": {"65": 3.5, "66": -100}},
        {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logit_bias": {"70": 2}, "seed": 5, "temperature": 0.7},
    ],
)
def test_penalties_and_biases_reach_the_engine(fields, client, directory):  # noqa: F811
    """Beside other requests, streamed or not."""
    tok = load_tokenizer(directory)
    options = {"temperature": 0.0} | fields
    options["logit_bias"] = {int(i): bias for i, bias in fields.get("logit_bias", {}).items()}
    request = Request(tok.encode(TEXT), 24, Sampling(**options))
    (tokens,) = run(Engine(load_model(directory, torch.float32, "cpu"), 1, 256), request)
    asked = {"prompt": TEXT, "max_tokens": 24} | BASE | fields
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.completions.create(**asked), range(3)))
    assert {answer.choices[0].text for answer in answers} == {tok.decode(ids(tokens))}
    assert join(client.completions.create(stream=True, **asked)) == tok.decode(ids(tokens))
    (plain,) = greedy(directory, [tok.encode(TEXT)])
    assert ids(tokens) != plain


def test_ids_that_end_an_answer(client, directory):  # noqa: F811
    tok = load_tokenizer(directory)
    (free,) = greedy(directory, [tok.encode(TEXT)])
    first = free.index(free[6])
    asked = {"prompt": TEXT, "max_tokens": 24} | BASE
    answer = client.completions.create(**asked, logprobs=0, extra_body={"stop_token_ids": [free[6]]})
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (tok.decode(free[:first]), "stop")
    # The id that ended it counts, and has no text.
    assert answer.usage.completion_tokens == first + 1 == len(choice.logprobs.tokens)
    # The model's own stop id, made the likeliest.
    forced = {"logit_bias": {str(tok.eos_id): 100}}
    assert client.completions.create(**asked, **forced).choices[0].finish_reason == "stop"
    ignoring = client.completions.create(**asked, **forced, extra_body={"ignore_eos": True})
    assert (ignoring.usage.completion_tokens, ignoring.choices[0].finish_reason) == (24, "length")
    later = client.completions.create(**asked, **forced, extra_body={"min_tokens": 7})
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (8, "stop")


def test_stop_strings_end_no_text_before_the_minimum(talking):  # noqa: F811
    ask = {"model": "talker", "prompt": "\n", "temperature": 0, "max_tokens": 48, "stop": ["ck", "€"]}

    def text(**fields) -> str:
        (choice,) = talking.client().completions.create(**ask, extra_body=fields).choices
        assert join(talking.client().completions.create(**ask, extra_body=fields, stream=True)) == choice.text
        assert choice.finish_reason == "stop"
        return choice.text

    assert text() == text(min_tokens=2) == "ti"
    assert text(min_tokens=3) == "tick-é"
    assert text(min_tokens=len((SAYS + "ti").encode())) == SAYS + "ti"


def test_the_maximum_of_a_request_that_sets_none(client):  # noqa: F811
    assert client.completions.create(prompt=TEXT, **BASE).usage.completion_tokens == 16
    assert client.completions.create(prompt=[65] * 250, **BASE).usage.completion_tokens == 6
    assert client.chat.completions.create(messages=ASK, **BASE).usage.total_tokens == 256


def test_no_answer_is_asked_for(client, directory):  # noqa: F811
    """The conversation goes on as the model goes on, after any last message."""
    tok = load_tokenizer(directory)
    messages = [*ASK, {"role": "assistant", "content": "Yes"}]
    prompt = minorca.render_chat(tok, messages, add_generation_prompt=False)
    answer = client.chat.completions.create(
        messages=messages, max_tokens=24, extra_body={"add_generation_prompt": False}, **BASE
    )
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == tok.decode(greedy(directory, [prompt])[0])


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("text", ["What do bees make?", "<s>What<|im_end|>", "What <s> is"])
def test_bos_before_prompts_is_transformers(adds, text, tmp_path):
    """None is added twice, which transformers does; the echo is the text as it was sent, or that of the ids."""
    save_bpe(tmp_path, adds_bos=True)
    tok = load_tokenizer(tmp_path)
    body = CompletionRequest.model_validate({"model": "a", "prompt": text, "add_special_tokens": adds, "echo": True})
    (found,) = body.encode_prompts(tok, "auto", 100)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    adds = adds and not text.startswith("<s>")
    assert found == theirs.encode(text, add_special_tokens=adds)
    assert make_echo(tok, found, text, True).text == text
    echo = make_echo(tok, found, None, True)
    assert echo.text == theirs.decode(found) and len(echo.offsets) == len(found)
    spelled = [theirs.decode([i]) for i in found]
    starts = [0, *accumulate(map(len, spelled))][:-1]
    assert echo.offsets == starts
    # A bos that the text has not has no place in it.
    assert make_echo(tok, found, text, True).offsets == [max(0, start - adds * len("<s>")) for start in starts]


def test_a_text_goes_on_where_its_prompt_ended(tmp_path):
    """A space at the start of a completion is part of it: tokenizers of SentencePiece's kind drop that of a text."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "▁": 1, "a": 2, "b": 3, "▁b": 4}, [("▁", "b")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path)
    assert tok.decode(tok.encode("a b")) == "a b" and tok.decode([4]) == "b"
    request = Request([2], 1)
    for echo, text in ((None, " b"), (make_echo(tok, tok.encode("a"), "a", False), "a b")):
        choice = Choice(
            0, tok, TokenTexts(tok), [], CompletionRequest.model_validate({"model": "a", "prompt": "a"}).continues
        )
        choice.echo = echo
        assert choice.push(Token(request, 4, None, None, "length")) == choice.text == text


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def expected(directory):  # noqa: F811
    """transformers' log-probabilities of the ids after each of a prompt and its greedy answer, and these ids."""
    tok = load_tokenizer(directory)
    prompt = tok.encode(TEXT)
    whole = prompt + greedy(directory, [prompt])[0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([whole])).logits[0]
    return whole, logits.log_softmax(-1)


def test_an_echo_has_the_prompt_and_its_log_probabilities(client, directory, expected):  # noqa: F811
    tok = load_tokenizer(directory)
    whole, logprobs_TV = expected
    values = [row[i].item() for row, i in zip(logprobs_TV, whole[1:])]
    for prompt in (TEXT, tok.encode(TEXT)):
        asked = {"prompt": prompt, "max_tokens": 24, "echo": True, "n": 2} | BASE
        for choice in client.completions.create(**asked, logprobs=2).choices:
            assert choice.text == TEXT + tok.decode(whole[len(TEXT) :])
            found = choice.logprobs
            assert found.tokens == [tok.decode([i]) for i in whole]
            assert found.token_logprobs[0] is found.top_logprobs[0] is None
            assert found.token_logprobs[1:] == pytest.approx(values, abs=1e-3)
            assert found.text_offset[: len(TEXT) + 1] == list(range(len(TEXT) + 1))
            for top, row in zip(found.top_logprobs[1:], logprobs_TV):
                assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-3) and len(top) in (1, 2, 3)
        plain = client.completions.create(**asked)
        assert {choice.text for choice in plain.choices} == {choice.text} and plain.choices[0].logprobs is None


@pytest.mark.parametrize("new", [0, 24])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_an_echo_is_streamed(new, logprobs, client):  # noqa: F811
    """All of several prompts' choices, as without a stream; 0 new tokens give the prompts alone."""
    asked: Any = {"prompt": [TEXT, "é€"], "max_tokens": new, "echo": True, "logprobs": logprobs} | BASE
    whole = client.completions.create(**asked)
    assert whole.usage.completion_tokens == 2 * new and whole.usage.prompt_tokens == len(TEXT) + 5
    if not new:
        assert [(c.text, c.finish_reason) for c in whole.choices] == [(TEXT, "length"), ("é€", "length")]
    chunks = list(client.completions.create(**asked, stream=True))
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(c.text for c in own) == choice.text and own[-1].finish_reason == choice.finish_reason
        if logprobs is not None:
            for field in ("tokens", "token_logprobs", "text_offset"):
                streamed = [value for c in own if c.logprobs for value in getattr(c.logprobs, field)]
                assert streamed == pytest.approx(getattr(choice.logprobs, field), abs=1e-3)


def test_prompt_logprobs_are_vllms(client, server, directory, expected):  # noqa: F811
    tok = load_tokenizer(directory)
    whole, logprobs_TV = expected
    answer = post(server, "/v1/completions", prompt=TEXT, max_tokens=0, prompt_logprobs=2, **BASE)
    (choice,) = answer["choices"]
    assert choice["text"] == "" and choice["finish_reason"] == "length" and choice["logprobs"] is None
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(TEXT) - 1
    for entries, i, row in zip(others, whole[1:], logprobs_TV):
        ranks = {str(j): rank for rank, j in enumerate(row.argsort(descending=True).tolist(), 1)}
        assert entries.keys() == {str(i), *(j for j, rank in ranks.items() if rank <= 2)}
        for j, entry in entries.items():
            assert entry["rank"] == ranks[j] and entry["logprob"] == pytest.approx(row[int(j)].item(), abs=1e-3)
            # The model has two ids more than the tokenizer.
            assert entry["decoded_token"] == (tok.decode([int(j)]) if int(j) < 256 else entry["decoded_token"])
    answer = post(server, "/v1/chat/completions", messages=ASK, max_tokens=2, prompt_logprobs=0, **BASE)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert {len(entries) for entries in answer["prompt_logprobs"][1:]} == {1}


def test_a_prompt_of_the_maximum_length_can_be_scored(server):  # noqa: F811
    answer = post(server, "/v1/completions", prompt=[65] * 256, max_tokens=0, echo=True, logprobs=1, **BASE)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 256 == answer["usage"]["total_tokens"]


def test_too_many_log_probabilities_are_refused(server):  # noqa: F811
    ask = {"model": "tiny", "prompt": ["a"] * 2000, "n": 2, "max_tokens": 255, "logprobs": 20}
    problem = assert_error(httpx.post(f"{server.url}/v1/completions", json=ask))
    assert problem["param"] == "logprobs" and "max_tokens" in problem["message"]


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_waits_for_itself(client, directory):  # noqa: F811
    """More prompts than slots and places in the queue: each as by itself, in their order."""
    tok = load_tokenizer(directory)
    prompts = [f"number {n}" for n in range(25)]
    expected = [tok.decode(found) for found in greedy(directory, [tok.encode(prompt) for prompt in prompts], 6)]
    asked = {"prompt": prompts, "n": 2, "max_tokens": 6} | BASE
    answer = client.completions.create(**asked)
    assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(50))
    chunks = list(client.completions.create(**asked, stream=True))
    for index, text in enumerate(text for text in expected for _ in range(2)):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == text


def test_a_batch_lets_others_in_between(talking):  # noqa: F811
    """One slot: a request that comes later ends before the batch, of which one choice at a time is in the engine."""
    batch = talking.client().completions.create(
        model="talker", prompt=["\n"] * 200, max_tokens=20, stream=True, temperature=0
    )
    next(batch)
    assert talking.metric("running") + talking.metric("waiting") <= 2
    other = talking.client().completions.create(model="talker", prompt="\n", max_tokens=4, temperature=0)
    assert other.choices[0].text == "tick"
    finished = talking.metric("finished_total", reason="length")
    rest = [chunk for chunk in batch if chunk.choices[0].finish_reason]
    assert len(rest) == 200 and talking.metric("finished_total", reason="length") - finished > 50


def test_a_batch_that_is_left_ends(talking):  # noqa: F811
    before = talking.metric("finished_total", reason="cancelled")
    batch = talking.client().completions.create(model="talker", prompt=["\n"] * 300, max_tokens=500, stream=True)
    next(batch)
    batch.close()
    talk(talking, 5).close()
    assert talking.metric("finished_total", reason="cancelled") - before >= 300


# --------------------------------------------------------------------------------------------------------- other paths


def test_usage_in_every_event(client):  # noqa: F811
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(
        messages=ASK, max_tokens=9, stream=True, stream_options=options, **BASE
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 9
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}
    assert last.choices == [] and last.usage.completion_tokens == 9


def test_models_are_described(client, server):  # noqa: F811
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["tiny", "adapter", "own"]
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
        assert model.root == "tiny" and model.parent == (None if name == "tiny" else "tiny")
        assert model.max_model_len == 256 and model.owned_by == "minorca"
    assert httpx.get(f"{server.url}/version").json() == {"version": minorca.__version__}


def test_text_becomes_ids_and_text_again(server, directory):  # noqa: F811
    """Those of transformers' tokenizer."""
    theirs = AutoTokenizer.from_pretrained(directory)
    for text in ("Once upon", "é€😀 \n  x", "<|im_start|>user\nhi<|im_end|>", "  "):
        found = post(server, "/tokenize", model="tiny", prompt=text)
        assert found["tokens"] == theirs.encode(text) and found["count"] == len(found["tokens"])
        assert found["max_model_len"] == 256
        assert post(server, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
    assert post(server, "/tokenize", messages=ASK)["tokens"] == prompt_of(directory)
    header = minorca.render_chat(load_tokenizer(directory), ASK, add_generation_prompt=False)
    asked = {"model": "adapter", "messages": ASK, "add_generation_prompt": False}
    assert post(server, "/tokenize", **asked)["tokens"] == header != prompt_of(directory)
    assert post(server, "/tokenize", model="own", messages=ASK)["tokens"] == theirs.encode("hi!")
    assert post(server, "/detokenize", model="tiny", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    "path, field, body",
    [
        ("tokenize", "prompt", {"prompt": "x" * 300}),
        ("tokenize", "prompt", {"prompt": "x" * 10**6}),
        ("tokenize", "prompt", {"prompt": 1}),
        ("tokenize", "messages", {"messages": [{"role": "user", "content": "x" * 300}]}),
        ("tokenize", "messages", {"messages": []}),
        ("tokenize", "return_token_strs", {"prompt": "a", "return_token_strs": True}),
        ("tokenize", "prompt", {"prompt": "a", "messages": ASK}),
        ("tokenize", "prompt", {}),
        ("tokenize", "add_special_tokens", {"messages": ASK, "add_special_tokens": True}),
        ("detokenize", "tokens", {"tokens": [258]}),
        ("detokenize", "tokens", {"tokens": [-1]}),
        ("detokenize", "tokens", {"tokens": [65] * 257}),
        ("detokenize", "tokens", {"tokens": ["a"]}),
        ("detokenize", "tokens", {}),
    ],
)
def test_what_cannot_become_ids_or_text_is_named(path, field, body, server):  # noqa: F811
    assert assert_error(httpx.post(f"{server.url}/{path}", json=body))["param"] == field
    problem = assert_error(httpx.post(f"{server.url}/{path}", json={"model": "x", "prompt": "a", "tokens": [1]}), 404)
    assert problem["code"] == "model_not_found"


# ----------------------------------------------------------------------------------------------------------- harnesses


@pytest.mark.slow
def test_lm_eval_finds_the_scores_of_our_own_evaluation(save_mistral, tmp_path, monkeypatch):
    """By its class for OpenAI's completions (`pip install tenacity`): every log-likelihood and generation of its tasks
    of several kinds, in batches of token ids."""
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from minorca.evaluate.harness import MinorcaLM
    from tests.evaluate.harness_oracle import write_tasks
    from tests.evaluate.test_harness import evaluated

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    ids_of_text = {"bos_token_id": 0, "eos_token_id": 1}
    model_directory, _ = save_mistral(vocab_size=400, max_position_embeddings=512, sliding_window=32, **ids_of_text)
    save_bpe(model_directory, adds_bos=False)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    ours = MinorcaLM(load_model(model_directory, torch.float32, "cpu"), load_tokenizer(model_directory), add_bos=False)
    expected = evaluated(ours, tasks)
    with serving("--model", model_directory, "--slots", 3, "--queue", 2, program=("-c", IN_FP32)) as served:
        theirs: Any = LocalCompletionsAPI
        found = evaluated(
            theirs(
                model=model_directory.name,
                tokenizer=str(model_directory),
                base_url=f"{served.url}/v1/completions",
                tokenizer_backend="huggingface",
                batch_size=7,
                max_length=512,
                max_retries=1,
            ),
            tasks,
        )
    compared = 0
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (task, name)
                compared += 1
    assert compared > 8
