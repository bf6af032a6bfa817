"""The server as its users see it: the command in a process of its own, OpenAI's client, and malicious clients."""

import asyncio
import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families

from minorca import load_model, load_tokenizer, render_chat
from minorca.data.portable_files import adapter_files
from minorca.errors import UserError
from minorca.files.atomic import write_files
from minorca.generate import generate
from minorca.model.architecture import read_architecture
from minorca.serve import __main__ as serve_command
from minorca.serve import fields, http
from minorca.serve.app import make_app
from minorca.serve.completions import CompletionRequest
from minorca.serve.engine_thread import EngineThread
from minorca.serve.errors import APIError, ErrorResponse
from minorca.serve.protocol import ChatRequest
from minorca.serve.service import Model, Service
from tests.helpers import ROOT, random_adapter, random_mistral, save_tokenizer, wait_until

ASK = [{"role": "user", "content": "hi"}]
OWN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
# No byte occurs twice.
SAYS = "tick-é€😀 "
COMMAND = ("-m", "minorca.serve")
IN_FP32 = """
import torch
from minorca import cli
from minorca.generate import engine
from minorca.serve import __main__ as serve
engine.fast_dtype = lambda: torch.float32
cli.run(serve.main)
"""
FAILING = """
from minorca import cli
from minorca.generate import engine
from minorca.serve import __main__ as serve
engine.Engine.step = lambda self: 1 / 0
cli.run(serve.main)
"""
FEW_DESCRIPTORS = """
import resource
from minorca import cli
from minorca.serve import __main__ as serve, http
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
http.HEAD_TIMEOUT = http.BODY_TIMEOUT = 2
cli.run(serve.main)
"""


