"""`minorca NAME ...` is `python -m minorca.NAME ...`."""

import importlib
import sys

from minorca import cli
from minorca.errors import UserError

COMMANDS = ("train", "data", "generate", "serve", "export")


def dispatch(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: minorca {{{','.join(COMMANDS)}}} ...   (--help on each)")
    elif not argv or argv[0] not in COMMANDS:
        raise UserError(f"expected one of the commands {', '.join(COMMANDS)}; found {' '.join(argv[:1]) or 'none'}")
    else:
        importlib.import_module(f"minorca.{argv[0]}.__main__").main(argv[1:])


def main() -> None:
    cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
