"""The messages of a conversation in a request's body."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator, model_validator

from minorca.serve.fields import Body, TextPart, Unsupported, read_content
from minorca.serve.tools import MAX_TOOLS, SentCall, sent_calls


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(read_content, json_schema_input_type=str | list[TextPart])]
    # No effect.
    name: str = ""
    id: str = ""
    cache_control: dict[str, Any] = {}
    # Fields of a response's message, which clients send back.
    refusal: Annotated[Any, Unsupported("")] = ""
    annotations: Annotated[Any, Unsupported([])] = []
    function_call: Annotated[Any, Unsupported({})] = {}
    audio: Annotated[Any, Unsupported({})] = {}
    reasoning: Annotated[Any, Unsupported("")] = ""
    reasoning_content: Annotated[Any, Unsupported("")] = ""
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
