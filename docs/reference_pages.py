"""The generated parts of docs/reference: from the parsers of the commands, the fields of the settings and docstrings.

A function has the name of the page that it ends; docs/conf.py calls it while Sphinx reads that page. All give Markdown
as MyST reads it.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import minorca
import minorca.generate
import minorca_kernels
from minorca import cli, config
from minorca.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent

# ----------------------------------------------------------------------------------------------------------- commands


def parsers() -> Iterator[tuple[str, cli.Parser]]:
    """Every command with its parser, of those that have subcommands each of these."""
    for command in COMMANDS:
        parser = importlib.import_module(f"minorca.{command}.__main__").build_parser()
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for group in groups:
            for name, subparser in group.choices.items():
                yield f"{command} {name}", subparser
        if not groups:
            yield command, parser


def options(parser: cli.Parser) -> list[argparse.Action]:
    """Its arguments and options without the settings of a run, which have a page of their own."""
    return [
        action
        for action in parser._actions
        if action.dest != "help" and not any("." in name for name in action.option_strings)
    ]


def usage(action: argparse.Action) -> str:
    """How an argument or option is written."""
    value = action.metavar or (action.choices and "|".join(map(str, action.choices))) or action.dest.upper()
    value = " ".join(value) if isinstance(value, tuple) else str(value)
    if action.nargs in ("+", "*"):
        value = f"{value} ..."
    names = ", ".join(action.option_strings)
    if not names:
        return value
    return names if action.nargs == 0 else f"{names} {value}"


def commands() -> str:
    parts = []
    for command, parser in parsers():
        has_settings = any("." in name for action in parser._actions for name in action.option_strings)
        rows = [(_code(usage(action)), _help(parser, action)) for action in options(parser)]
        if has_settings:
            rows.append((_code("--section.key VALUE"), "a setting of a run: [configuration](configuration.md)"))
        parts += [f"## minorca {command}", _plain(parser.description or ""), _table(("option", ""), rows)]
    return "\n\n".join(parts)


def _help(parser: cli.Parser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    required = "required" if action.required and action.option_strings else ""
    # the usage does not list them where it has another word for the value
    choices = [str(choice) for choice in action.choices or []]
    listed = f"one of {', '.join(choices)}" if "|".join(choices) not in usage(action) else ""
    return _plain("; ".join(filter(None, [text, listed, required])))


# ------------------------------------------------------------------------------------------------------ configuration


def configuration() -> str:
    parts = []
    for section in typing.get_type_hints(config.Config):
        rows = [
            (_code(f"{name}.{key.name}"), _type(annotated), _default(key), _plain(typing.get_args(annotated)[1]))
            for name, key, annotated in config.fields()
            if name == section
        ]
        parts += [f"## {section}", _table(("key", "type", "default", ""), rows)]
    return "\n\n".join([*parts, _sources()])


def _sources() -> str:
    """The keys of an entry of data.train."""
    hints = typing.get_type_hints(config.Source)
    rows = [(_code(key.name), _type(hints[key.name]), _default(key)) for key in dataclasses.fields(config.Source)]
    directive = "```{eval-rst}\n.. autoclass:: minorca.config.Source\n   :no-index:\n   :no-members:\n```"
    return "\n\n".join(["## An entry of data.train and data.eval", directive, _table(("key", "type", "default"), rows)])


def _default(key: dataclasses.Field) -> str:
    value = config.default_of(key)
    if value is dataclasses.MISSING:
        return "required"
    names = {None: "null", True: "true", False: "false"}
    if isinstance(value, list | tuple):
        return _code(f"[{', '.join(map(str, value))}]")
    return _code(names[value] if value is None or isinstance(value, bool) else str(value))


def _type(hint) -> str:
    """A type as YAML has it: "text", "list of text"; choices as they are written."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(_code(str(choice)) for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, inner)))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} {_type(inner[0])}s"
    if origin is dict:
        return f"{_type(inner[0])} to {_type(inner[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    return names.get(hint, "[source](#an-entry-of-datatrain-and-dataeval)")


# ---------------------------------------------------------------------------------------------------- Python, kernels

# what the functions of the interface give and take, and what they run on
CLASSES = {
    "minorca.model.network.Mistral": ["forward"],
    "minorca.data.tokenizer.Tokenizer": ["encode", "decode"],
    "minorca.generate.engine.Engine": ["add", "cancel", "step"],
    "minorca.generate.request.Request": [],
    "minorca.generate.request.Token": [],
    "minorca.generate.sampling.Sampling": [],
}


def exported() -> list[str]:
    """The names of the Python interface."""
    return [f"{module.__name__}.{name}" for module in (minorca, minorca.generate) for name in module.__all__]


def python() -> str:
    functions = [_autodoc(name) for name in [*exported(), "minorca.model.build.prepack"]]
    classes = [_autodoc(name, members) for name, members in CLASSES.items()]
    return "\n\n".join(["## Functions", *functions, "## What they give and take", *classes])


def kernels() -> str:
    """Each module with the operations that it exports; of definitions the code too, which is the specification."""
    by_module: dict[str, list[str]] = {}
    for name in minorca_kernels.__all__:
        module = getattr(getattr(minorca_kernels, name), "__module__", "minorca_kernels.low_rank_update")
        by_module.setdefault(module, []).append(name)
    parts = []
    for module, names in sorted(by_module.items()):
        parts += [f"## {module.rpartition('.')[2]}", _rst(f".. automodule:: {module}\n   :no-index:")]
        for name in sorted(names, key=lambda name: name.endswith("_definition")):
            parts.append(_autodoc(f"minorca_kernels.{name}"))
            if name.endswith("_definition"):
                parts.append(f"```python\n{_body(getattr(minorca_kernels, name))}```")
    return "\n\n".join(parts)


def files() -> str:
    """Each package, and its modules with the first paragraph of their docstrings."""
    parts = []
    for root in ("minorca", "kernels/minorca_kernels"):
        for package in sorted(path.parent for path in (ROOT / root).rglob("__init__.py")):
            described = [(path.name, first_paragraph(path)) for path in sorted(package.glob("*.py"))]
            rows = [f"| `{name}` | {text} |" for name, text in described if name != "__init__.py"]
            parts += [f"## {package.relative_to(ROOT)}", "\n".join(["| file | what it is |", "| --- | --- |", *rows])]
    return "\n\n".join(parts)


def first_paragraph(path: Path) -> str:
    """That of a module's docstring, in one line that can be a cell of a table."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", r"\|")


def _body(function) -> str:
    """A function's code after its docstring."""
    source = inspect.getsource(function)
    docstring = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    return textwrap.dedent("".join(source.splitlines(keepends=True)[docstring.end_lineno :]))


def _autodoc(name: str, members: list[str] | None = None) -> str:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if isinstance(thing, dict):
        return _rst(f".. py:data:: {attribute}\n   :module: {module}\n\n   {', '.join(thing)}")
    kind = "class" if inspect.isclass(thing) else "function"
    if kind == "class" and issubclass(thing, Exception):
        kind = "exception"
    listed = f"\n   :members: {', '.join(members)}" if members else ""
    return _rst(f".. auto{kind}:: {name}{listed}")


# ----------------------------------------------------------------------------------------------------------- Markdown


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"


def _code(text: str) -> str:
    return f"`{text}`"


def _plain(text: str) -> str:
    """Text whose characters Markdown does not read as marks."""
    for mark in "\\*_[]<>#":
        text = text.replace(mark, f"\\{mark}")
    return text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