class Server:
    def __init__(self, *options, program=COMMAND, **environment):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment
        command = [sys.executable, *program, "--port", "0", *map(str, options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        assert self.process.stdout
        self.announcement = self.process.stdout.readline()
        address = re.search("http://[^ ]*:[0-9]+", self.announcement)
        self.url = address[0] if address else pytest.fail(self.process.communicate()[1])

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str, **labels) -> float:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [
            s for family in families for s in family.samples if s.name == f"minorca_{name}" and s.labels == labels
        ]
        return samples[0].value if samples else 0.0

    def end(self, *signals: int) -> tuple[int, str]:
        """Its exit status and what it wrote to standard error, except for the lines on loading and unknown fields."""
        for signum in signals:
            self.process.send_signal(signum)
        err = self.process.communicate(timeout=60)[1]
        kept = (line for line in err.splitlines(keepends=True) if not re.search("GB/s|unknown fields? ", line))
        return self.process.returncode, "".join(kept)


@contextlib.contextmanager
def serving(*options, **more):
    server = Server(*options, **more)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def save_endless(directory):
    """Writes a random model whose greedy answers never contain a stop id; returns it."""
    model = random_mistral(vocab_size=260, max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight[[2, 257]] = 0.5 * model.lm_head.weight[65]
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An endless model; beside it an adapter, bare and with a template."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = save_endless(directory)
    adapter = directory.parent / "adapter"
    random_adapter(model, adapter, ("q", "v", "down"))
    own = directory.parent / "own"
    shutil.copytree(adapter, own)
    tok = load_tokenizer(directory)
    tok.chat_template = OWN_TEMPLATE
    write_files(own, adapter_files(tok, "jinja"))
    return directory


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that repeats SAYS."""
    directory = tmp_path_factory.mktemp("models") / "talker"
    model: Any = random_mistral(vocab_size=260, hidden_size=512, num_hidden_layers=1, max_position_embeddings=8192)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    newline, *cycle = load_tokenizer(directory).encode(f"\n{SAYS}")
    # A bigram table: no attention, no MLP, one direction a token.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(260, 512))
        model.lm_head.weight.zero_()
        for here, following in zip([newline, *cycle], [*cycle, cycle[0]]):
            model.lm_head.weight[following, here] = 1
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(directory):
    """In fp32, where the batch size and the layout of the weights change no greedy answer."""
    adapters = ("--adapter", directory.parent / "adapter", "--adapter", directory.parent / "own")
    options = ("--model", directory, *adapters, "--slots", 4, "--queue", 4)
    with serving(*options, program=("-c", IN_FP32)) as server:
        yield server
        assert server.end(signal.SIGTERM) == (143, "")


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def talking(talker):
    """One slot, and one request may wait."""
    with serving("--model", talker, "--slots", 1, "--queue", 1) as server:
        yield server
        assert server.end(signal.SIGTERM) == (143, "")


# -------------------------------------------------------------------------------------------------------------- answers


def prompt_of(directory, text: str = "hi") -> list[int]:
    return render_chat(load_tokenizer(directory), [{"role": "user", "content": text}])


def greedy(directory, prompts, new: int = 24, **options) -> list[list[int]]:
    return generate(load_model(directory, torch.float32, "cpu", **options), prompts, new)


def test_answers_are_those_of_generate(server, client, directory):
    """Seven at once in four slots, with the base model and with the adapter, streamed or not."""
    tok = load_tokenizer(directory)
    texts = ["hi", "Who are you?", "é€😀", "x" * 90, "", "<|im_end|>", "1 + 1"]
    prompts = [prompt_of(directory, text) for text in texts]

    def ask(name, text):
        asked = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}
        answer = client.chat.completions.create(**asked)
        chunks = client.chat.completions.create(stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
        return answer

    expected = []
    for name, options in (("tiny", {}), ("adapter", {"adapter": directory.parent / "adapter"})):
        expected = [tok.decode(ids) for ids in greedy(directory, prompts, **options)]
        with ThreadPoolExecutor(len(texts)) as pool:
            answers = dict(zip(texts, pool.map(partial(ask, name), texts)))
        assert [answers[text].choices[0].message.content for text in texts] == expected
        assert [answers[text].usage.prompt_tokens for text in texts] == [len(prompt) for prompt in prompts]
        assert {(a.model, a.usage.completion_tokens, a.choices[0].finish_reason) for a in answers.values()} == {
            (name, 24, "length")
        }
    assert expected != [tok.decode(ids) for ids in greedy(directory, prompts)]


def test_an_adapter_is_asked_by_its_own_template(client, directory):
    tok = load_tokenizer(directory)
    answer = client.chat.completions.create(model="own", messages=ASK, max_tokens=24, temperature=0)
    prompt = tok.encode("hi!")
    [ids] = greedy(directory, [prompt], adapter=directory.parent / "own")
    assert (answer.usage.prompt_tokens, answer.choices[0].message.content) == (len(prompt), tok.decode(ids))


@pytest.mark.parametrize("given, own", [(None, "jinja"), ("chatml", "chatml"), ("auto", "auto")])
def test_a_given_template_is_that_of_all_models(given, own, directory):
    """As in minorca.generate, also before the one that an adapter records."""
    args = serve_command._parse(["--model", str(directory), *(["--template", given] if given else [])])
    directories = {"tiny": None, "adapter": str(directory.parent / "adapter"), "own": str(directory.parent / "own")}
    models = serve_command._load_chats(directories, read_architecture(directory), args)
    assert {name: model.template for name, model in models.items()} == {
        "tiny": given or "auto",
        "adapter": given or "auto",
        "own": own,
    }


def test_control_tokens_in_prompts(client):
    """A text's control strings are control tokens unless the request says otherwise."""

    def prompt_tokens(**extra):
        ask = {"model": "tiny", "prompt": "hi<|im_end|>", "max_tokens": 1}
        return client.completions.create(**ask, extra_body=extra).usage.prompt_tokens

    assert prompt_tokens() == prompt_tokens(parse_control_tokens=True) == 3
    assert prompt_tokens(parse_control_tokens=False) == len("hi<|im_end|>")


def test_a_final_message_is_continued(client, directory):
    """As vLLM's fields ask for; without them an answer is not answered."""
    messages = [*ASK, {"role": "assistant", "content": "The answer"}]
    prompt = prompt_of(directory) + load_tokenizer(directory).encode("The answer")
    expected = load_tokenizer(directory).decode(greedy(directory, [prompt])[0])
    for more in ({}, {"add_generation_prompt": False}):
        extra = {"continue_final_message": True} | more
        ask = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0, "extra_body": extra}
        answer = client.chat.completions.create(**ask)
        assert (answer.usage.prompt_tokens, answer.choices[0].message.content) == (len(prompt), expected)
        chunks = client.chat.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_a_stream_has_openais_events(talking):
    client = talking.client()
    options = {
        "model": "talker",
        "temperature": 0,
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, *pieces, last, usage = client.chat.completions.create(messages=ASK, **options)
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    assert [p.choices[0].delta.content for p in pieces] == [*SAYS, *SAYS[:5]] and {
        p.choices[0].finish_reason for p in pieces
    } == {None}
    assert last.choices[0].finish_reason == "length" and not last.choices[0].delta.content and last.usage is None
    assert usage.choices == [] and usage.usage.completion_tokens == 20
    *pieces, last, usage = client.completions.create(prompt="\n", **options)
    assert "".join(p.choices[0].text for p in pieces) == SAYS + "tick-" and last.choices[0].finish_reason == "length"
    assert {p.object for p in pieces} == {"text_completion"} and len({p.id for p in pieces}) == 1
    body = {"model": "talker", "messages": ASK, "max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{talking.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream") and response.read().endswith(
            b"\n\ndata: [DONE]\n\n"
        )


@pytest.mark.parametrize(
    "stop, text",
    [
        ("€", "tick-é"),
        (["never", "k-é€"], "tic"),
        (["€😀 t", "€😀 x"], "tick-é"),
        ("ticktick", SAYS * 3 + "tic"),
        ([], SAYS * 3 + "tic"),
    ],
)
def test_stop_strings(talking, stop, text):
    options = {"model": "talker", "temperature": 0, "max_tokens": 48, "stop": stop, "messages": ASK}
    [whole] = talking.client().chat.completions.create(**options).choices
    reason = "length" if len(text) > 20 else "stop"
    assert (whole.message.content, whole.finish_reason) == (text, reason)
    chunks = list(talking.client().chat.completions.create(stream=True, **options))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks) == text
        and chunks[-1].choices[0].finish_reason == reason
    )
    wait_until(lambda: talking.metric("running") == 0)


