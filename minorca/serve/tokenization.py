"""Text to token ids and back over HTTP, as in vLLM's API (`vllm/entrypoints/openai/protocol.py`)."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from minorca.data.tokenizer import Tokenizer
from minorca.serve.echo import spell
from minorca.serve.fields import Body, Unsupported, is_ids
from minorca.serve.protocol import MAX_MESSAGES, Conversation, Message, RawText
from minorca.serve.unserved import UnservedChatFields


class TokenizeRequest(RawText, Conversation, UnservedChatFields):
    """A text, or a conversation with the header that asks for an answer."""

    # None: the base model.
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field([], min_length=1, max_length=MAX_MESSAGES)
    # Not supported.
    return_token_strs: Annotated[Any, Unsupported(False)] = False

    @model_validator(mode="after")
    def _check_prompt(self):
        if (self.prompt is None) == (not self.messages):
            raise ValueError("expected one of prompt and messages")
        if self.messages and self.add_special_tokens and "add_special_tokens" in self.model_fields_set:
            raise ValueError("add_special_tokens is not supported with messages; leave it out")
        return self

    @property
    def prompt_field(self) -> str:
        return "messages" if self.prompt is None else "prompt"

    @property
    def characters(self) -> int:
        return super().characters if self.prompt is None else len(self.prompt)

    def encode_prompt(self, tok: Tokenizer, template: str, max_tokens: int) -> list[int]:
        """As `GenerationRequest.encode_prompts`, for the one prompt."""
        if self.prompt is None:
            return self.render(tok, template, max_tokens)
        return self.encode(tok, self.prompt)


def _read_ids(value: Any) -> list[int]:
    if not is_ids(value):
        raise ValueError("expected a list of token ids")
    return value


class DetokenizeRequest(Body):
    # None: the base model.
    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_read_ids, json_schema_input_type=list[int])]

    def decode(self, tok: Tokenizer) -> str:
        """The text, with control tokens as their strings. Ids must be the tokenizer's."""
        return "".join(spell(tok, self.tokens))
