"""The signals that end a command: as exceptions, or noted while something must be finished first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# beside SIGINT: an end, a terminal that is closed, schedulers' warnings, a limit of processor time
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Terminated(BaseException):
    """One of `STOPPING`, as an exception, so that files and process groups are closed on the way out."""

    def __init__(self, signum: int = signal.SIGTERM):
        super().__init__(signum)
        self.signum = signum


def raise_terminated(signum, frame):
    raise Terminated(signum)


def raise_when_stopped() -> None:
    """Has the signals of `STOPPING` raise `Terminated`, but those that are ignored, as SIGHUP is under nohup."""
    for signum in STOPPING:
        if signum == signal.SIGTERM or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, raise_terminated)


_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    for signum in STOPPING:
        if getattr(signal.getsignal(signum), "__module__", None) == __name__:
            signal.signal(signum, signal.SIG_DFL)
    _after_fork()


# A pool of forked processes, as lm_eval's bootstrap has, ends them by SIGTERM. With our handlers some would print a
# traceback; and some would never end, because Python forgets a signal that comes while a process is forked.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM, and others that would raise `Terminated`, are only added to a list, so that work in
    progress can be finished.

    Repeated ones too: at Ctrl-C a process of torchrun gets SIGINT from the terminal and again from torchrun.
    """
    noted: list[int] = []
    # which alone receives signals
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    always = (signal.SIGINT, signal.SIGTERM)
    stopping = (*always, *(s for s in STOPPING if s not in always and signal.getsignal(s) == raise_terminated))
    before = {s: signal.signal(s, lambda signum, frame: noted.append(signum)) for s in stopping}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
