"""The bodies of OpenAI's requests and responses with vLLM's extensions, as far as this engine implements them.

A field that is not implemented is an error unless its value asks for nothing; an unknown field is ignored, with a
warning in the log. Sources: those of unserved.py."""

from abc import abstractmethod
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from minorca.data.chat_template import render_chat
from minorca.data.tokenizer import Tokenizer
from minorca.generate.grammar import Grammar, answer_rules
from minorca.generate.sampling import Sampling
from minorca.serve.call_reader import CallReader
from minorca.serve.choice import Choice, Echo, TokenLogprob
from minorca.serve.errors import naming
from minorca.serve.fields import (
    MAX_PROMPTS,
    Body,
    read_logit_bias,
    read_stop,
    read_stop_token_ids,
)
from minorca.serve.logprobs import chat_logprobs, prompt_logprobs
from minorca.serve.messages import Message, template_messages
from minorca.serve.structured import ResponseFormat, StructuredOutputs
from minorca.serve.tool_form import tool_form
from minorca.serve.tools import MAX_TOOLS, Tool, ToolChoice, check_choice, check_names, tool_rules
from minorca.serve.unserved import UnservedChatFields, UnservedFields

# A chat template that comes with the model may take time quadratic in this.
MAX_MESSAGES = 1024
MAX_LOGPROBS = 20


class StreamOptions(Body):
    include_usage: bool = False
    # vLLM's: whether every event has the usage so far.
    continuous_usage_stats: bool = False
    # No effect.
    include_obfuscation: bool = False


class Conversation(Body):
    """The fields of a request whose prompt is a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    # vLLM's: whether the last message, an answer, is continued, and whether an answer is asked for otherwise.
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, value: list[Tool]) -> list[Tool]:
        return check_names(value)

    @field_validator("add_generation_prompt")
    @classmethod
    def _check_add_generation_prompt(cls, value: bool, info: ValidationInfo) -> bool:
        # Only where it is sent.
        if value and info.data.get("continue_final_message"):
            raise ValueError("cannot be combined with continue_final_message; leave it out")
        return value

    @property
    def characters(self) -> int:
        calls = (call.function.arguments for message in self.messages for call in message.tool_calls)
        texts = (*(message.content for message in self.messages), *(tool.function.description for tool in self.tools))
        return sum(map(len, (*texts, *calls)))

    def render(self, tok: Tokenizer, template: str, max_tokens: int) -> list[int]:
        """As `GenerationRequest.encode_prompts`, for the one prompt."""
        return render_chat(
            tok,
            template_messages(self.messages),
            template=template,
            tools=[tool.message for tool in self.tools],
            max_ids=max_tokens,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class GenerationRequest(UnservedFields):
    """The fields that both endpoints have, and how each endpoint writes its responses."""

    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    # -1 is vLLM's word for 0.
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[int, float], PlainValidator(read_logit_bias, json_schema_input_type=dict[str, float])
    ] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_PROMPTS)
    stop: Annotated[list[str], PlainValidator(read_stop, json_schema_input_type=str | list[str])] = []
    stop_token_ids: Annotated[list[int], PlainValidator(read_stop_token_ids, json_schema_input_type=list[int])] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # vLLM's.
    structured_outputs: StructuredOutputs = StructuredOutputs()

    # The field that holds the prompt, the prefix of response ids, and the "object" of responses and stream events.
    prompt_field: ClassVar[str]
    id_prefix: ClassVar[str]
    response_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @field_validator("prompt_logprobs")
    @classmethod
    def _check_prompt_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("stream"):
            raise ValueError("is not supported in a stream; leave one of them out")
        return value

    @cached_property
    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_p,
            max(0, self.top_k),
            self.min_p,
            self.repetition_penalty,
            self.seed,
            self.presence_penalty,
            self.frequency_penalty,
            self.logit_bias,
        )

    @property
    @abstractmethod
    def continues(self) -> bool:
        """Whether the new text continues a text."""

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
    def default_new_tokens(self) -> int | None:
        """The limit where a request has none; None: the model's."""

    @property
    @abstractmethod
    def logprobs_count(self) -> int | None:
        """`Request.logprobs`: how many of the most likely tokens to return; None: no log-probabilities."""

    @property
    def prompt_logprobs_count(self) -> int | None:
        """`Request.prompt_logprobs`."""
        return self.prompt_logprobs

    @property
    def scores_stop_ids(self) -> bool:
        """Whether log-probabilities are also of the stop id that ends an answer."""
        return False

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

    def make_echo(self, index: int, tok: Tokenizer, ids: list[int]) -> Echo | None:
        """What the choices of the prompt at `index`, which has these ids, start with."""
        return None

    @abstractmethod
    def response_choice(self, choice: Choice, prompt: list[int]) -> dict:
        """A finished choice in a response that is not streamed; `prompt` has its prompt's ids."""

    def response_fields(self, choice: Choice, prompt: list[int]) -> dict:
        """Fields of a response that is not streamed, from its first choice and the ids of its prompt."""
        return {}

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

    def _format_prompt(self, choice: Choice, prompt: list[int]) -> dict:
        """The field `prompt_logprobs`, where it is asked for."""
        if self.prompt_logprobs is None or choice.prompt is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(prompt, choice.prompt, self.prompt_logprobs, choice.texts)}


class ChatRequest(Conversation, UnservedChatFields, GenerationRequest):
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")

    prompt_field: ClassVar[str] = "messages"
    id_prefix: ClassVar[str] = "chatcmpl"
    response_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

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
    def default_new_tokens(self) -> int | None:
        return None

    @property
    def logprobs_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

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
        return [self.render(tok, template, max_tokens)]

    def response_choice(self, choice: Choice, prompt: list[int]) -> dict:
        calls = [call.message for call in choice.calls]
        content = None if calls and not choice.content else choice.content
        message = {"role": "assistant", "content": content, "refusal": None} | ({"tool_calls": calls} if calls else {})
        logprobs = chat_logprobs(choice.take_logprobs()) if self.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def response_fields(self, choice: Choice, prompt: list[int]) -> dict:
        return self._format_prompt(choice, prompt)

    def stream_start(self, index: int) -> dict | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def stream_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        return {
            "index": index,
            "delta": {} if finish_reason else {"content": text},
            "logprobs": chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def stream_calls(self, index: int, delta: dict) -> dict:
        return self.stream_chunk(index, "", []) | {"delta": {"tool_calls": [delta]}}
