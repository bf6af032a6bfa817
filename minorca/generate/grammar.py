"""Answers that follow a grammar: what each next token may be, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is text in llguidance's variant of Lark, in which `%json {...}` is a JSON schema. It is compiled once for a
request; each of its sequences has a state of its own, on the host.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from minorca.data.token_bytes import drops_first_space, token_bytes
from minorca.data.tokenizer import Tokenizer
from minorca.data.tokenizer_files import SURROGATE
from minorca.errors import UserError, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

# Of one schema or expression, and of a grammar with all of its schemas. llguidance takes time quadratic in some.
MAX_SCHEMA_CHARACTERS = 2**16
MAX_GRAMMAR_CHARACTERS = 2**18
# In sum over a schema, without factors of 2 and 5: llguidance has a state for each remainder.
MAX_MULTIPLES = 20_000
# What may stand between two parts of JSON: a space, or a line's indentation. JSON allows any number of both, and small
# models write them until the answer's last token.
WHITESPACE = r"[ ]|\n[ ]{0,32}"
# llguidance follows references recursively, at up to 8 KB of the stack for each of the thousands that fit in a schema.
_STACK_BYTES = 2**28
_stack_lock = threading.Lock()


class Constraint:
    """How far one sequence has followed its grammar."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher

    def fill(self, mask_W: Tensor) -> None:
        """Sets the bits of the ids that may come next: after a complete text only the tokenizer's stop ids.

        Where llguidance has reached one of its limits these are the stop ids too.

        Args:
            mask_W: [W] int32 on the CPU, 32 ids each, the lowest in the lowest bit.
        """
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        # Either may have more ids: the model's padding, or tokens that the model has no row for.
        shared = min(len(words), len(mask_W))
        mask_W[:shared] = words[:shared]
        mask_W[shared:] = 0

    def consume(self, token: int) -> bool:
        """Takes the next id, other than a stop id; False if it may not come next, so that the text has ended."""
        return self._matcher.consume_token(token)


class Grammar:
    """A compiled grammar, of which every sequence gets its own state.

    Args:
        tok: the tokenizer of the answers.
        rules: in llguidance's Lark; `start` is the whole answer.

    Raises:
        UserError: llguidance is not installed or cannot compile the rules, no text follows them, or `tok` has tokens
            without bytes of their own or no id that ends an answer.
    """

    def __init__(self, tok: Tokenizer, rules: str):
        if len(rules) > MAX_GRAMMAR_CHARACTERS:
            raise UserError(f"has {len(rules)} characters; expected at most {MAX_GRAMMAR_CHARACTERS}")
        # A text that is forced may be tokenized as the model likes.
        source = '%llguidance {"no_forcing": true}\n' + rules
        self._matcher = _on_large_stack(lambda: _compile(_vocabulary(tok), source))

    def start(self) -> Constraint:
        """The state of a sequence that has not begun."""
        return Constraint(self._matcher.deep_copy())


def json_rule(schema: object) -> str:
    """The right side of a rule for JSON text that satisfies a schema, with whitespace as `WHITESPACE` says.

    Raises:
        UserError: a schema that is too long, or whose numbers take too long to be compiled.
    """
    if sum(map(_odd_factor, _multiples(schema))) > MAX_MULTIPLES:
        raise UserError(f"has multipleOf of over {MAX_MULTIPLES} in all, after factors of 2 and 5")
    try:
        _bounded(json.dumps(schema, separators=(",", ":")))
    except RecursionError:
        raise UserError("is nested too deep") from None
    if schema is True:
        schema = {}
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}} | schema
    return "%json " + json.dumps(schema)


def text_rule(text: str) -> str:
    """The right side of a rule for this text."""
    # Lark's escapes are JSON's.
    return json.dumps(text)


def regex_rule(expression: str) -> str:
    """The right side of a rule for text that a regular expression, in the syntax of Rust's `regex`, matches as a whole.

    Raises:
        UserError: an expression that is too long.
    """
    escaped = re.sub(r"\\.|/", lambda match: "\\/" if match[0] == "/" else match[0], _bounded(expression), flags=re.S)
    return f"/(?:{escaped})/"


def answer_rules(tok: Tokenizer, rule: str) -> str:
    """The rules of an answer that is as `rule` says; `tok` may put a space before it, which decoding drops."""
    return f"start: {optional_space(tok)}answer\nanswer: {rule}\n"


def optional_space(tok: Tokenizer) -> str:
    """What rules have where a text begins, before which `tok` may put a space."""
    return '" "? ' if drops_first_space(tok) else ""


def choice_rule(texts: Sequence[str]) -> str:
    """The right side of a rule for one of these texts."""
    return " | ".join(map(text_rule, texts))


def _multiples(schema: Any) -> Iterator[float]:
    """Every number that a schema has as `multipleOf`."""
    values: list[Any] = [schema]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
            multiple: Any = value.get("multipleOf")
            # Not isinstance: a bool is an int.
            if type(multiple) in (int, float) and abs(multiple) < math.inf:
                yield multiple
        elif isinstance(value, list):
            values += value


def _odd_factor(value: float) -> int:
    """The digits of a number as an integer, without its factors of 2 and 5."""
    _, digits, _ = Decimal(str(value)).as_tuple()
    factor = int("".join(map(str, digits)))
    for prime in (2, 5):
        while factor and factor % prime == 0:
            factor //= prime
    return factor


def _bounded(text: str) -> str:
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise UserError(f"has {len(text)} characters; expected at most {MAX_SCHEMA_CHARACTERS}")
    if SURROGATE.search(text):
        raise UserError("has an unpaired surrogate, which is not valid Unicode")
    return text


def _compile(vocabulary: "LLTokenizer", source: str) -> "LLMatcher":
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, source, log_level=0)
    # Its first step too may reach a limit.
    matcher.compute_bitmask()
    if matcher.is_error():
        problem = matcher.get_error().partition("\n<state>")[0].partition("\n   1 |")[0]
        raise UserError(f"cannot be compiled to a grammar: {one_line(problem)[:500]}")
    if matcher.is_stopped() and not matcher.is_accepting():
        raise UserError("is satisfied by no text")
    return matcher


@lru_cache(maxsize=8)
def _vocabulary(tok: Tokenizer) -> "LLTokenizer":
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise UserError("needs llguidance, which is not installed here: pip install llguidance") from None
    if not tok.stop_ids:
        raise UserError("needs a token that ends an answer, which the model's tokenizer lacks", path=tok.path)
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tok)), eos_token=sorted(tok.stop_ids))


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tok: Tokenizer):
        names = {i: name for name, i in tok.control_ids.items()}
        self.tokens = [piece or names.get(i, "").encode() for i, piece in enumerate(token_bytes(tok))]
        self.special_token_ids = sorted(i for i in names.keys() | tok.stop_ids)
        self.eos_token_id = min(tok.stop_ids)
        self.bos_token_id = tok.bos_id
        self._ids = {piece: i for i, piece in enumerate(self.tokens) if len(piece) == 1}

    def __call__(self, text: bytes) -> list[int]:
        """Ids of forced text, byte by byte: they are only asked for in traces, since nothing is forced."""
        return [self._ids[byte] for byte in (text[i : i + 1] for i in range(len(text))) if byte in self._ids]


def _on_large_stack(function: Callable[[], T]) -> T:
    """Calls a function in a thread with a stack of `_STACK_BYTES`, of which only what it uses takes memory."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        # Panics of Rust derive from it alone.
        except BaseException as error:
            future.set_exception(error)

    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return future.result()
