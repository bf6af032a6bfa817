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
    """Within it SIGINT and SIGTERM are only added to a list, so that work in progress can be finished.

    Repeated ones too: at Ctrl-C a process of torchrun gets SIGINT from the terminal and again from torchrun.
    """
    noted: list[int] = []
    # which alone receives signals
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {s: signal.signal(s, lambda signum, frame: noted.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
