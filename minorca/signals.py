"""SIGINT and SIGTERM: as exceptions, or noted while something must be finished first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM, as an exception, so that files and process groups are closed on the way out."""


def raise_terminated(signum, frame):
    raise Terminated


_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    if getattr(signal.getsignal(signal.SIGTERM), "__module__", None) == __name__:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


# A pool of forked processes, as lm_eval's bootstrap has, ends them by SIGTERM. With our handlers some would print a
# traceback; and some would never end, because Python forgets a signal that comes while a process is forked.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


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
