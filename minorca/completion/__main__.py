"""`minorca completion SHELL`: prints a script with which a shell completes minorca's command lines."""

import importlib

import shtab

from minorca import cli
from minorca.__main__ import COMMANDS
from minorca.completion.values import add_values

# where a new shell reads the script, as its own documentation says
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/minorca",
    "zsh": "a directory of $fpath, as the file _minorca",
    "fish": "~/.config/fish/completions/minorca.fish",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.completion",
        description="Prints a script with which a shell completes minorca's commands, options and values. Write it to "
        + "; ".join(f"{shell}: {place}" for shell, place in SHELLS.items()),
    )
    parser.add_argument("shell", metavar="SHELL", choices=tuple(SHELLS), help=" or ".join(SHELLS))
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    script = shtab.complete(all_commands(), args.shell)
    # shtab's functions for bash split a path at its spaces, and complete the first part
    for kind in "fd":
        script = script.replace(f"compgen -{kind} -- $1 ", f'compgen -{kind} -- "$1" ')
    print(script)


def all_commands() -> cli.Parser:
    """A parser of every command with what may follow its options."""
    commands = {name: importlib.import_module(f"minorca.{name}.__main__").build_parser() for name in COMMANDS}
    parser = cli.parser_of_commands("minorca", "An engine for Mistral models.", commands)
    parser.add_argument("--version", action="store_true")
    add_values(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
