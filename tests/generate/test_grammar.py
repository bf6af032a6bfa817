"""Constrained answers of an untrained model: they satisfy their schemas, whatever shares their batch."""

import contextlib
import json
import math
import re
from typing import Any

import jsonschema
import pytest
import torch

from minorca import UserError, load_model, load_tokenizer
from minorca.data.token_bytes import drops_first_space, token_bytes
from minorca.generate.engine import Engine
from minorca.generate.grammar import Grammar, answer_rules, choice_rule, json_rule, regex_rule
from minorca.generate.request import Request
from minorca.generate.sampling import Sampling
from tests.data.test_tokenizer import V1, V3, sentencepiece_directory
from tests.helpers import random_mistral, save_tokenizer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["red", "é€😀", 3, None, True, {"a": [1]}]},
    "nested": {
        "type": "object",
        "properties": {"from": POINT, "to": {"type": "object", "properties": {"at": POINT}, "required": ["at"]}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": POINT, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False, "minItems": 2},
    "numbers": {
        "type": "object",
        "properties": {
            "i": {"type": "integer", "minimum": -5, "maximum": 12},
            "f": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "m": {"type": "integer", "multipleOf": 7},
        },
        "required": ["i", "f", "m"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [POINT, {"type": "boolean"}, {"type": ["null", "integer"]}]},
    "references": {
        "$defs": {
            "point": POINT,
            "tree": {
                "type": "object",
                "properties": {
                    "at": {"$ref": "#/$defs/point"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["at", "children"],
                "additionalProperties": False,
            },
        },
        "$ref": "#/$defs/tree",
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]{4}$"},
    "length": {"type": "string", "minLength": 3, "maxLength": 6},
    "format": {"type": "string", "format": "date"},
    "optional": {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"type": "null"}, "c": {"enum": ["x"]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [POINT | {"additionalProperties": True}, {"properties": {"x": {"minimum": 3}}}],
        "maxProperties": 2,
    },
}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tok")
    save_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its vocabulary has ids that the tokenizer lacks."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    random_mistral(vocab_size=293, max_position_embeddings=1024, initializer_range=0.02).save_pretrained(directory)
    save_tokenizer(directory)
    return load_model(directory, torch.float32, "cpu")


def answers(model, tok, requests: list[Request], slots: int = 4) -> list[tuple[list[int], str | None]]:
    engine = Engine(model, slots)
    for request in requests:
        engine.add(request)
    found: dict[Request, tuple[list[int], str | None]] = {request: ([], None) for request in requests}
    while engine.busy:
        for token in engine.step():
            found[token.request] = ([*found[token.request][0], token.id], token.finish_reason)
    return list(found.values())


def sampled(tok, rule: str, seeds: int, **more) -> list[Request]:
    grammar = Grammar(tok, answer_rules(tok, rule))
    settings = [Sampling(temperature=1.0, seed=seed) for seed in range(seeds)]
    return [Request([1, 2], 900, sampling, tok.stop_ids, grammar=grammar, **more) for sampling in settings]


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_satisfy_their_schema(name, model, tok):
    schema = SCHEMAS[name]
    complete = 0
    for ids, reason in answers(model, tok, sampled(tok, json_rule(schema), 6)):
        assert ids[-1] in tok.stop_ids if reason == "stop" else len(ids) == 900
        if reason == "stop":
            complete += 1
            jsonschema.validate(json.loads(tok.decode(ids)), schema, format_checker=jsonschema.FormatChecker())
    assert complete >= 5


@pytest.mark.parametrize("schema", [True, {"type": "object"}, SCHEMAS["nested"]])
def test_whitespace_ends(schema, tok):
    """Of JSON as it is printed, with and without indentation: no blank may follow another for ever."""
    rules = answer_rules(tok, json_rule(schema))

    def takes(text: str) -> bool:
        state = Grammar(tok, rules).start()
        return all(state.consume(token) for token in tok.encode(text))

    point = {"x": 1, "y": -0.5}
    value = {"from": point, "to": {"at": point}}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        assert takes(text)
    for blank in ("  ", "\n\n", "\t", " \n", "\n" + " " * 33):
        assert not takes("{" + blank)
    assert takes('{\n  "from": {"x": 1, "y": 2 }')


def test_expressions_and_choices(model, tok):
    expression = r"(a/b|\d{2}\\/|\n)x?"
    texts = ["yes", 'n"o\\', "é\n€", "y"]
    for ids, _ in answers(model, tok, sampled(tok, regex_rule(expression), 8)):
        assert re.fullmatch(expression, tok.decode(ids))
    found = {tok.decode(ids) for ids, _ in answers(model, tok, sampled(tok, choice_rule(texts), 24))}
    assert found <= set(texts) and len(found) > 2


def test_others_in_the_batch_are_as_without(model, tok):
    """Free answers beside constrained ones, their log-probabilities, and constrained ones alone or together."""

    def free():
        return [Request([1, 2, 3], 40, Sampling(temperature=1.0, seed=s), logprobs=2) for s in range(3)]

    alone = answers(model, tok, free())
    constrained = sampled(tok, json_rule(SCHEMAS["numbers"]), 3)
    expected = [answers(model, tok, [request])[0] for request in sampled(tok, json_rule(SCHEMAS["numbers"]), 3)]
    mixed = [request for pair in zip(free(), constrained) for request in pair]
    both = answers(model, tok, mixed)
    assert both[::2] == alone and both[1::2] == expected


def test_a_slot_is_free_after_a_constrained_sequence(model, tok):
    """While another one is constrained: whatever may come next in one slot is not a question of its last sequence."""
    free = Request([1, 2, 3], 20, Sampling(temperature=1.0, seed=0))
    [(alone, _)] = answers(model, tok, [free])
    short = sampled(tok, choice_rule(["a"]), 1)[0]
    long = sampled(tok, regex_rule("[a-z]{60}"), 1)[0]
    (_, ended), (_, _), (beside, _) = answers(model, tok, [short, long, free], slots=2)
    assert ended == "stop" and beside == alone


def test_log_probabilities_are_the_models_own(model, tok):
    """Those of the first token are the same with and without a grammar."""

    def first(request):
        engine = Engine(model, 2)
        engine.add(request)
        return next(token for _ in iter(int, 1) for token in engine.step())

    (constrained,) = sampled(tok, json_rule({"type": "integer"}), 1, logprobs=293)
    with_grammar = first(constrained)
    without = first(Request([1, 2], 4, logprobs=293))
    assert with_grammar.top and without.top and dict(with_grammar.top) == dict(without.top)
    assert with_grammar.logprob == dict(without.top)[with_grammar.id]


def test_an_answer_that_reaches_a_limit_of_the_library_ends_alone(model, tok):
    """So many alternatives that the second step is refused; the sequence beside it goes on."""
    rule = json_rule({"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(1500)]})
    limited = sampled(tok, rule, 1)[0]
    beside = Request([1, 2], 20)
    (ids, reason), (others, _) = answers(model, tok, [limited, beside])
    assert reason == "stop" and len(ids) < 20 == len(others)


INVALID = {
    "an unknown type": {"type": "objekt"},
    "a missing reference": {"$ref": "#/$defs/nowhere"},
    "a remote reference": {"$ref": "http://example.com/schema.json"},
    "an unsupported keyword": {"type": "array", "uniqueItems": True},
    "look-ahead": {"type": "string", "pattern": "(?=a)b"},
    "nothing": {"type": "integer", "minimum": 5, "maximum": 3},
    "itself": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    "too long": {"enum": ["x" * 70_000]},
    "a large multiple": {"type": "integer", "multipleOf": 99_999_989},
    "many multiples": {"anyOf": [{"type": "number", "multipleOf": 0.9973 + i / 5000} for i in range(40)]},
    "a product": {
        "allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]
    },
    "a number": 5,
}


@pytest.mark.parametrize("name", INVALID)
def test_schemas_that_cannot_be_compiled(name, tok):
    with pytest.raises(UserError):
        Grammar(tok, answer_rules(tok, json_rule(INVALID[name])))


def test_schemas_nested_as_deep_as_fits(tok):
    """Chains of references, which llguidance follows recursively: compiled or refused, but alive."""
    for link in ('{"$ref":"#/$defs/%x"}', '{"items":{"$ref":"#/$defs/%x"}}', '{"allOf":[{"$ref":"#/$defs/%x"}]}'):
        count = 60_000 // (len(link) + 12)
        chain = ",".join(f'"{i:x}":{link % (i + 1)}' for i in range(count))
        rule = json_rule(json.loads(f'{{"$ref":"#/$defs/0","$defs":{{{chain},"{count:x}":{{"type":"integer"}}}}}}'))
        assert Grammar(tok, answer_rules(tok, rule)).start()
    nested: dict = {"type": "integer"}
    for _ in range(300):
        nested = {"items": nested}
    with pytest.raises(UserError):
        Grammar(tok, answer_rules(tok, json_rule(nested)))


@pytest.mark.parametrize("source", [V1, V3])
def test_bytes_of_sentencepiece(source, tmp_path):
    """Those of a text's ids are its bytes, with the space that the tokenizer puts before it."""
    tok = load_tokenizer(sentencepiece_directory(tmp_path, source, f"tokenizer.model{source.suffix}"))
    pieces = token_bytes(tok)
    for text in ('{"a": [1, 2]}', "é€😀 \n\t日本  x", " padded"):
        assert b"".join(pieces[i] for i in tok.encode(text)) == b" " + text.encode()
    assert drops_first_space(tok) and not any(pieces[i] for i in tok.control_ids.values())
    state = Grammar(tok, answer_rules(tok, json_rule({"const": [1]}))).start()
    mask_W = torch.zeros(-(-tok.vocab_size // 32), dtype=torch.int32)
    for token in tok.encode("[1]"):
        state.fill(mask_W)
        assert mask_W[token // 32] >> token % 32 & 1 and state.consume(token)
    state.fill(mask_W)
    assert [i for i in range(tok.vocab_size) if mask_W[i // 32] >> i % 32 & 1] == [tok.eos_id]


def test_bytes_of_byte_level_tokens(tok):
    for text in ("é€😀 \n\t日本", "<|im_end|>"):
        assert b"".join(token_bytes(tok)[i] for i in tok.encode(text)) == text.encode()
    assert not drops_first_space(tok)


def test_a_tokenizer_whose_tokens_have_no_bytes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="have no bytes of their own"):
        token_bytes(load_tokenizer(tmp_path))


def test_values_that_are_no_schema(tok):
    """They are refused, or mean nothing; none is a fault of ours."""
    nested: dict = {}
    for _ in range(900):
        nested = {"items": nested}
    huge = 7**5087
    multiples = [{"multipleOf": value} for value in (True, "7", [], 0, -3, math.inf, math.nan, huge, 1e308, 5e-324)]
    patterns = [{"type": "string", "pattern": pattern} for pattern in ("\\", "a/b\n", "\ud800", "(" * 500, "[z-a]", "")]
    others = [
        {"x-guidance": 5},
        {"enum": [nested]},
        {"maxLength": huge},
        {"$ref": "\ud800"},
        {"properties": 3},
        [],
        None,
    ]
    for schema in [nested, *multiples, *patterns, *others]:
        with contextlib.suppress(UserError):
            assert Grammar(tok, answer_rules(tok, json_rule(schema))).start()
    for expression in ("\\", "/", "a\nb", "", "//", "é/\\/", "[/]", "\ud800", "(", "a)|(b", "x" * 70_000):
        with contextlib.suppress(UserError):
            assert Grammar(tok, answer_rules(tok, regex_rule(expression))).start()
    for texts in (["\ud800"], [""], ['"\\', "\x00\n"], ["a"] * 1000):
        with contextlib.suppress(UserError):
            assert Grammar(tok, answer_rules(tok, choice_rule(texts))).start()
