"""The bodies of OpenAI's requests and responses, as far as this engine implements them.

A field that is not implemented is an error unless it has the value that changes nothing, and so is an unknown field: a
client that sends one expects an effect. Source: OpenAI's API reference, "Chat" and "Completions (legacy)", as its
Python client types them."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from minorca.data.chat_template import render_chat
from minorca.data.conversation import join_text_parts
from minorca.data.tokenizer import Tokenizer
from minorca.generate.grammar import Grammar, answer_rules
from minorca.generate.sampling import Sampling
from minorca.serve.call_reader import CallReader
from minorca.serve.choice import Choice, TokenLogprob
from minorca.serve.errors import naming
from minorca.serve.objects import Object
from minorca.serve.structured import ResponseFormat, StructuredOutputs
from minorca.serve.tool_form import tool_form
from minorca.serve.tools import MAX_TOOLS, SentCall, Tool, ToolChoice, check_choice, check_names, sent_calls, tool_rules

# A chat template that comes with the model may take time quadratic in this.
MAX_MESSAGES = 1024
# Of one message's text, and the prompts of one request; a body of 2 MiB could have hundreds of thousands.
MAX_PARTS = 1024
MAX_PROMPTS = 4096
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 20


# --------------------------------------------------------------------------------------------------------- field types


class Unsupported:
    """Metadata of a field that is not implemented: it accepts only values without an effect."""

    def __init__(self, *values):
        self.values = values

    def _check(self, value):
        if value not in self.values:
            raise ValueError(f"is not supported; leave it out or send {self.values[0]!r}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        return {"enum": list(self.values)}


def _read_stop(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(string, str) and 0 < len(string) <= MAX_STOP_LENGTH for string in strings)
    ):
        raise ValueError(
            f"expected a string or a list of up to {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} characters each"
        )
    return strings


def _read_prompt(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS
    if not is_list or not (all(isinstance(prompt, str) for prompt in value) or all(map(_is_ids, value))):
        raise ValueError(f"expected a string, a list of token ids, or a list of up to {MAX_PROMPTS} of either")
    return value


def _is_ids(value: Any) -> bool:
    # Not isinstance: a bool is an int.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _read_content(value: Any) -> str:
    if isinstance(value, list) and len(value) > MAX_PARTS:
        raise ValueError(f"expected at most {MAX_PARTS} parts")
    return join_text_parts(value if isinstance(value, list) else [{"type": "text", "text": value}])


# ------------------------------------------------------------------------------------------------------------- requests


class TextPart(Object):
    type: Literal["text"]
    text: str


class Message(Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_read_content, json_schema_input_type=str | list[TextPart])]
    # No effect.
    name: str = ""
    # Fields of a response's message, which clients send back.
    refusal: Annotated[Any, Unsupported("")] = ""
    annotations: Annotated[Any, Unsupported([])] = []
    function_call: Annotated[Any, Unsupported({})] = {}
    audio: Annotated[Any, Unsupported({})] = {}
    # Of an answer, and of what a tool returned for one of them.
    tool_calls: list[SentCall] = Field([], max_length=MAX_TOOLS)
    tool_call_id: str = Field("", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _allow_calls_alone(cls, data):
        if isinstance(data, dict) and data.get("role") == "assistant" and data.get("tool_calls"):
            return {"content": ""} | {key: value for key, value in data.items() if value is not None}
        return data

    @field_validator("tool_calls")
    @classmethod
    def _check_tool_calls(cls, value: list[SentCall], info: ValidationInfo) -> list[SentCall]:
        if value and info.data.get("role") != "assistant":
            raise ValueError("expected them in messages of the assistant alone")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _check_tool_call_id(cls, value: str, info: ValidationInfo) -> str:
        if (info.data.get("role") == "tool") != bool(value):
            raise ValueError("expected it in messages of a tool, and in these alone")
        return value


def template_messages(messages: list[Message]) -> list[dict]:
    """The messages as chat templates take them, with the names of the functions that tools answer for.

    Raises:
        UserError: calls whose arguments are not JSON objects.
    """
    # "developer" is OpenAI's newer name.
    roles = {"developer": "system"}
    functions = {call.id: call.function.name for message in messages for call in message.tool_calls}
    converted: list[dict] = []
    for i, m in enumerate(messages):
        message: dict = {"role": roles.get(m.role, m.role), "content": m.content}
        if m.tool_calls:
            message["tool_calls"] = sent_calls(m.tool_calls, f"messages[{i}].tool_calls")
        if m.role == "tool":
            name = functions.get(m.tool_call_id)
            message |= {"tool_call_id": m.tool_call_id} | ({"name": name} if name else {})
        converted.append(message)
    return converted


class StreamOptions(Object):
    include_usage: bool = False
    # No effect.
    include_obfuscation: bool = False


class GenerationRequest(Object):
    """The fields that both endpoints have, and how each endpoint writes its responses."""

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, lt=2**31)
    stop: Annotated[list[str], PlainValidator(_read_stop, json_schema_input_type=str | list[str])] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # vLLM's.
    structured_outputs: StructuredOutputs = StructuredOutputs()
    # Not supported.
    frequency_penalty: Annotated[Any, Unsupported(0)] = 0
    presence_penalty: Annotated[Any, Unsupported(0)] = 0
    logit_bias: Annotated[Any, Unsupported({})] = {}
    # No effect.
    user: str = ""
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    # The field that holds the prompt, the prefix of response ids, and the "object" of responses and stream events.
    prompt_field: ClassVar[str]
    id_prefix: ClassVar[str]
    response_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed)

    @property
    def continues(self) -> bool:
        """Whether the new text continues a message."""
        return False

    def compile_grammar(self, tok: Tokenizer, template: str) -> Grammar | None:
        """The grammar of the answer; None: it is any text.

        Raises:
            APIError: it cannot be compiled.
        """
        with naming("structured_outputs"):
            rule = self.structured_outputs.rule
            return Grammar(tok, answer_rules(tok, rule)) if rule else None

    def call_reader(self, tok: Tokenizer, template: str) -> CallReader | None:
        """What finds the calls in an answer; None: it has none. `compile_grammar` has found no problem."""
        return None

    @property
    @abstractmethod
    def num_choices(self) -> int: ...

    @property
    @abstractmethod
    def max_new_tokens_field(self) -> str:
        """The field that limits the number of new tokens."""

    @property
    def max_new_tokens(self) -> int | None:
        return getattr(self, self.max_new_tokens_field)

    @property
    @abstractmethod
    def logprobs_count(self) -> int | None:
        """`Request.logprobs`: how many of the most likely tokens to return; None: no log-probabilities."""

    @property
    @abstractmethod
    def characters(self) -> int:
        """The number of characters of the longest prompt."""

    @abstractmethod
    def encode_prompts(self, tok: Tokenizer, template: str, max_tokens: int) -> list[list[int]]:
        """The ids of each prompt, messages rendered by `template`; encoding may stop after more than `max_tokens`.

        Raises:
            UserError: the chat template cannot render the messages, or a text cannot be encoded.
        """

    @abstractmethod
    def response_choice(self, choice: Choice) -> dict:
        """A finished choice in a response that is not streamed."""

    @abstractmethod
    def stream_start(self, index: int) -> dict | None:
        """What a stream sends before the first text of a choice."""

    @abstractmethod
    def stream_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        """New text of a choice or, with a finish reason, its end."""

    def stream_calls(self, index: int, delta: dict) -> dict:
        """A piece of a choice's calls."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    # vLLM's: whether the last message, an answer, is continued; the other field can only be its opposite.
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")
    # Not supported.
    functions: Annotated[Any, Unsupported([])] = []
    function_call: Annotated[Any, Unsupported("none", "auto")] = "none"
    modalities: Annotated[Any, Unsupported(["text"])] = ["text"]
    audio: Annotated[Any, Unsupported({})] = {}
    prediction: Annotated[Any, Unsupported({})] = {}
    web_search_options: Annotated[Any, Unsupported({})] = {}
    reasoning_effort: Annotated[Any, Unsupported("none")] = "none"
    verbosity: Annotated[Any, Unsupported("medium")] = "medium"

    prompt_field: ClassVar[str] = "messages"
    id_prefix: ClassVar[str] = "chatcmpl"
    response_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    @model_validator(mode="after")
    def _check_top_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, value: list[Tool]) -> list[Tool]:
        return check_names(value)

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, value: ToolChoice, info: ValidationInfo) -> ToolChoice:
        return check_choice(value, info.data.get("tools", []))

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, value: ResponseFormat, info: ValidationInfo) -> ResponseFormat:
        other = info.data.get("structured_outputs")
        if value.type != "text" and other and other.model_fields_set:
            raise ValueError("is given beside structured_outputs; expected one of them")
        return value

    @field_validator("add_generation_prompt")
    @classmethod
    def _check_add_generation_prompt(cls, value: bool, info: ValidationInfo) -> bool:
        # Only where it is sent.
        if value == info.data.get("continue_final_message"):
            raise ValueError("must be the opposite of continue_final_message; leave it out")
        return value

    @property
    def continues(self) -> bool:
        return self.continue_final_message

    @property
    def num_choices(self) -> int:
        return self.n

    @property
    def max_new_tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def logprobs_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def characters(self) -> int:
        calls = (call.function.arguments for message in self.messages for call in message.tool_calls)
        texts = (*(message.content for message in self.messages), *(tool.function.description for tool in self.tools))
        return sum(map(len, (*texts, *calls)))

    def compile_grammar(self, tok: Tokenizer, template: str) -> Grammar | None:
        field = "structured_outputs" if self.response_format.type == "text" else "response_format"
        with naming(field):
            answer = self.structured_outputs.rule or self.response_format.rule
            if not self.tools:
                return Grammar(tok, answer_rules(tok, answer)) if answer else None
        with naming("tools"):
            form = tool_form(tok, template)
            return Grammar(tok, tool_rules(tok, form, self.tools, self.tool_choice, self.parallel_tool_calls, answer))

    def call_reader(self, tok: Tokenizer, template: str) -> CallReader | None:
        return CallReader(tok, tool_form(tok, template)) if self.tools and self.tool_choice != "none" else None

    def encode_prompts(self, tok: Tokenizer, template: str, max_tokens: int) -> list[list[int]]:
        ids = render_chat(
            tok,
            template_messages(self.messages),
            template=template,
            max_ids=max_tokens,
            tools=[tool.message for tool in self.tools],
            continue_final_message=self.continue_final_message,
        )
        return [ids]

    def response_choice(self, choice: Choice) -> dict:
        calls = [call.message for call in choice.calls]
        content = None if calls and not choice.content else choice.content
        message = {"role": "assistant", "content": content, "refusal": None} | ({"tool_calls": calls} if calls else {})
        logprobs = self._format_logprobs(choice.take_logprobs()) if self.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def stream_start(self, index: int) -> dict | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def stream_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        return {
            "index": index,
            "delta": {} if finish_reason else {"content": text},
            "logprobs": self._format_logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def stream_calls(self, index: int, delta: dict) -> dict:
        return self.stream_chunk(index, "", []) | {"delta": {"tool_calls": [delta]}}

    def _format_logprobs(self, logprobs: list[TokenLogprob]) -> dict:
        def entry(text: str, logprob: float) -> dict:
            # The bytes of an incomplete character cannot be read off its text.
            return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode()), "logprob": logprob}

        content = [
            entry(token.text, token.logprob) | {"top_logprobs": [entry(text, logprob) for text, logprob in token.top]}
            for token in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_read_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    # Whether control strings in a prompt, such as [INST] or </s>, are control tokens; else they are plain text.
    parse_control_tokens: bool = True
    # Not supported.
    echo: Annotated[Any, Unsupported(False)] = False
    suffix: Annotated[Any, Unsupported("")] = ""

    prompt_field: ClassVar[str] = "prompt"
    id_prefix: ClassVar[str] = "cmpl"
    response_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    @model_validator(mode="after")
    def _check_best_of(self):
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported; leave it out or send the value of n")
        return self

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompt)

    @property
    def max_new_tokens_field(self) -> str:
        return "max_tokens"

    @property
    def logprobs_count(self) -> int | None:
        return self.logprobs

    @property
    def characters(self) -> int:
        return max(len(prompt) if isinstance(prompt, str) else 0 for prompt in self.prompt)

    def encode_prompts(self, tok: Tokenizer, template: str, max_tokens: int) -> list[list[int]]:
        return [
            tok.encode_rendered(prompt, self.parse_control_tokens) if isinstance(prompt, str) else prompt
            for prompt in self.prompt
        ]

    def response_choice(self, choice: Choice) -> dict:
        logprobs = None if self.logprobs is None else self._format_logprobs(choice.take_logprobs())
        return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def stream_start(self, index: int) -> dict | None:
        return None

    def stream_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def _format_logprobs(self, logprobs: list[TokenLogprob]) -> dict:
        def top(token: TokenLogprob) -> dict[str, float]:
            # With the sampled token. Of several tokens with the same text, the most likely one is kept.
            entries = [*token.top, (token.text, token.logprob)]
            return dict(reversed(entries))

        return {
            "tokens": [token.text for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [top(token) for token in logprobs] if self.logprobs else None,
            "text_offset": [token.offset for token in logprobs],
        }
