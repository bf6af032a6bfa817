"""How every command parses its arguments, how it takes signals, and how it ends.

Exit status: 0 done; 2 for what the user can mend, with one line on standard error; 130 and 143 after SIGINT and SIGTERM.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable

from minorca.errors import RunEnded, UserError, one_line
from minorca.signals import Terminated, raise_terminated


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `UserError`s, so that they too are one line and exit status 2."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")

    def exit(self, status: int = 0, message: str | None = None):
        sys.stdout.flush()  # the help, while `run` can still see that nobody reads it
        super().exit(status, message)


def _exit(status: int) -> None:
    if (
        int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):  # gloo's threads may abort a process that ends as Python does (pytorch#190489)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main` and turns the ways it can end into exit statuses."""
    signal.signal(signal.SIGTERM, raise_terminated)
    status = 0
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        for problem in error.problems:
            print(f"minorca: error: {one_line(str(problem))}", file=sys.stderr)
        status = 2
    except RunEnded as ended:
        if str(ended):
            print(f"minorca: {one_line(str(ended))}", file=sys.stderr)
        status = ended.status
    except KeyboardInterrupt:
        status = 130
    except Terminated:
        status = 143
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nobody is left to tell
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python tries once more on its way out, and complains
        sys.exit(0)
    if status in (130, 143):
        for signum in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # another one must not end the process in another way than it ends already
            signal.signal(signum, signal.SIG_IGN)
    _exit(status)
