"""The body of a request for a completion, which continues raw text, and of its response."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from minorca.data.tokenizer import Tokenizer
from minorca.serve.choice import Choice, Echo, TokenLogprob
from minorca.serve.echo import make_echo
from minorca.serve.fields import Body, Unsupported, read_prompt
from minorca.serve.logprobs import completion_logprobs
from minorca.serve.protocol import MAX_LOGPROBS, GenerationRequest

# OpenAI's; an answer in a chat goes on to the end.
DEFAULT_NEW_TOKENS = 16


class RawText(Body):
    """How a request's prompt that is text becomes ids."""

    # Whether control strings in a prompt, such as [INST] or </s>, are control tokens; else they are plain text.
    parse_control_tokens: bool = True
    # vLLM's: whether a bos is put in front where the tokenizer adds one and the text has none.
    add_special_tokens: bool = True

    def encode(self, tok: Tokenizer, text: str) -> list[int]:
        if self.add_special_tokens:
            return tok.encode_rendered(text, self.parse_control_tokens)
        return tok.encode_template(text) if self.parse_control_tokens else tok.encode(text)


class CompletionRequest(RawText, GenerationRequest):
    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(read_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    # 0 with `echo` or `prompt_logprobs`: the prompt alone.
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    # Not supported.
    suffix: Annotated[Any, Unsupported("")] = ""
    response_format: Annotated[Any, Unsupported({"type": "text"})] = {"type": "text"}

    prompt_field: ClassVar[str] = "prompt"
    id_prefix: ClassVar[str] = "cmpl"
    response_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value != info.data.get("n"):
            raise ValueError("is not supported; leave it out or send the value of n")
        return value

    @property
    def continues(self) -> bool:
        return True

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompt)

    @property
    def max_new_tokens_field(self) -> str:
        return "max_tokens"

    @property
    def default_new_tokens(self) -> int | None:
        return DEFAULT_NEW_TOKENS

    @property
    def logprobs_count(self) -> int | None:
        return self.logprobs

    @property
    def scores_stop_ids(self) -> bool:
        # As OpenAI and vLLM do: harnesses that ask for one token count on its entry.
        return True

    @property
    def prompt_logprobs_count(self) -> int | None:
        counts = [self.prompt_logprobs]
        if self.echo:
            # The engine ends after a prompt only where its log-probabilities are asked for.
            counts.append(0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs)
        return max((count for count in counts if count is not None), default=None)

    @property
    def characters(self) -> int:
        return max(len(prompt) if isinstance(prompt, str) else 0 for prompt in self.prompt)

    def encode_prompts(self, tok: Tokenizer, template: str, max_tokens: int) -> list[list[int]]:
        return [self.encode(tok, prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]

    def make_echo(self, index: int, tok: Tokenizer, ids: list[int]) -> Echo | None:
        if not self.echo:
            return None
        prompt = self.prompt[index]
        return make_echo(tok, ids, prompt if isinstance(prompt, str) else None, self.logprobs is not None)

    def response_choice(self, choice: Choice, prompt: list[int]) -> dict:
        logprobs = None if self.logprobs is None else completion_logprobs(choice.take_logprobs(), self.logprobs > 0)
        fields = {"index": choice.index, "text": choice.text, "logprobs": logprobs}
        return fields | {"finish_reason": choice.finish_reason} | self._format_prompt(choice, prompt)

    def stream_start(self, index: int) -> dict | None:
        return None

    def stream_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict:
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(logprobs, bool(self.logprobs)) if logprobs else None,
            "finish_reason": finish_reason,
        }
