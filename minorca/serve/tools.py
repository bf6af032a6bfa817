"""Tools that an answer may call: the fields of requests, and the grammar of the answer.

The model's template writes the tools into the prompt. Where a call begins, its name and arguments follow the grammar;
whether one begins is up to the model, or the request.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError, field_validator

from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.safe_io import parse_json, quote
from minorca.generate.grammar import answer_rules, json_rule, optional_space, text_rule
from minorca.serve.fields import Body
from minorca.serve.tool_form import ToolForm

MAX_TOOLS = 128
# Of a call's arguments: templates' values are copied recursively.
MAX_DEPTH = 64
MODES = ("none", "auto", "required")
# The keys of a schema in which `properties` has all properties.
DESCRIBED = {"$defs", "$schema", "definitions", "description", "properties", "required", "title", "type"}
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Body):
    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    # Whether parts of `parameters` that the grammar cannot have are an error; else they are left out of it.
    strict: bool = False

    @property
    def schema_(self) -> dict[str, Any]:
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        options = {} if self.strict else {"x-guidance": {"lenient": True, "coerce_one_of": True}}
        # Functions take no others, where the schema does not say.
        closed = {"additionalProperties": False} if self.parameters.keys() <= DESCRIBED else {}
        return self.parameters | {"type": "object"} | closed | options

    @field_validator("parameters")
    @classmethod
    def _check_type(cls, value: dict[str, Any] | None):
        if value is not None and value.get("type", "object") != "object":
            raise ValueError('expected a schema of type "object"')
        return value


class Tool(Body):
    type: Literal["function"]
    function: Function

    @property
    def message(self) -> dict:
        """As chat templates take it."""
        given = self.function.model_dump(include={"name", "description"}, exclude_unset=True)
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": given | {"parameters": parameters}}


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


def _read_choice(value: Any) -> str | NamedTool:
    if value in MODES:
        return value
    try:
        return NamedTool.model_validate(value)
    except ValidationError:
        expected = '{"type": "function", "function": {"name": ...}}'
        raise ValueError(f"expected one of {', '.join(MODES)}, or {expected}") from None


# One of the modes, or the tool that must be called.
ToolChoice = Annotated[str | NamedTool, PlainValidator(_read_choice, json_schema_input_type=str | NamedTool)]


class CalledFunction(Body):
    name: Name
    arguments: str


class SentCall(Body):
    """A call in an earlier answer, as a client sends it back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    # Of a stream's pieces. No effect.
    index: int = 0


def sent_calls(calls: Sequence[SentCall], field: str) -> list[dict]:
    """The calls of an earlier answer as chat templates take them, with arguments that are no text.

    Raises:
        UserError: arguments that are not a JSON object.
    """
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": _parse_arguments(call.function.arguments, f"{field}[{i}].function.arguments"),
            },
        }
        for i, call in enumerate(calls)
    ]


def _parse_arguments(text: str, field: str) -> dict:
    try:
        arguments = parse_json(text) if text.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or _depth(arguments) > MAX_DEPTH:
        raise UserError(f"is not the JSON text of an object, nested at most {MAX_DEPTH} deep", field=field)
    return arguments


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def check_names(tools: list[Tool]) -> list[Tool]:
    """The tools, if they have different names; else ValueError."""
    if len({tool.function.name for tool in tools}) < len(tools):
        raise ValueError("expected different names")
    return tools


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> ToolChoice:
    """The choice, if it needs no other tools; else ValueError."""
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ValueError(f"{quote(choice.function.name)} is not among the tools")
    if choice == "required" and not tools:
        raise ValueError("required needs tools")
    return choice


def tool_rules(
    tok: Tokenizer, form: ToolForm, tools: Sequence[Tool], choice: ToolChoice, parallel: bool, answer: str | None
) -> str:
    """The rules of an answer that may or must call tools.

    Args:
        parallel: whether it may call several.
        answer: the right side of a rule for answers without calls; None: any text.

    Raises:
        UserError: a schema is too long.
    """
    if choice == "none":
        return answer_rules(tok, answer) if answer else _rules_without_calls(tok, form)
    chosen = [t for t in tools if not isinstance(choice, NamedTool) or t.function.name == choice.function.name]
    is_free = choice == "auto" and answer is None and form.trigger not in tok.control_ids
    # Free text may come before a call that begins with text, and contain all that the call does not begin with.
    head, start = ("head ", form.start.removeprefix(form.trigger)) if is_free else (optional_space(tok), form.start)
    more = f"({_literal(tok, form.between)} call)*" if parallel else ""
    calls = f"{head}{_literal(tok, start)} call {more} {_literal(tok, form.end)}"
    rules = [f"start: {calls}" + (" | plain" if choice == "auto" else "")]
    if choice == "auto":
        rules.append(f"plain: {optional_space(tok)}answer\nanswer: {answer}" if answer else "plain: TEXT")
        rules.append("TEXT: /(?s:.*)/")
    if is_free:
        rules.append(f"head[lazy]: TEXT {text_rule(form.trigger)}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(chosen))))
    for i, tool in enumerate(chosen):
        name, middle = text_rule(tool.function.name), _literal(tok, form.middle)
        rules.append(f"call_{i}: {name} {middle} arguments_{i}\narguments_{i}: {_schema_rule(tool)}")
    return "\n".join(rules) + "\n"


def _rules_without_calls(tok: Tokenizer, form: ToolForm) -> str:
    if form.trigger in tok.control_ids:
        return "start: TEXT\nTEXT: /(?s:.*)/\n"
    return f"start: TEXT\nTEXT: /(?s:.*)/ & ~(/(?s:.*)/ {text_rule(form.trigger)} /(?s:.*)/)\n"


def _schema_rule(tool: Tool) -> str:
    try:
        return json_rule(tool.function.schema_)
    except UserError as error:
        raise UserError(f"has the parameters of {tool.function.name}: {error.sentence}") from None


def _literal(tok: Tokenizer, text: str) -> str:
    """A part of the form: control tokens by id, and between them text."""
    pieces = enumerate(tok.split_control(text))
    rules = [
        f"<[{tok.control_ids[piece]}]> {optional_space(tok)}" if n % 2 else text_rule(piece)
        for n, piece in pieces
        if piece
    ]
    return " ".join(rules)
