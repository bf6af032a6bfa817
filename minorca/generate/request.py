"""What the engine is asked for, and the tokens that it returns."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from minorca.errors import UserError, raise_problems
from minorca.generate.grammar import Constraint, Grammar
from minorca.generate.prompt_scores import PromptScores
from minorca.generate.sampling import Sampling
from minorca.model.architecture import Architecture

DEFAULT_MAX_LENGTH = 32768


# Compared and hashed by identity: equal requests are different sequences.
@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Args:
        prompt: token ids.
        max_new_tokens: the maximum number of tokens to generate; 0, with `prompt_logprobs`, generates none.
        sampling: how each token is chosen; greedy by default.
        stop_ids: ids that end the sequence; the one that does is part of it.
        adapter: the name of a LoRA adapter that the engine has, or None for the base model.
        logprobs: k: return the log-probability of every token and the k most likely tokens at its position, by the
            model's own distribution, before temperature, filters and penalties. None: return none.
        sample: an index that makes several samples of one prompt and seed differ. Added one after another, they share
            one prefill of the prompt.
        min_new_tokens: the number of tokens before which no stop id is sampled.
        prompt_logprobs: k: return the log-probability and rank of every prompt token after the first, and the k most
            likely tokens at its position, with the first new token. The whole prompt is prefilled. None: return none.
        grammar: what the answer follows until a stop id; None: any text. An answer that reaches one of the grammar
            library's limits ends there.
    """

    prompt: list[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    adapter: str | None = None
    logprobs: int | None = None
    sample: int = 0
    min_new_tokens: int = 0
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def reads_cache(self) -> bool:
        """Whether parts of the prompt may be taken from the cache: scores need the hidden states of every token."""
        return self.prompt_logprobs is None


class PromptToken(NamedTuple):
    """What the model's own distribution says of a prompt token.

    Args:
        rank: 1 + the number of ids that are more likely.
        top: (id, log-probability) of the most likely ids at its position.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Token:
    """A generated token.

    Args:
        id: -1 where the request asks for none: with `max_new_tokens` 0.
        top: (id, log-probability) of the most likely tokens, where `Request.logprobs` asked for them.
        finish_reason: None, or why this token is the request's last: "stop" (a stop id) or "length".
        prompt: with the first token, the prompt's tokens after its first, where `Request.prompt_logprobs` asked for
            them.
    """

    request: Request
    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    finish_reason: str | None
    prompt: list[PromptToken] | None = None


@dataclass(eq=False)
class Sequence:
    """A request that runs in a slot.

    Args:
        adapter_1, words_5, prompt_T: what the device has to know of the request, there: the index of its adapter, the
            words of its sampling, and its prompt.
        scheduled: generated tokens, including those still being computed.
        ids: generated tokens that have reached the host.
        prompt_scores: what `Request.prompt_logprobs` asks for, while the prompt is prefilled; None: nothing.
        constraint: how far these have followed the request's grammar.
    """

    request: Request
    slot: int
    adapter_1: Tensor
    words_5: Tensor
    prompt_T: Tensor
    scheduled: int = 0
    ids: list[int] = field(default_factory=list)
    prompt_scores: PromptScores | None = None
    constraint: Constraint | None = None

    def __post_init__(self):
        if self.request.prompt_logprobs is not None:
            self.prompt_scores = PromptScores(self.prompt_T, self.request.prompt_logprobs)

    def append(self, token: int) -> str | None:
        """Adds the next token; returns the finish reason if it is the last one."""
        if not self.request.max_new_tokens:
            return "length"
        self.ids.append(token)
        if token in self.request.stop_ids or (self.constraint and not self.constraint.consume(token)):
            return "stop"
        return "length" if len(self.ids) == self.request.max_new_tokens else None


def default_max_length(arch: Architecture) -> int:
    """The number of positions that the model was trained for, or 32768 where its files do not say."""
    return arch.max_positions or DEFAULT_MAX_LENGTH


def check_request(request: Request, vocab_size: int, max_length: int, adapters: Collection[str]) -> None:
    """Checks that a request can be served.

    Args:
        max_length: the maximum number of tokens of a prompt and its continuation.
        adapters: the names of the adapters that the engine has.

    Raises:
        UserError: every invalid field of the request.
    """
    raise_problems(_problems(request, vocab_size, max_length, adapters))


def _problems(request: Request, vocab_size: int, max_length: int, adapters: Collection[str]) -> Iterator[UserError]:
    prompt_tokens = len(request.prompt)
    new_tokens = request.max_new_tokens
    if not request.prompt:
        yield UserError("is empty; expected at least one token", field="prompt")
    if any(not 0 <= token < vocab_size for token in request.prompt):
        yield UserError(f"has ids outside the model's vocabulary of {vocab_size}", field="prompt")
    if new_tokens < (request.prompt_logprobs is None):
        yield UserError(f"is {new_tokens}; expected at least 1, or 0 with prompt_logprobs", field="max_new_tokens")
    if not 0 <= request.min_new_tokens <= new_tokens:
        yield UserError(f"is {request.min_new_tokens}; expected 0 to max_new_tokens", field="min_new_tokens")
    if request.min_new_tokens and vocab_size == sum(0 <= i < vocab_size for i in set(request.stop_ids)):
        yield UserError("has every id of the vocabulary, which min_new_tokens bans", field="stop_ids")
    if any(not 0 <= i < vocab_size for i in request.sampling.logit_bias):
        yield UserError(f"has ids outside the model's vocabulary of {vocab_size}", field="logit_bias")
    if prompt_tokens + new_tokens > max_length:
        yield UserError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens exceed the maximum length of {max_length}; "
            "shorten the prompt or generate fewer tokens"
        )
    if request.adapter not in (None, *adapters):
        yield UserError(f"is {request.adapter!r}; expected one of {list(adapters)}", field="adapter")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(request, name)
        if not 0 <= (count or 0) <= vocab_size:
            yield UserError(f"is {count}; expected 0 to {vocab_size}", field=name)
