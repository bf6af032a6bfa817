"""What checks find, and how they are run: in a process of their own, so that nothing that is broken ends the report."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from minorca.errors import one_line


@dataclass(frozen=True)
class Fact:
    """Something that is so."""

    section: str
    name: str
    value: str


@dataclass(frozen=True)
class Finding:
    """Something to change.

    Attributes:
        message: what is wrong.
        remedy: a command or setting, where the message has none.
        prevents: nothing can be trained or generated here before it is changed.
    """

    message: str
    remedy: str = ""
    prevents: bool = False

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.message, self.remedy)))


class EndOfChecks(Exception):
    """Raised by a check after whose findings the later ones have nothing to say."""


def reason_of(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:500]


_REPORT = "report it to minorca's authors with the whole output"

# A check yields what it finds while it goes on.
Check = Callable[[], Iterator[Fact | Finding]]


def run_apart(checks: list[Check], timeout: float) -> Iterator[Fact | Finding]:
    """What the checks find, while they run; a check that fails, or the end of their process, is a finding too.

    timeout: seconds that one finding may take.
    """
    # the checks may import what must not be imported here
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(checks, sender))
    process.start()
    sender.close()
    name = ""
    try:
        while True:
            if not receiver.poll(timeout):
                yield Finding(f"{name} took more than {timeout:g} seconds, and was ended", _REPORT, prevents=True)
                return
            name, item = receiver.recv()
            if item is not None:
                yield item
    except EOFError:
        process.join()
        if process.exitcode:
            code = process.exitcode
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            yield Finding(f"{name} ended the process {how}", _REPORT, prevents=True)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(checks: list[Check], sender: Connection) -> None:
    # what compilers and libraries print is not part of the report
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    for check in checks:
        sender.send((check.__name__, None))
        try:
            for item in check():
                sender.send((check.__name__, item))
        except EndOfChecks:
            return
        except Exception as error:
            message = f"the check of {check.__name__} failed: {reason_of(error)}"
            sender.send((check.__name__, Finding(message, _REPORT)))
