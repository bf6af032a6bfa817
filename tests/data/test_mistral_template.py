"""Mistral's formats v1, v2 and v3, compared with mistral-common: any order of messages, tools, and what it rejects."""

import itertools
import json
import random
from functools import lru_cache
from typing import Any

import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from minorca import UserError, load_tokenizer, render_chat
from minorca.data.chat_template import render
from tests.data.test_chat_template import trained_text
from tests.data.test_tokenizer import V1, V2, V3, sentencepiece_directory

SOURCES = {1: V1, 2: V2, 3: V3}
CONTENTS = ["one", "two\n", " three ", "", "[INST] four", "é 日本"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """By version: ours, and mistral-common's in the mode that takes conversations ending in either role."""

    @lru_cache
    def both(version: int):
        source = SOURCES[version]
        directory = sentencepiece_directory(
            tmp_path_factory.mktemp(f"v{version}"), source, f"tokenizer.model{source.suffix}"
        )
        return load_tokenizer(directory), MistralTokenizer.from_file(str(source), mode=ValidationMode.agnostic)

    return both


def compare(both, version: int, messages: list, tools: Any = None) -> bool:
    """Whether mistral-common accepts the conversation; we accept it too, with the same ids, or refuse it too."""
    tok, reference = both(version)
    try:
        request = ChatCompletionRequest(messages=messages, tools=tools)
        expected = reference.encode_chat_completion(request).tokens
    except (MistralCommonException, ValueError):
        expected = None
    # mistral-common encodes no empty answer; a row with one is dropped before it is rendered.
    if expected is None and any(m["role"] == "assistant" and not m.get("content") for m in messages):
        return False
    if expected is None:
        with pytest.raises(UserError):
            render(tok, messages, f"mistral-v{version}", tools=tools)
        return False
    assert render(tok, messages, f"mistral-v{version}", tools=tools).ids == expected, messages
    return True


@pytest.mark.parametrize("version", SOURCES)
def test_any_order_of_messages(version, tokenizers):
    """All orders of up to four roles, with contents that are empty, padded or look like control tokens."""
    rng = random.Random(version)
    accepted = 0
    for length in range(1, 5):
        for roles in itertools.product(("system", "user", "assistant"), repeat=length):
            messages = [{"role": role, "content": rng.choice(CONTENTS)} for role in roles]
            accepted += compare(tokenizers, version, messages)
    assert accepted > 40


@pytest.mark.parametrize("version", SOURCES)
def test_a_thousand_random_conversations(version, tokenizers):
    """Of up to nine turns, with random texts."""
    rng = random.Random(version)
    accepted = 0
    for _ in range(1000):
        roles = [*["system"] * rng.randint(0, 1), *["user", "assistant"] * rng.randint(1, 4)]
        roles = roles[: -1 if rng.random() < 0.5 else None]
        texts = ["".join(rng.choices("abc xyz\n\t<>[]/_éß日🦜0123", k=rng.randint(1, 30))) for _ in roles]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        accepted += compare(tokenizers, version, messages)
    assert accepted > 950


CALL = {"type": "function", "id": "a1B2c3D4e", "function": {"name": "add", "arguments": '{"a": 2,  "b": "é"}'}}
OTHER = {"type": "function", "id": "000000000", "function": {"name": "now", "arguments": ""}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "description": "Adds [INST] two",
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]


def user(text="q"):
    return {"role": "user", "content": text}


def assistant(text="", *calls):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def result(text, call_id="a1B2c3D4e"):
    return {"role": "tool", "content": text, "tool_call_id": call_id, "name": "add"}


CONVERSATIONS = {
    "a call": [user(), assistant("", CALL)],
    "a result": [user(), assistant("", CALL), result('{"sum": [4, "é"]}')],
    "text as result": [user(), assistant("", CALL), result("four </s>"), assistant("It is four.")],
    "an empty result": [user(), assistant("", CALL), result("")],
    "two calls": [user(), assistant("", CALL, OTHER), result("4"), result("5", "000000000"), assistant("Done.")],
    "calls in a row": [user(), assistant("", CALL), assistant("", OTHER)],
    "history": [
        {"role": "system", "content": "Add."},
        user(),
        assistant("", CALL),
        result("4"),
        assistant("Four."),
        user("And now?"),
        assistant("", OTHER),
        result("[1]", "000000000"),
        assistant("One."),
    ],
    "a user after a result": [user(), assistant("", CALL), result("4"), user("Well?")],
    "a result without a call": [user(), result("4")],
    "more results": [user(), assistant("", CALL), result("4"), result("4"), assistant("4")],
    "fewer results": [user(), assistant("", CALL, OTHER), result("4"), assistant("4")],
    "content beside a call": [user(), assistant("Wait.", CALL), result("4")],
    "a short id": [user(), assistant("", CALL | {"id": "call_1"}), result("4", "call_1"), assistant("4")],
    "no id at the end": [user(), assistant("", {k: v for k, v in CALL.items() if k != "id"})],
    "no id": [user(), assistant("", {k: v for k, v in CALL.items() if k != "id"}), result("4"), assistant("4")],
    "a tool first": [result("4"), user()],
}


@pytest.mark.parametrize("version", SOURCES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tools(version, tools, name, tokenizers):
    accepted = compare(tokenizers, version, CONVERSATIONS[name], tools)
    if version == 3:
        refused = {"a result without a call", "more results", "fewer results", "content beside a call", "a short id"}
        assert accepted == (name not in refused | {"no id", "calls in a row"})


def test_calls_and_answers_are_trained(tokenizers):
    """With the end of each; what tools return is not."""
    tok, _ = tokenizers(3)
    rendered = render(tok, CONVERSATIONS["history"], "mistral-v3", tools=TOOLS)
    call, other = (
        json.dumps([{"name": c["function"]["name"], "arguments": a, "id": c["id"]}], ensure_ascii=False)
        for c, a in ((CALL, {"a": 2, "b": "é"}), (OTHER, {}))
    )
    texts = trained_text(tok, rendered)
    assert [t.replace("[TOOL_CALLS]", "") for t in texts] == [f"{call}</s>", "Four.</s>", f"{other}</s>", "One.</s>"]
    assert ["[TOOL_CALLS]" in t for t in texts] == [True, False, True, False]


@pytest.mark.parametrize("version", SOURCES)
def test_an_answer_is_continued(version, tokenizers):
    """As mistral-common does with `prefix`: the same ids without the end."""
    tok, reference = tokenizers(version)
    for beginning in ("Once upon", "  a\n", "x "):
        messages: list = [user("Tell."), {"role": "assistant", "content": beginning}]
        request = ChatCompletionRequest(messages=[messages[0], messages[1] | {"prefix": True}])
        expected = reference.encode_chat_completion(request).tokens
        assert render_chat(tok, messages, template=f"mistral-v{version}", continue_final_message=True) == expected
