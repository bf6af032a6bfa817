"""A conversation: what a row of every format but text becomes, and what the templates write."""

from dataclasses import dataclass, field


@dataclass
class Conversation:
    """Messages, and the tools that the assistant may call.

    Attributes:
        messages: each {"role": "system" | "user" | "assistant" | "tool", "content": text}. An answer may have
            "weight": 0, which excludes it from the loss, and "tool_calls": [{"function": {"name", "arguments"}, "id"}]
            as in OpenAI's API; a tool's message may have "tool_call_id" and "name".
        tools: the tools' schemas, as in OpenAI's API.
    """

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
