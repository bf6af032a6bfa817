"""How every command parses its arguments, and how it ends.

Exit status: 0 done; 2 for what the user can mend, with one line on standard error; 130 and 143 after SIGINT and SIGTERM.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from minorca.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s, so that they too are one line and exit status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def exit(self, status: int = 0, message: str | None = None):
        sys.stdout.flush()  # the help, while `run` can still see that nobody reads it
        super().exit(status, message)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that files and process groups are closed on the way out."""


def _terminate(signum, frame):
    raise Terminated


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and turns the ways it can end into exit statuses."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"minorca: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Terminated:
        sys.exit(143)
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more on its way out, and complains
        sys.exit(0)
