"""What may follow each option: the names of files or directories, or one of a few values."""

import argparse
import typing
from collections.abc import Iterator

import shtab

from minorca.config import choices, fields
from minorca.init.answers import GOALS
from minorca.plan.devices import GPUS

# by what the options' help calls their values
_OF_METAVAR = {
    "FILE": shtab.FILE,
    "FILE.html": shtab.FILE,
    "DIR": shtab.DIRECTORY,
    "[NAME=]DIR": shtab.DIRECTORY,
    "PATH": shtab.FILE,
}
# by the argument or setting
_OF_NAME = {
    # a model may be a GGUF file
    "model": shtab.FILE,
    "a": shtab.FILE,
    "b": shtab.FILE,
    "model.path": shtab.FILE,
    "lora.init": shtab.DIRECTORY,
    "data.train": shtab.FILE,
    "data.eval": shtab.FILE,
    "data.store": shtab.DIRECTORY,
    "train.output": shtab.DIRECTORY,
    "eval.include_path": shtab.DIRECTORY,
    "dpo.reference": shtab.DIRECTORY,
}


def add_values(parser: argparse.ArgumentParser) -> None:
    """Tells shtab what may follow each option of a parser and of its commands."""
    flags = {f"{section}.{key.name}" for section, key, hint in fields() if typing.get_args(hint)[0] is bool}
    for action in _actions(parser):
        if complete := _OF_NAME.get(action.dest) or _OF_METAVAR.get(str(action.metavar)):
            action.complete = complete  # pyright: ignore[reportAttributeAccessIssue]
        elif action.dest in flags:
            action.choices = ("true", "false")
        elif action.dest == "gpu":
            action.choices = (*(gpu.name for gpu in GPUS), "cpu")
        elif action.dest == "goal":
            action.choices = tuple(GOALS)
        elif "." in action.dest:
            action.choices = choices(action.dest) or None


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
