"""OpenAI's requests and answers, as far as this engine has a use for them.

A field that is not served is refused unless it holds the value that changes nothing, and so is a field that nobody knows: whoever
sends one expects something of it. Source: OpenAI's API reference, "Chat" and "Completions (legacy)", as its Python client types them.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer
from minorca.errors import one_line
from minorca.generate.engine import Token
from minorca.generate.sampling import Sampling
from minorca.generate.text_stream import TextStream

MOST_UNKNOWN = 10  # of an object's fields that nobody knows are named: each is an error of its own
MOST_MESSAGES = 1024  # of one conversation: a template that the model ships renders it anew for each answer in it
MOST_STOPS, STOP_LENGTH = 16, 1024
MOST_LOGPROBS = 20
LEAST_LOGPROB = -9999.0  # as at OpenAI: JSON has no infinity


# ------------------------------------------------------------------------------------------------------------- refusals


class Problem(BaseModel):
    """The shape of every refusal."""

    class Details(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Details


class Refused(HTTPException):
    """A refusal: HTTP's status, what is wrong, and in which field."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """A refusal's body. Names and values in it are a client's, who may send what no encoding can write: it is spelled out."""
    special = {401: "authentication_error", 429: "rate_limit_error"}
    kind = special.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": one_line(message), "type": kind, "param": param and one_line(param), "code": code}}


# ------------------------------------------------------------------------------------------------------------- requests


def _harmless(*values) -> Any:
    """The type of a field that is not served: the values that ask for nothing."""

    def check(value):
        if value not in values:
            raise ValueError(f"is not supported; leave it out or send {values[0]!r}")
        return value

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": list(values)})]


def _stops(value) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not (
        isinstance(texts, list)
        and len(texts) <= MOST_STOPS
        and all(isinstance(t, str) and 0 < len(t) <= STOP_LENGTH for t in texts)
    ):
        raise ValueError(f"expected a text, or a list of up to {MOST_STOPS}, of 1 to {STOP_LENGTH} characters each")
    return texts


def _prompts(value) -> list[str] | list[list[int]]:
    def is_ids(value) -> bool:
        return isinstance(value, list) and all(type(i) is int for i in value)

    prompts = [value] if isinstance(value, str) or value and is_ids(value) else value
    if not (
        isinstance(prompts, list)
        and prompts
        and (all(isinstance(p, str) for p in prompts) or all(map(is_ids, prompts)))
    ):
        raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists")
    return prompts


def _content(value) -> str:
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    if not all(
        isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" and isinstance(p["text"], str)
        for p in parts
    ):
        raise ValueError('expected a text, or a list of {"type": "text", "text": ...}')
    return "\n".join(part["text"] for part in parts)


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data):
        if not isinstance(data, dict):
            return data
        unknown = (k for k in data if k not in cls.model_fields)
        known = {k: v for k, v in data.items() if k in cls.model_fields and v is not None}
        return known | dict.fromkeys(islice(unknown, MOST_UNKNOWN))


class TextPart(_Object):
    type: Literal["text"]
    text: str


class Message(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart])]
    name: str = ""  # no effect
    # of an answer that comes back as a client keeps it
    refusal: _harmless("") = ""
    annotations: _harmless([]) = []
    tool_calls: _harmless([]) = []
    function_call: _harmless({}) = {}
    audio: _harmless({}) = {}


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: bool = False  # no effect


