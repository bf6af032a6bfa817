"""Structured answers and calls of tools, as OpenAI's client sees them, of models that were not trained for either."""

import contextlib
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from minorca import UserError, load_tokenizer
from minorca.data.visible_text import visible_text
from minorca.generate.grammar import Grammar, json_rule
from minorca.serve.call_reader import CallReader
from minorca.serve.protocol import ChatRequest
from minorca.serve.tool_form import ToolForm, tool_form
from minorca.serve.tools import MODES, NamedTool, Tool, tool_rules
from tests.data.test_tokenizer import V3, sentencepiece_directory
from tests.helpers import random_mistral, save_tokenizer
from tests.serve.test_serve import Server

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_CALLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
FORMS = {
    "hermes": ToolForm(
        "<tool_call>",
        '<tool_call>\n{"name": "',
        '", "arguments": ',
        '}\n</tool_call>\n<tool_call>\n{"name": "',
        "}\n</tool_call>",
    ),
    "mistral": ToolForm("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "', '", "arguments": ', '}, {"name": "', "}]"),
}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Ålesund"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "weather_now", "description": "", "parameters": PLACE, "strict": True}},
    {"type": "function", "function": {"name": "clock"}},
]
PARAMETERS = {"weather": PLACE, "weather_now": PLACE, "clock": {"type": "object", "maxProperties": 0}}
ASK: Any = [{"role": "user", "content": "hi"}]


def save_model(directory, vocab_size: int) -> None:
    model = random_mistral(vocab_size=vocab_size, max_position_embeddings=4096, initializer_range=0.02)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models without training, by the form of their calls; "plain" has none."""
    path = tmp_path_factory.mktemp("models")
    for name, template in (("hermes", HERMES), ("plain", None), ("odd", NO_CALLS)):
        save_model(path / name, 260)
        save_tokenizer(path / name)
        if template:
            (path / name / "chat_template.jinja").write_text(template)
    save_model(path / "mistral", 32768)
    sentencepiece_directory(path / "mistral", V3, "tokenizer.model.v3")
    return path


@pytest.fixture(scope="module")
def clients(models):
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        starting = {name: pool.submit(Server, "--model", models / name) for name in ("hermes", "plain", "mistral")}
        servers = {name: future.result() for name, future in starting.items()}
        for server in servers.values():
            stack.callback(server.end, signal.SIGKILL)
        yield {name: server.client() for name, server in servers.items()}


def ask(client, name: str, **fields) -> Any:
    return client.chat.completions.create(**{"model": name, "messages": ASK, "max_tokens": 300} | fields)


def rebuilt(chunks) -> tuple[str, list[dict], str | None]:
    """The content, the calls and the finish reason that a stream's pieces add up to."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                assert delta.id and delta.type == "function" and delta.function.name
                calls.append({"name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments
    return content, calls, reason


# ------------------------------------------------------------------------------------------------- structured answers


class Leaf(pydantic.BaseModel):
    kind: Literal["leaf"]
    size: int = pydantic.Field(ge=0, lt=100)


class Tree(pydantic.BaseModel):
    color: Literal["red", "grün"]
    children: list[Leaf] = pydantic.Field(max_length=3)
    parent: Leaf | None


@pytest.mark.parametrize("name", ["plain", "mistral"])
def test_a_pydantic_model_is_parsed(clients, name):
    for seed in range(4):
        parsed = clients[name].chat.completions.parse(
            model=name, messages=ASK, response_format=Tree, seed=seed, max_tokens=1500
        )
        assert isinstance(parsed.choices[0].message.parsed, Tree) and parsed.choices[0].finish_reason == "stop"


def test_choices_and_streams(clients):
    """Each choice follows the schema for itself, and a stream has the same text."""
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    asked = {"response_format": schema, "seed": 5, "max_tokens": 1000}
    answer = ask(clients["plain"], "plain", n=3, **asked)
    contents = [choice.message.content for choice in answer.choices]
    for content in contents:
        jsonschema.validate(json.loads(content), PLACE)
    assert rebuilt(ask(clients["plain"], "plain", stream=True, **asked)) == (contents[0], [], "stop")


def test_other_forms(clients):
    client = clients["plain"]
    content = ask(client, "plain", response_format={"type": "json_object"}, max_tokens=8).choices[0].message.content
    assert content.startswith("{")
    for form, expected in (
        ({"choice": ["yes", "no"]}, ("yes", "no")),
        ({"regex": "ab?c/"}, ("ac/", "abc/")),
        ({"json": {"const": "é"}}, ('"é"',)),
    ):
        assert ask(client, "plain", extra_body={"structured_outputs": form}).choices[0].message.content in expected
    completed = client.completions.create(
        model="plain", prompt="a", extra_body={"structured_outputs": {"choice": ["é", "x"]}}
    )
    assert completed.choices[0].text in ("é", "x")


def test_what_cannot_be_compiled_names_its_field(clients):
    def refused(name="plain", **fields):
        with pytest.raises(openai.BadRequestError) as error:
            ask(clients[name], name, **fields)
        return error.value.param

    for schema in ({"type": "objekt"}, {"$ref": "#/a"}, {"not": {}}, {"enum": ["x" * 70_000]}, {"multipleOf": 1999993}):
        form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert refused(response_format=form) == "response_format"
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "objekt"}}}}}]
    assert refused("hermes", tools=bad) == "tools"
    strict = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}]
    assert refused("hermes", tools=strict) == "tools"
    assert refused("plain", tools=TOOLS) == "tools"
    assert refused("hermes", tools=[*TOOLS, TOOLS[0]]) == "tools"
    deep = '{"a":' * 500 + "1" + "}" * 500
    # The last has an id that Mistral's templates do not take.
    for name, arguments in (("hermes", "[1]"), ("hermes", "{"), ("hermes", deep), ("mistral", "{}")):
        call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        sent = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
        result = {"role": "tool", "tool_call_id": "a", "content": "-3"}
        assert refused(name, messages=[*sent, result], tools=TOOLS) == "messages"
    unknown = {"type": "function", "function": {"name": "nothing"}}
    assert refused("hermes", tools=TOOLS, tool_choice=unknown) == "tool_choice"


