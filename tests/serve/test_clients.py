"""Structured answers and calls of tools through the libraries that applications use, of a model without training."""

import json
import signal
from typing import Any, Literal

import pydantic
import pytest

from tests.helpers import random_mistral, save_tokenizer
from tests.serve.test_serve import Server
from tests.serve.test_tools import HERMES

pytestmark = pytest.mark.slow

ASK: Any = [{"role": "user", "content": "Describe Paris."}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=8)
    country: Literal["France", "Norway"]
    millions: int = pydantic.Field(ge=0, le=40)


def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = random_mistral(vocab_size=260, max_position_embeddings=8192, initializer_range=0.02)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(HERMES)
    server = Server("--model", directory)
    yield f"{server.url}/v1"
    server.end(signal.SIGKILL)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(url, mode):
    instructor = pytest.importorskip("instructor")
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="-"), mode=instructor.Mode[mode])
    options: Any = {"model": "tiny", "messages": ASK, "max_tokens": 2000, "max_retries": 0}
    assert isinstance(client.chat.completions.create(response_model=City, **options), City)
    *_, last = client.chat.completions.create_partial(response_model=City, **options)
    City.model_validate(last.model_dump())


def test_langchain(url):
    langchain_openai = pytest.importorskip("langchain_openai")
    core = pytest.importorskip("langchain_core.messages")
    chat = langchain_openai.ChatOpenAI(model="tiny", base_url=url, api_key="-", max_tokens=2000)
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(City, method=method).invoke("Describe Paris."), City)
    messages: list = [core.HumanMessage("Is it raining?")]
    answer = chat.bind_tools([weather], tool_choice="weather").invoke(messages)
    results = [core.ToolMessage(weather(**call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls]
    assert results and "rain" in results[0].content
    assert chat.bind_tools([weather], tool_choice="none").invoke([*messages, answer, *results], max_tokens=8)
    whole = None
    for chunk in chat.bind_tools([weather], tool_choice="any").stream(messages):
        whole = chunk if whole is None else whole + chunk
    assert whole and weather(**whole.tool_calls[0]["args"])


def test_litellm(url):
    litellm = pytest.importorskip("litellm")
    options: Any = {"api_base": url, "api_key": "-", "messages": ASK, "max_tokens": 2000}
    answer = litellm.completion("hosted_vllm/tiny", response_format=City, **options)
    City.model_validate_json(answer.choices[0].message.content)
    options |= {"model": "openai/tiny", "tools": TOOLS, "tool_choice": "required"}
    whole = litellm.completion(**options).choices[0]
    joined = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **options))).choices[0]
    for choice in (whole, joined):
        assert choice.finish_reason == "tool_calls"
        assert all(weather(**json.loads(call.function.arguments)) for call in choice.message.tool_calls)


def test_llama_index(url):
    openai_like = pytest.importorskip("llama_index.llms.openai_like")
    tools = pytest.importorskip("llama_index.core.tools")
    options: Any = {"model": "tiny", "api_base": url, "api_key": "-", "max_tokens": 2000, "is_chat_model": True}
    model = openai_like.OpenAILike(is_function_calling_model=True, **options)
    assert isinstance(model.as_structured_llm(City).complete("Describe Paris.").raw, City)
    tool = tools.FunctionTool.from_defaults(fn=weather)
    answer = model.predict_and_call([tool], "Is it raining?", tool_choice="required", allow_parallel_tool_calls=True)
    assert "rain in" in answer.response