class Generation(_Object):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, lt=2**31)
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str])] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # not supported
    frequency_penalty: _harmless(0) = 0
    presence_penalty: _harmless(0) = 0
    logit_bias: _harmless({}) = {}
    # no effect
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    @property
    def limit(self) -> int | None:
        return getattr(self, self.limit_field)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed)


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    # not supported
    tools: _harmless([]) = []
    tool_choice: _harmless("none", "auto") = "none"
    functions: _harmless([]) = []
    function_call: _harmless("none", "auto") = "none"
    response_format: _harmless({"type": "text"}) = {"type": "text"}
    modalities: _harmless(["text"]) = ["text"]
    audio: _harmless({}) = {}
    prediction: _harmless({}) = {}
    web_search_options: _harmless({}) = {}
    reasoning_effort: _harmless("none") = "none"
    verbosity: _harmless("medium") = "medium"
    # no effect
    parallel_tool_calls: bool = True

    prompt_field: ClassVar = "messages"
    names: ClassVar = (
        "chatcmpl",
        "chat.completion",
        "chat.completion.chunk",
    )  # of its ids; of a whole answer and a piece of one

    @model_validator(mode="after")
    def _top_of_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def count(self) -> int:
        return self.n

    @property
    def limit_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def scored(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def render(self, tok: Tokenizer, most: int) -> list[list[int]]:
        """The ids of each prompt; of one with more than `most`, some that are as many. Raises UserError: the template cannot write it."""
        roles = {"developer": "system"}  # OpenAI's newer name
        return [
            render_chat(
                tok, [{"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages], max_ids=most
            )
        ]

    def whole(self, choice: "Choice") -> dict:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.take_scores()) if self.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> dict | None:
        """What a stream starts with."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, scores: list["Score"], finish_reason: str | None = None) -> dict:
        """New text, or the end."""
        delta = {} if finish_reason else {"content": text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(scores) if scores else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, scores: list["Score"]) -> dict:
        def entry(text: str, logprob: float) -> dict:  # a part of a character has bytes that its text does not tell
            return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": logprob}

        content = [
            entry(score.text, score.logprob) | {"top_logprobs": [entry(*one) for one in score.top]} for score in scores
        ]
        return {"content": content, "refusal": None}


class CompletionRequest(Generation):
    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = None
    # not supported
    echo: _harmless(False) = False
    suffix: _harmless("") = ""

    prompt_field: ClassVar = "prompt"
    limit_field: ClassVar = "max_tokens"
    names: ClassVar = ("cmpl", "text_completion", "text_completion")

    @model_validator(mode="after")
    def _best_of_all(self):
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported but as n; leave it out")
        return self

    @property
    def count(self) -> int:
        return self.n * len(self.prompt)

    @property
    def scored(self) -> int | None:
        return self.logprobs

    def render(self, tok: Tokenizer, most: int) -> list[list[int]]:
        """The ids of each prompt. Raises UserError: text that cannot be encoded."""
        return [tok.encode(prompt, bos=tok.adds_bos) if isinstance(prompt, str) else prompt for prompt in self.prompt]

    def whole(self, choice: "Choice") -> dict:
        logprobs = None if self.logprobs is None else self._logprobs(choice.take_scores())
        return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> dict | None:
        return None

    def piece(self, index: int, text: str, scores: list["Score"], finish_reason: str | None = None) -> dict:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(scores) if scores else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, scores: list["Score"]) -> dict:
        def likeliest(score: Score) -> dict[str, float]:
            entries = [
                *score.top,
                (score.text, score.logprob),
            ]  # the chosen one too; of several with one text, the first
            return {text: logprob for text, logprob in reversed(entries)}

        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [likeliest(score) for score in scores] if self.logprobs else None,
            "text_offset": [score.offset for score in scores],
        }


# -------------------------------------------------------------------------------------------------------------- answers


@dataclass
class Score:
    """A token's text, where in the answer it starts, its log probability, and the likeliest tokens in its place."""

    text: str
    offset: int
    logprob: float
    top: list[tuple[str, float]]


class Choice:
    """One answer as it grows, from tokens to text."""

    def __init__(self, index: int, tok: Tokenizer, stop: list[str]):
        self.index, self.tokens, self.finish_reason = index, 0, None
        self._tok, self._stream = tok, TextStream(tok, stop)
        self._unstopped, self._length = TextStream(tok), 0  # tells where tokens start
        self._scores: list[Score] = []
        self._before: list[int] = []  # what tokens are decoded behind: a tokenizer may drop a space where a text starts
        self._skipped = 0  # characters of that

    @property
    def text(self) -> str:
        return self._stream.text

    def push(self, token: Token) -> str:
        """Takes the next token; returns the text that is new. A stop id has none, and ends the answer like a stop string."""
        self.tokens += 1
        new = ""
        if token.finish_reason != "stop":
            if token.logprob is not None:
                self._score(token)
            new = self._stream.push(token.id)
        if token.finish_reason:
            new += self._stream.finish()
        self.finish_reason = "stop" if self._stream.stopped else token.finish_reason
        return new

    def take_scores(self) -> list[Score]:
        """Those not taken yet of the tokens whose text, or its beginning, was shown; at the end of all that no stop string holds."""
        stopped = self._stream.stopped
        shown = self._length + 1 if self.finish_reason and not stopped else len(self.text)
        taken = [score for score in self._scores if score.offset < shown]
        self._scores = self._scores[len(taken) :]
        return taken

    def _score(self, token: Token) -> None:
        def text(i: int) -> str:
            return self._tok.decode([*self._before, i])[self._skipped :]

        def logprob(value: float) -> float:
            return max(LEAST_LOGPROB, value)  # also of NaN

        top = [(text(i), logprob(value)) for i, value in token.top]
        self._scores.append(Score(text(token.id), self._length, logprob(token.logprob), top))
        self._length += len(self._unstopped.push(token.id))
        if not self._before:
            self._before = self._tok.encode("a")
            self._skipped = len(self._tok.decode(self._before))