def test_a_seed_repeats_and_n_differ(client):
    def texts(**options):
        answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=16, temperature=1.5, **options)
        assert [choice.index for choice in answer.choices] == list(range(options["n"]))
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=7)
    assert (
        len(set(three)) == 3
        and texts(n=3, seed=7) == three
        and texts(n=1, seed=7) == three[:1]
        and texts(n=3, seed=8) != three
    )
    assert texts(n=1) != texts(n=1)


def test_all_forms_of_prompts(client, directory):
    tok = load_tokenizer(directory)
    one = tok.encode("Once upon")
    two = tok.encode("a time, é")
    expected = [tok.decode(ids) for ids in greedy(directory, [one, two])]
    for prompt in (["Once upon", "a time, é"], [one, two]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, n=2)
        assert [(c.index, c.text) for c in answer.choices] == list(enumerate([expected[0]] * 2 + [expected[1]] * 2))
        assert (
            answer.usage.prompt_tokens == len(one) + len(two) and answer.usage.total_tokens == len(one) + len(two) + 96
        )
    for prompt in ("Once upon", one):
        assert (
            client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0).choices[0].text
            == expected[0]
        )


def test_logprobs_are_the_models_own(client, directory):
    """Of its forward over prompt and answer, at any temperature: equal to transformers."""
    from transformers import AutoModelForCausalLM

    tok = load_tokenizer(directory)
    prompt = prompt_of(directory)
    [ids] = greedy(directory, [prompt])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([prompt + ids])).logits[0]
    values, likeliest = logits[len(prompt) - 1 : -1].log_softmax(-1).topk(3)
    # In effect greedy.
    options = {"model": "tiny", "max_tokens": 24, "temperature": 1.7, "top_p": 1e-9}
    chat = (
        client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=3, **options)
        .choices[0]
        .logprobs.content
    )
    assert [entry.logprob for entry in chat] == pytest.approx(values[:, 0].tolist(), abs=1e-3)
    assert [[top.logprob for top in entry.top_logprobs] for entry in chat] == [
        pytest.approx(row, abs=1e-3) for row in values.tolist()
    ]
    assert [entry.token for entry in chat] == [tok.decode([i]) for i in ids]
    assert all(
        (entry.bytes is None) == ("\ufffd" in entry.token) and bytes(entry.bytes or b"").decode() in entry.token
        for entry in chat
    )
    old = client.completions.create(prompt=prompt, logprobs=3, **options).choices[0].logprobs
    assert old.token_logprobs == [entry.logprob for entry in chat] and old.tokens == [entry.token for entry in chat]
    for row, tops, of_row in zip(likeliest.tolist(), old.top_logprobs, values.tolist()):
        assert tops[tok.decode(row[:1])] == pytest.approx(of_row[0], abs=1e-3) and set(tops) == {
            tok.decode([i]) for i in row
        }
    assert client.completions.create(prompt=prompt, logprobs=0, **options).choices[0].logprobs.top_logprobs is None
    assert client.completions.create(prompt=prompt, **options).choices[0].logprobs is None


def test_logprobs_go_with_the_text(talking):
    """Streamed or not: all bytes of a character start where it does, and tokens within a stop string are left out."""
    options = {"model": "talker", "prompt": "\n", "temperature": 0, "max_tokens": 40, "logprobs": 0, "stop": "tick-é€"}
    whole = talking.client().completions.create(**(options | {"prompt": SAYS[:4]}))
    assert whole.choices[0].text == "-é€😀 "
    assert whole.choices[0].logprobs.text_offset == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]
    pieces = [
        chunk.choices[0].logprobs
        for chunk in talking.client().completions.create(stream=True, **(options | {"prompt": SAYS[:4]}))
    ]
    assert [offset for piece in pieces if piece for offset in piece.text_offset] == whole.choices[
        0
    ].logprobs.text_offset
    assert [token for piece in pieces if piece for token in piece.tokens] == whole.choices[0].logprobs.tokens


def test_fields_without_an_effect_are_accepted(client):
    """So are the fields of a response's message, as OpenAI's client sends it back."""
    harmless = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "top_k": -1,
        "min_tokens": 0,
        "ignore_eos": False,
        "best_of": None,
        "length_penalty": 1.0,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
        "chat_template_kwargs": {},
        "guided_json": None,
        "surprise": 1,
        "tools": [],
        "tool_choice": "auto",
        "stop": None,
        "seed": None,
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
    }
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_completion_tokens=3, n=1, extra_body=harmless
    )
    again = [{"role": "developer", "content": "Be brief."}, *ASK, answer.choices[0].message.model_dump() | {"id": "m1"}]
    parts = [{"type": "text", "text": "And", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "then?"}]
    again += [{"role": "user", "content": parts, "cache_control": {"type": "ephemeral"}}]
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    answer = client.chat.completions.create(model="tiny", messages=again, max_tokens=3, extra_body=extra)
    assert answer.usage.completion_tokens == 3
    for extra in (
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 100},
        {"min_p": 1, "top_k": 2**31 - 1},
        {"min_p": 1e-300},
    ):
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 3, "top_p": 1e-300, "temperature": 1e-300}
        assert client.completions.create(**ask, extra_body=extra).usage.completion_tokens <= 3
    client.completions.create(model="tiny", prompt="a", max_tokens=1, best_of=2, n=2, echo=False, suffix=None)


