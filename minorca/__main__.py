"""`minorca NAME ...` is `python -m minorca.NAME ...`."""

import difflib
import importlib
import sys

from minorca import __version__, cli
from minorca.errors import UserError

COMMANDS = ("train", "plan", "data", "generate", "serve", "export", "evaluate", "compare", "replay")
COMMANDS += ("doctor", "init", "completion")


def dispatch(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: minorca [--version] {{{','.join(COMMANDS)}}} ...   (--help on each)")
    elif argv == ["--version"]:
        print(f"minorca {__version__}")
    elif not argv or argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1) if argv else []
        hint = f"; did you mean {near[0]}?" if near else ""
        given = f"unknown command {argv[0]}" if argv else "no command given"
        raise UserError(f"{given}; expected one of {', '.join(COMMANDS)}{hint}")
    else:
        importlib.import_module(f"minorca.{argv[0]}.__main__").main(argv[1:])


def main() -> None:
    cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
