"""SIGINT and SIGTERM: as exceptions, or noted while something must be finished first."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM, as an exception, so that files and process groups are closed on the way out."""


def raise_terminated(signum, frame):
    raise Terminated


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM only add themselves to a list, so that what is under way can be finished. Repeated
    ones too: at Ctrl-C a process of torchrun gets SIGINT from the terminal and again from torchrun.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield noted
        return
    before = {s: signal.signal(s, lambda signum, frame: noted.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
