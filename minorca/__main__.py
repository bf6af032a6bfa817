"""`minorca NAME ...` is `python -m minorca.NAME ...`."""

import importlib
import sys

from minorca import cli
from minorca.errors import UserError

COMMANDS = {name: f"minorca.{name}" for name in ("train", "data", "generate", "serve", "export")} | {"data": "minorca.data.__main__"}


def _dispatch(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: minorca {{{','.join(COMMANDS)}}} ...   (--help on each)")
    elif not argv or argv[0] not in COMMANDS:
        raise UserError(f"expected one of the commands {', '.join(COMMANDS)}; found {' '.join(argv[:1]) or 'none'}")
    else:
        importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])


def main() -> None:
    cli.run(_dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
