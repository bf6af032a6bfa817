"""Text to token ids and back over HTTP, as in vLLM's API (`vllm/entrypoints/openai/protocol.py`)."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from minorca.data.tokenizer import Tokenizer
from minorca.serve.completions import RawText
from minorca.serve.echo import spell
from minorca.serve.errors import APIError
from minorca.serve.fields import Body, Unsupported, is_ids
from minorca.serve.protocol import MAX_MESSAGES, Conversation, Message
from minorca.serve.unserved import UnservedChatFields


class TokenizeRequest(RawText, Conversation, UnservedChatFields):
    """A text, or a conversation with the header that asks for an answer."""

    # None: the base model.
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field([], min_length=1, max_length=MAX_MESSAGES)
    # Not supported.
    return_token_strs: Annotated[Any, Unsupported(False)] = False

    def check(self) -> None:
        """Raises APIError for fields that exclude each other."""
        if (self.prompt is None) == (not self.messages):
            raise APIError(400, "expected one of prompt and messages", "prompt")
        adds_special = self.add_special_tokens and "add_special_tokens" in self.model_fields_set
        if self.messages and adds_special:
            raise APIError(400, "add_special_tokens is not supported with messages; leave it out", "add_special_tokens")

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