def test_without_a_limit_the_maximum_length_is_used(server, client, directory):
    prompt = prompt_of(directory)
    assert client.chat.completions.create(model="tiny", messages=ASK, temperature=0).usage.total_tokens == 256
    assert [model.id for model in client.models.list()] == ["tiny", "adapter", "own"] and len(prompt) < 200
    assert "tiny, adapter, own" in server.announcement and "4 slots of 256 tokens" in server.announcement


# --------------------------------------------------------------------------------------------------------------- errors


def assert_error(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    return ErrorResponse.model_validate_json(response.content).model_dump()["error"]


# The largest number of digits that Python parses; what is computed from it may have more than can be formatted.
HUGE = 9 * 10**4299
# What OpenAI's or vLLM's API has, with a value that asks for something.
UNSERVED = {
    "functions": [{"name": "f"}],
    "modalities": ["audio"],
    "audio": {"voice": "a"},
    "prediction": {"type": "content", "content": "a"},
    "reasoning_effort": "high",
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": True,
    "allowed_token_ids": [1],
    "bad_words": ["a"],
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
    "prompt_embeds": "AAAA",
    "truncate_prompt_tokens": 5,
    "guided_json": {},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": "root ::= x",
    "documents": [{"text": "a"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "echo": True,
    "add_special_tokens": True,
    "priority": 1,
}
# The field that is reported -> what is sent in place of the fields of a valid body.
INVALID = {
    "model": [{"model": 1}, {"model": None}],
    "messages": [
        {"messages": []},
        {"messages": None},
        {"messages": "hi"},
        {"messages": [*ASK, {"role": "assistant", "content": "Hello"}]},
        {"messages": ASK, "continue_final_message": True},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"messages": [{"role": "user", "content": "x" * 300}]},
        {"messages": ASK * 2000},
    ],
    "messages.0.role": [{"messages": [{"role": "\ud800", "content": "x"}]}],
    "messages.0.tool_call_id": [{"messages": [{"role": "tool", "content": "x"}]}],
    "messages.0.content": [
        {"messages": [{"role": "user", "content": content}]} for content in (None, 1, [1], [{"type": "image_url"}])
    ],
    "messages.0.tool_calls": [
        {"messages": [ASK[0] | {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]}]}
    ],
    "messages.0.tool_calls.0.id": [{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}],
    "max_tokens": [{"max_tokens": value} for value in (0, -1, 1.5, "9", 256, HUGE, True)],
    "max_completion_tokens": [
        {"max_completion_tokens": 0},
        {"max_completion_tokens": 10**9},
        {"max_completion_tokens": HUGE},
    ],
    "temperature": [{"temperature": value} for value in (-0.1, 2.1, "hot", 10**400, [])],
    "top_p": [{"top_p": 0}, {"top_p": 1.1}],
    "top_k": [{"top_k": -2}, {"top_k": 2**70}, {"top_k": 1.5}],
    "min_p": [{"min_p": 2}],
    "repetition_penalty": [{"repetition_penalty": 0}, {"repetition_penalty": -1}],
    "seed": [{"seed": 2**64}, {"seed": 0.5}],
    "n": [{"n": 0}, {"n": 4097}, {"n": HUGE}],
    "stop": [{"stop": ""}, {"stop": ["a"] * 17}, {"stop": [1]}, {"stop": "a" * 2000}],
    "stream": [{"stream": "yes"}],
    "stream_options.continuous_usage_stats": [{"stream_options": {"continuous_usage_stats": 1}}],
    "top_logprobs": [{"top_logprobs": 21, "logprobs": True}],
    "frequency_penalty": [{"frequency_penalty": 2.5}, {"frequency_penalty": "0"}],
    "presence_penalty": [{"presence_penalty": -2.5}],
    "logit_bias": [
        {"logit_bias": bias}
        for bias in (
            {"5": 101},
            {"5": True},
            {"a": 1},
            {"-1": 1},
            {"260": 1},
            [],
            dict.fromkeys(map(str, range(1025)), 1),
        )
    ],
    "stop_token_ids": [{"stop_token_ids": ids} for ids in ([-1], [260], [True], ["5"], 5, [5] * 1025)],
    "min_tokens": [{"min_tokens": -1}, {"min_tokens": 4, "max_tokens": 3}, {"min_tokens": 256}],
    "ignore_eos": [{"ignore_eos": 1}],
    "prompt_logprobs": [{"prompt_logprobs": 21}, {"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}],
    "tools": [{"tools": [{"type": "function", "function": {"name": "f"}}]}],
    "continue_final_message": [{"continue_final_message": "yes"}],
    "add_generation_prompt": [{"add_generation_prompt": True, "continue_final_message": True}],
    "tool_choice": [{"tool_choice": value} for value in ("required", "some", {"type": "function"})],
    "response_format": [
        {"response_format": value}
        for value in (
            {"type": "json_schema"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 1}}},
        )
    ],
    "response_format.type": [{"response_format": {"type": "xml"}}],
    "structured_outputs": [{"structured_outputs": {"regex": value}} for value in ("(", "a" * 10**5)],
} | {field: [{field: value}] for field, value in UNSERVED.items()}


def test_invalid_fields_are_named(server):
    """In OpenAI's format, in UTF-8, whatever their values are."""
    for field, bodies in INVALID.items():
        for body in bodies:
            content = json.dumps({"model": "tiny", "messages": ASK} | body)
            headers = {"Content-Type": "application/json; charset=utf-8"}
            problem = assert_error(httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers))
            assert problem["param"] == field and problem["type"] == "invalid_request_error", (body, problem)
            assert len(problem["message"]) < 2000
    assert "leave it out" in problem["message"] and "priority" in problem["message"]
    for prompt in (
        "\ud800",
        [],
        [[]],
        [1, "a"],
        [1, True],
        [-1],
        [260],
        [10**30],
        ["a", [1]],
        {},
        [1] * 256,
        "x" * 300,
    ):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
        content = json.dumps(body)
        problem = assert_error(httpx.post(f"{server.url}/v1/completions", content=content, headers=headers))
        assert problem["param"] == "prompt", (prompt, problem)
    for more in (
        {"echo": 1},
        {"max_tokens": 0},
        {"use_beam_search": True},
        {"prompt_embeds": "AAAA"},
        {"best_of": 2},
        {"logprobs": 21},
        {"suffix": "x"},
        {"parse_control_tokens": "no"},
        {"logprobs": True},
        {"prompt": ["a"] * 2, "n": HUGE},
    ):
        assert_error(httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": "a"} | more))
    assert server.metric("running") == 0


def test_unknown_fields_are_ignored_and_logged_once(monkeypatch, caplog):
    """In nested objects too; names are quoted, and of very many of them a hundred are logged."""
    monkeypatch.setattr(fields, "_unknown_fields", set())
    part = {"type": "text", "text": "hi", "surprise": 1, "cache_control": {"type": "ephemeral"}}
    bodies = [
        {"surprise": 1, "line\n\ud800": None, "": 1},
        {"messages": [ASK[0] | {"surprise": 1, "in a message": 2}]},
        {"messages": [{"role": "user", "content": [part, part | {"in a part": 1}]}]},
        {"stream_options": {"in options": 1}},
    ]
    with caplog.at_level(logging.WARNING):
        for more in bodies:
            ChatRequest.model_validate({"model": "tiny", "messages": ASK} | more)
    assert [record.getMessage() for record in caplog.records] == [
        f"unknown field {name} of a request is ignored"
        for name in ("'surprise'", r"'line\n\ud800'", "''", "'in a message'", "'in a part'", "'in options'")
    ]
    caplog.clear()
    many = dict.fromkeys(map(str, range(10**5)), 1)
    for more in (many, {"messages": [ASK[0] | many]}, {"stream_options": many}):
        ChatRequest.model_validate({"model": "tiny", "messages": ASK} | more)
    assert len(caplog.records) == 95 and "further" in caplog.records[-1].getMessage()
    assert len(fields._unknown_fields) == 101


LONG = 2**20
# Texts that took seconds or minutes before their length was refused.
LENGTHY = {
    "a message": {"messages": [{"role": "user", "content": "x" * LONG}]},
    "marks": {"messages": [{"role": "user", "content": "".join(f"\ue000{n}:" for n in range(LONG // 7))}]},
    "many messages": {"messages": [{"role": "user", "content": "x" * 1000}] * 1000},
    "many parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 1000}] * 1000}]},
    "a prompt": {"prompt": "x" * LONG},
    "many prompts": {"prompt": ["x" * LONG, *"abc"]},
}


@pytest.mark.parametrize("name", LENGTHY)
def test_a_text_that_is_too_long_is_not_looked_at(name, directory, monkeypatch):
    """Its characters are counted before anything is made of them."""
    tok = load_tokenizer(directory)
    for method in ("encode", "encode_template", "encode_rendered", "replace_control"):
        monkeypatch.setattr(tok, method, None)
    thread: Any = SimpleNamespace(engine=SimpleNamespace(max_length=256))
    kind = CompletionRequest if "prompt" in LENGTHY[name] else ChatRequest
    body = kind.model_validate({"model": "tiny"} | LENGTHY[name])
    with pytest.raises(APIError, match="characters exceed the maximum length of 256 tokens") as error:
        Service(thread, {})._set_prompts(body, Model(tok, "chatml"), {})
    assert error.value.code == "context_length_exceeded" and error.value.param in LENGTHY[name]


def test_between_two_long_bodies_streams_go_on(monkeypatch):
    """However many clients send them: parsing holds the interpreter's lock."""
    times = []

    def parse(text):
        began = time.perf_counter()
        time.sleep(0.01)
        times.append((began, time.perf_counter()))
        return {}

    monkeypatch.setattr(http, "parse_json", parse)
    app = FastAPI()
    app.state.long_bodies = asyncio.Lock()

    @app.post("/")
    async def read(request: Request) -> dict:
        await http.JSONRequest(request.scope, request.receive).json()
        return {}

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            await asyncio.gather(*(client.post("/", json="x" * http.INLINE_CHARACTERS) for _ in range(3)))

    asyncio.run(send())
    (_, first), (second, end), (third, _) = sorted(times)
    assert second - first > 0.01 * http.PAUSE < third - end


@pytest.mark.parametrize("template", ["chatml", "jinja"])
def test_long_conversations_take_linear_time(template, directory):
    """In seconds of this process; the search for a free mark took minutes, and 1,024 short messages 19 seconds."""
    tok = load_tokenizer(directory)
    # Without control strings, so that an answer is found among ordinary tokens.
    tok.chat_template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    short = [{"role": role, "content": "a"} for _ in range(512) for role in ("user", "assistant")][:-1]
    for messages in (LENGTHY["marks"]["messages"], short):
        began = time.process_time()
        assert render_chat(tok, messages, template=template, max_ids=10**7)
        assert time.process_time() - began < 10


def test_other_threads_run_while_a_text_is_encoded(directory):
    tok = load_tokenizer(directory)
    gaps, ends = [], threading.Event()

    def tick():
        last = time.perf_counter()
        while not ends.is_set():
            time.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    for _ in range(4):
        tok.encode_template("the quick brown fox " * 30_000)
    took = time.perf_counter() - began
    ends.set()
    thread.join()
    # It was a fourth: all of one text.
    assert max(gaps) < took / 8


BODIES = {
    "empty": b"",
    "cut": b'{"model":',
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "deep": b"[" * 10**6,
    "deep and whole": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep enough to pass": b'{"model": "tiny", "messages": [], "metadata": {"a":' + b"[" * 400 + b"]" * 400 + b"}}",
    "NaN": b'{"model": "tiny", "temperature": NaN}',
    "infinite": b'{"model": "tiny", "temperature": 1e999}',
    "digits": b'{"seed": ' + b"9" * 10**5 + b"}",
    "twice": b'{"model": "tiny", "model": "tiny"}',
    "half a key": b'{"\\ud800": 1}',
    "many keys": json.dumps(dict.fromkeys(map(str, range(10**5)))).encode(),
    "many lists": json.dumps({"model": "tiny", "prompt": [[1]] * 10**5}).encode(),
    "many wrong ids": json.dumps({"model": "tiny", "prompt": ["a"] + [1] * 10**5}).encode(),
    "many wrong messages": json.dumps({"model": "tiny", "messages": [1] * 10**5}).encode(),
    "too long": b'{"model": "' + b"x" * 5 * 10**6 + b'"}',
}


def test_invalid_bodies(server):
    for name, content in BODIES.items():
        for path in ("chat/completions", "completions"):
            problem = assert_error(
                httpx.post(f"{server.url}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
            )
            assert len(problem["message"]) < 2000, name
    for lists, message in ((2**17, "more than 131072 opening brackets"), (2**17 - 2, "expected a string")):
        problem = assert_error(
            httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": [[]] * lists}, timeout=60)
        )
        assert message in problem["message"]
    # What a page of another site can send without a preflight request.
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
    ):
        headers = {"Content-Type": kind} if kind else {}
        problem = assert_error(
            httpx.post(f"{server.url}/v1/completions", content=b'{"model": "tiny"}', headers=headers)
        )
        assert "Content-Type" in problem["message"]

    def without_end():
        while True:
            yield b"x" * 2**20

    # The server may disconnect before the response is read.
    with contextlib.suppress(httpx.TransportError):
        assert_error(
            httpx.post(
                f"{server.url}/v1/completions", content=without_end(), headers={"Content-Type": "application/json"}
            )
        )
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_paths_methods_and_hosts(server, client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")
    asks: list[Any] = [
        lambda: client.chat.completions.create(model="gpt-4", messages=ASK),
        lambda: client.completions.create(model="gpt-4", prompt="a"),
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.models.retrieve("tiny/x"),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="expected one of tiny, adapter, own") as error:
            ask()
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
    content = json.dumps({"model": "tiny\ud800", "prompt": "a"})
    headers = {"Content-Type": "application/json"}
    assert_error(httpx.post(f"{server.url}/v1/completions", content=content, headers=headers), 404)
    assert_error(httpx.get(f"{server.url}/v1/completions"), 405)
    for path in ("/", "/health", "/metrics", "/version", "/v1/models", "/v1/models/tiny", "/openapi.json"):
        head, get = (httpx.request(method, server.url + path) for method in ("HEAD", "GET"))
        assert head.status_code == get.status_code == 200 and head.content == b"" != get.content
        assert head.headers["content-type"] == get.headers["content-type"]
    assert_error(httpx.get(f"{server.url}/%ff%00<script>"), 404)
    port = server.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost:x", "[::1"):
        assert_error(httpx.get(f"{server.url}/", headers={"Host": host}))
    for host in ("localhost", f"LOCALHOST:{port}", "[::1]:1", "127.0.0.1"):
        response = httpx.get(f"{server.url}/", headers={"Host": host, "Origin": "http://evil.example"})
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not any("access-control" in name for name in response.headers)


def test_a_key(talker):
    """If one is set, everything except / and /health needs it."""
    with serving("--model", talker, "--host", "0.0.0.0", MINORCA_API_KEY="sesame") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            for key in (None, "Bearer", "Bearer sesam", "Bearer sesame1", "Basic sesame", "sesame", "Bearer \xff"):
                headers = {} if key is None else {b"Authorization": key.encode()}
                response = httpx.get(url + path, headers=headers)
                assert assert_error(response, 401)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert httpx.get(url + path, headers={"Authorization": "bearer sesame"}).status_code == 200
        assert (
            httpx.get(f"{url}/").status_code
            == httpx.get(f"{url}/health", headers={"Host": "other.example"}).status_code
            == 200
        )
        server.url = url
        with pytest.raises(openai.AuthenticationError):
            server.client("other").models.list()
        assert [model.id for model in server.client("sesame").models.list()] == ["talker"]
        assert server.end(signal.SIGTERM) == (143, "")
    with serving("--model", talker, "--host", "0.0.0.0") as server:
        status, err = server.end(signal.SIGTERM)
        assert status == 143 and "warning" in err and "MINORCA_API_KEY" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- connections


def talk(server: Server, new: int = 8000) -> Any:
    """A stream that takes seconds, after its first chunk."""
    client: Any = server.client()
    stream = client.chat.completions.create(model="talker", messages=ASK, max_tokens=new, stream=True, temperature=0)
    next(stream)
    return stream


def test_a_client_that_leaves_frees_its_slot(talking):
    cancelled = talking.metric("finished_total", reason="cancelled")
    stream = talk(talking)
    assert next(stream).choices[0].delta.content == "t"
    wait_until(lambda: talking.metric("running") == 1)
    stream.close()
    wait_until(lambda: talking.metric("running") == 0, 5)
    with pytest.raises(openai.APITimeoutError):
        talking.client().with_options(timeout=0.5).completions.create(
            model="talker", prompt="\n", max_tokens=8000, temperature=0
        )
    wait_until(lambda: talking.metric("running") == 0, 5)
    waits = [talk(talking), talk(talking)]
    wait_until(lambda: talking.metric("waiting") == 1)
    waits[1].close()
    wait_until(lambda: talking.metric("waiting") == 0, 5)
    waits[0].close()
    wait_until(lambda: talking.metric("finished_total", reason="cancelled") == cancelled + 4)


def test_a_client_that_does_not_read_is_disconnected(monkeypatch):
    monkeypatch.setattr(http, "SEND_TIMEOUT", 0.05)
    sent = []
    freed = []

    async def events():
        yield "data: 1\n\n"

    async def for_ever() -> Any:
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if len(sent) == 2:
            await for_ever()

    async def stream():
        held = contextlib.ExitStack()
        held.callback(freed.append, True)
        # As uvicorn passes it.
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(http.EventStream(events(), held)(scope, for_ever, send), 5)

    asyncio.run(stream())
    assert freed and sent == ["http.response.start", "http.response.body"]


def test_connections_end_before_descriptors_do(talker):
    """Those beyond are closed in silence and counted; those that ask for nothing make room."""
    with serving("--model", talker, program=("-c", FEW_DESCRIPTORS)) as server, contextlib.ExitStack() as stack:
        url = httpx.URL(server.url)
        connections = []
        for n in range(120):
            connection = stack.enter_context(socket.create_connection((url.host, url.port), timeout=30))
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /metrics HT" if n % 2 else b"")
            connections.append(connection)
        first, half_a_head, idle, answered, half_a_body = connections[:5]
        with contextlib.suppress(ConnectionResetError):
            assert connections[-1].recv(1) == b""
        first.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(12) == b"HTTP/1.1 200"
        # The second head is waited for no longer than the first.
        answered.sendall(b"TP/1.1\r\nHost: localhost\r\n\r\nGET /metrics HT")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        half_a_body.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert idle.recv(1) == half_a_head.recv(1) == b""
        assert half_a_body.recv(12) == b"HTTP/1.1 408"
        began = time.monotonic()
        while answered.recv(2**16):
            pass
        assert time.monotonic() - began < 9
        refused = server.metric("connections_refused_total")
        assert 64 < refused < 110
        completed: Any = server.client().completions.create(model="talker", prompt="a", max_tokens=2, temperature=0)
        assert completed.usage.completion_tokens == 2 and server.metric("connections_refused_total") == refused
        stack.close()
        assert server.end(signal.SIGTERM) == (143, "")


def test_too_many_requests(talking):
    """Beyond those that run and wait; however many choices each has."""
    client = talking.client()
    refused = talking.metric("refused_total", status="429")
    ask = {"model": "talker", "prompt": "\n", "max_tokens": 2, "temperature": 0}
    wait_until(lambda: talking.metric("running") == 0)
    one = talk(talking)
    two = talk(talking)
    with pytest.raises(openai.RateLimitError) as refusal:
        client.completions.create(**ask)
    assert int(refusal.value.response.headers["retry-after"]) > 0
    one.close()
    two.close()
    wait_until(lambda: talking.metric("running") + talking.metric("waiting") == 0)
    assert [choice.text for choice in client.completions.create(**ask, n=9).choices] == ["ti"] * 9
    assert talking.metric("refused_total", status="429") == refused + 1


def test_metrics_count(talking):
    names = ("prompt_tokens_total", "new_tokens_total", "first_token_seconds_count", "duration_seconds_count")
    before = [talking.metric(name) for name in names]
    talking.client().completions.create(model="talker", prompt=["\n", "ab"], max_tokens=3, temperature=0)
    assert [talking.metric(name) - b for name, b in zip(names, before)] == [3, 6, 1, 1]
    assert talking.metric("slots") == 1

    cached = talking.metric("cached_prompt_tokens_total")
    for expected in (0, 20):
        talking.client().completions.create(model="talker", prompt="A prompt sent twice!!", max_tokens=1)
        # The last token is always computed.
        assert talking.metric("cached_prompt_tokens_total") - cached == expected


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_answers_finish(signum, status, talker):
    with serving("--model", talker) as server:
        stream = talk(server, 1505)
        server.process.send_signal(signum)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == SAYS * 100 + SAYS[:5]
        assert server.end() == (status, "")
        with pytest.raises(openai.APIConnectionError):
            server.client().models.list()


def test_a_dead_engine_ends_the_server(talker):
    """Clients receive an error, streaming or not; the process ends with the traceback."""
    with serving("--model", talker, program=("-c", FAILING)) as server:
        with pytest.raises(openai.InternalServerError, match="engine"):
            server.client().completions.create(model="talker", prompt="\n", max_tokens=5)
        status, err = server.end()
        assert status == 1 and "ZeroDivisionError" in err
    with serving("--model", talker, program=("-c", FAILING)) as server, pytest.raises(openai.APIError, match="engine"):
        list(server.client().completions.create(model="talker", prompt="\n", max_tokens=5, stream=True))


def test_the_thread_that_computes_is_one(talker):
    """OpenMP's threads of another one would slow it down."""
    used = []

    def open_engine() -> Any:
        used.append(threading.current_thread())
        return SimpleNamespace(slots=1, busy=False)

    async def open_and_stop() -> EngineThread:
        thread = EngineThread(open_engine, 0)
        await thread.open()
        thread.call(lambda: used.append(threading.current_thread()))
        thread.stop()
        return thread

    thread = asyncio.run(open_and_stop())
    assert used == [thread, thread]


def test_the_health_of_a_dead_engine(talker):
    class Dead:
        slots = 1
        busy = True
        vocab_size = 260

        def step(self):
            raise RuntimeError

    async def statuses():
        engine: Any = Dead()
        thread = EngineThread(lambda: engine, 0)
        await thread.open()
        app = make_app(Service(thread, {"talker": Model(load_tokenizer(talker))}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            thread.join()
            await asyncio.sleep(0)
            asked = await client.post("/v1/completions", json={"model": "talker", "prompt": "a"})
            return (await client.get("/health")).status_code, asked.status_code

    assert asyncio.run(statuses()) == (503, 503)


def test_what_a_user_can_fix(talker, monkeypatch):
    def complaint(*options):
        with pytest.raises(UserError) as error:
            serve_command.main([str(option) for option in options])
        return str(error.value)

    model = ("--model", talker, "--port", 0)
    assert "nowhere" in complaint("--model", talker / "nowhere", "--port", 0)
    for key in ("", " ", " sesame", "sesame\n", "ses\x00ame", "\u00a0sesame"):
        assert "--api-key is empty, or has" in (said := complaint(*model, "--api-key", key)) and "ame" not in said
        # which cannot hold every character
        if "\x00" not in key:
            monkeypatch.setenv("MINORCA_API_KEY", key)
            assert "MINORCA_API_KEY is empty, or has" in (said := complaint(*model)) and "sesame" not in said
    monkeypatch.delenv("MINORCA_API_KEY")
    assert "--slots" in complaint(*model, "--slots", 0)
    assert "template mistral-v3 needs the control token [INST]" in complaint(*model, "--template", "mistral-v3")
    assert "8192 positions" in complaint(*model, "--max-length", 8193)
    assert "NAME=DIR" in complaint(*model, "--adapter", "a/x", "--adapter", "b/x")
    assert "NAME=DIR" in complaint(*model, "--adapter", "talker=b/x") and "b/x" in complaint(
        *model, "--adapter", "a=b/x"
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert str(port) in complaint("--model", talker, "--port", port)
    assert "no.such.host" in complaint("--model", talker, "--host", "no.such.host")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    assert "32 files and connections may be open; allow 64" in complaint(*model)


# --------------------------------------------------------------------------------------------------------------- random


def test_random_calls_get_an_answer_or_an_error(server):
    check_random_calls(server, 20)


@pytest.mark.slow
def test_many_random_calls_get_an_answer_or_an_error(server):
    check_random_calls(server, 1500)


def check_random_calls(server, examples: int) -> None:
    """Valid and invalid ones, which schemathesis generates from the OpenAPI description: never a 5xx."""
    import hypothesis
    import schemathesis
    from hypothesis import HealthCheck
    from schemathesis import GenerationMode

    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    statuses = set()
    for operation in schema.get_all_operations():
        if operation.ok().method != "post":
            continue

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            # Its metaclass hides from the checker that it is an enum.
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        )
        @hypothesis.given(case=operation.ok().as_strategy())
        def check(case):
            # So that valid ones are answered soon.
            if isinstance(case.body, dict):
                case.body = {k: v for k, v in case.body.items() if k != "max_completion_tokens"} | {"max_tokens": 2}
                case.body["model"] = "tiny" if isinstance(case.body.get("model"), str) else case.body.get("model")
                if type(case.body.get("n")) is int:
                    case.body["n"] = min(case.body["n"], 3)
            response = case.call()
            statuses.add(response.status_code)
            assert response.status_code < 500, (case.body, response.text)
            if response.status_code != 200:
                ErrorResponse.model_validate_json(response.content)

        check()
    assert statuses >= {200, 400}
