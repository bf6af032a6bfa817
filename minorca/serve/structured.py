"""The fields that say what form an answer has: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from minorca.generate.grammar import choice_rule, json_rule, regex_rule
from minorca.serve.fields import Body

MAX_CHOICES = 1024
ANY_OBJECT = {"type": "object"}
Schema = dict[str, Any] | bool


class NamedSchema(Body):
    name: str = Field(min_length=1, max_length=64)
    # No effect.
    description: str = ""
    # Every answer follows its schema.
    strict: bool = False
    schema_: Schema = Field(default={}, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema where type is json_schema, and only there")
        return self

    @property
    def rule(self) -> str | None:
        """As that of `StructuredOutputs`."""
        if self.json_schema:
            return json_rule(self.json_schema.schema_)
        return json_rule(ANY_OBJECT) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """One of these forms, or none."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _check_one(self):
        given = [value is not None for value in (self.json_, self.regex, self.choice)]
        if sum(given) + self.json_object > 1:
            raise ValueError("expected one of json, json_object, regex and choice")
        return self

    @property
    def rule(self) -> str | None:
        """The right side of the grammar's rule for the answer; None: any text.

        Raises:
            UserError: it is too long.
        """
        if self.regex is not None:
            return regex_rule(self.regex)
        if self.choice is not None:
            return choice_rule(self.choice)
        if self.json_object:
            return json_rule(ANY_OBJECT)
        return None if self.json_ is None else json_rule(self.json_)