# -------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_read_from_templates(models, name):
    tok = load_tokenizer(models / name)
    assert tool_form(tok, "auto") == FORMS[name]


def test_models_without_a_form_of_calls(models):
    for name, problem in (("plain", "writes no tools"), ("odd", "in a form that is not supported")):
        with pytest.raises(UserError, match=problem):
            tool_form(load_tokenizer(models / name), "auto")


FIRST, SECOND, THIRD = '{"city": "Paris", "days": 3}', '{ "city": "Ålesund" ,"days":7}', "{}"
# Of calls to weather, weather_now and clock.
CALLS = {
    "one": [("weather", FIRST)],
    "two": [("weather_now", SECOND), ("clock", THIRD)],
    "another schema": [("clock", FIRST)],
    "another name": [("weather_then", FIRST)],
    "a wrong value": [("weather", '{"city": "Rome", "days": 3}')],
}
# The answers that each choice allows: calls by name, and texts.
ALLOWED = {
    "auto": {"one", "two", "text"},
    "required": {"one", "two"},
    "weather": {"one"},
    "none": {"text"},
    "auto, one": {"one", "text"},
    "auto, in a form": {"one", "two", "json"},
    "none, in a form": {"json"},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("case", ALLOWED)
def test_what_a_grammar_allows(models, name, case):
    tok, form = load_tokenizer(models / name), FORMS[name]
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    mode = case.partition(",")[0]
    choice: Any = mode if mode in MODES else NamedTool.model_validate({"type": "function", "function": {"name": mode}})
    answer = json_rule({"type": "array"}) if "form" in case else None
    grammar = Grammar(tok, tool_rules(tok, form, tools, choice, "one" not in case, answer))
    texts = {"text": "What < is {it}?\n", "json": "[1, 2]"}
    for key, calls in CALLS.items():
        texts[key] = form.start + form.between.join(form.middle.join(call) for call in calls) + form.end
    found = {key for key, text in texts.items() if allows(tok, grammar, text)}
    # JSON is text too.
    assert found - ({"json"} if "text" in found else set()) == ALLOWED[case]
    # Text before a call: where the call begins with text too.
    assert allows(tok, grammar, f"Well. {texts['one']}") == (case in ("auto", "auto, one") and name == "hermes")
    if name == "hermes" and mode == "auto" and answer is None:
        assert not allows(tok, grammar, texts["another schema"]) and not allows(tok, grammar, "<tool_call>")


def allows(tok, grammar: Grammar, text: str) -> bool:
    """Whether a text may be generated, and the answer then end."""
    state = grammar.start()
    mask_W = torch.zeros(-(-tok.vocab_size // 32), dtype=torch.int32)
    for token in [*tok.encode_template(text), tok.eos_id]:
        state.fill(mask_W)
        if not mask_W[token // 32] >> token % 32 & 1:
            return False
        state.consume(token)
    return True


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_calls_that_must_be_made(clients, name, choice):
    """Their arguments satisfy the tools' schemas; a stream's pieces are the whole."""
    fields: Any = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 1500}
    if choice == "weather":
        fields["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    for seed in range(4):
        choice_made = ask(clients[name], name, seed=seed, parallel_tool_calls=seed % 2 == 0, **fields).choices[0]
        message, calls = choice_made.message, choice_made.message.tool_calls
        assert message.content is None and choice_made.finish_reason == "tool_calls"
        assert seed % 2 == 0 or len(calls) == 1
        for call in calls:
            assert call.function.name == "weather" or choice == "required"
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS[call.function.name])
            assert call.id.isalnum() and len(call.id) == 9
        written = [{"name": call.function.name, "arguments": call.function.arguments} for call in calls]
        fields["parallel_tool_calls"] = seed % 2 == 0
        streamed = ask(clients[name], name, seed=seed, stream=True, **fields)
        assert rebuilt(streamed) == ("", written, "tool_calls")
        del fields["parallel_tool_calls"]
    # Sent back as they are, with a result for each.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "17 °C"} for call in calls]
    again = [*ASK, message.model_dump(), *results]
    assert ask(clients[name], name, messages=again, tools=TOOLS, tool_choice="none", max_tokens=3).choices[0].message


def test_calls_are_optional(clients):
    """An untrained model writes text; nothing that it may not write comes with tool_choice none."""
    for choice in ("auto", "none"):
        answer = ask(clients["hermes"], "hermes", tools=TOOLS, tool_choice=choice, max_tokens=40, n=4)
        for made in answer.choices:
            assert made.message.tool_calls is None and isinstance(made.message.content, str)


def test_a_call_ends_with_the_limit(clients):
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60, "seed": 0}
    made = ask(clients["hermes"], "hermes", **fields).choices[0]
    content, calls, reason = rebuilt(ask(clients["hermes"], "hermes", stream=True, **fields))
    assert made.finish_reason == reason == "length" and not content
    assert [call.function.arguments for call in made.message.tool_calls or ()] == [c["arguments"] for c in calls]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_text_before_calls_is_content(models, pieces):
    """Read in pieces of any size: white space before a call belongs to neither, other tags are text."""
    tok = load_tokenizer(models / "hermes")
    form = FORMS["hermes"]
    quoted = json.dumps({"a": '}\n</tool_call>"\\', "b": [{}]})
    text = f"One <tool> <tool_c\n\n{form.start}f{form.middle}{quoted}{form.between}g{form.middle}{{}}{form.end}"
    reader = CallReader(tok, form)
    content, deltas = "", []
    parts = [text[i : i + pieces] for i in range(0, len(text), pieces)]
    for n, part in enumerate(parts):
        content += reader.push(0, part, n == len(parts) - 1)
        deltas += reader.take_deltas()
    assert content == "One <tool> <tool_c" and reader.is_complete
    assert [(call.name, call.arguments) for call in reader.calls] == [("f", quoted), ("g", "{}")]
    streamed = ["".join(d["function"]["arguments"] for d in deltas if d["index"] == i) for i in range(2)]
    assert streamed == [quoted, "{}"]
    reader = CallReader(tok, form)
    assert "".join(reader.push(0, letter, letter == "!") for letter in "a \n<tool_cal !") == "a \n<tool_cal !"
    assert not reader.is_complete


# ------------------------------------------------------------------------------------------------------- conversations


def conversation(contents) -> list[dict]:
    """As OpenAI's clients send it."""
    call = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ålesund"}'}}
    other = {"id": "000000000", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    return [
        {"role": "user", "content": contents[0]},
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": contents[1]},
        {"role": "tool", "tool_call_id": "000000000", "content": [{"type": "text", "text": "12:30"}]},
        {"role": "assistant", "content": "Cold."},
        {"role": "user", "content": "And now?"},
    ]


def prompt_of(tok, messages, tools=TOOLS) -> list[int]:
    body = ChatRequest.model_validate({"model": "a", "messages": messages, "tools": tools})
    (ids,) = body.encode_prompts(tok, "auto", 4096)
    return ids


def test_prompts_are_mistral_commons(models):
    tok = load_tokenizer(models / "mistral")
    reference = MistralTokenizer.from_file(str(V3), mode=ValidationMode.serving)
    messages = conversation(["Where is it cold?", '{"degrees": -3}'])
    tools = [{"type": "function", "function": {"description": ""} | tool["function"]} for tool in TOOLS]
    tools[2]["function"]["parameters"] = {"type": "object", "properties": {}}
    for m in (messages, messages[:4], messages[:1]):
        plain = [x | {"content": "12:30"} if isinstance(x.get("content"), list) else x for x in m]
        request = ChatCompletionRequest.model_validate({"model": "a", "messages": plain, "tools": tools})
        assert prompt_of(tok, m) == reference.encode_chat_completion(request).tokens


def test_prompts_are_transformers(models):
    tok, reference = load_tokenizer(models / "hermes"), AutoTokenizer.from_pretrained(models / "hermes")
    messages = conversation(["Where <|im_end|>?", "-3 °C"])
    parsed = json.loads(json.dumps(messages).replace('"content": null', '"content": ""'))
    parsed[3]["content"] = "12:30"
    for call in parsed[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    none = {"parameters": {"type": "object", "properties": {}}}
    functions = [none | {k: v for k, v in tool["function"].items() if k != "strict"} for tool in TOOLS]
    tools = [
        {"type": "function", "function": {key: f[key] for key in ("name", "description", "parameters") if key in f}}
        for f in functions
    ]
    for m in (6, 4, 1):
        expected = reference.apply_chat_template(parsed[:m], tools=tools, tokenize=False, add_generation_prompt=True)
        assert visible_text(tok, prompt_of(tok, messages[:m])).replace("\\", "") == expected.replace("\\", "")
