"""Standard streams as they may be: closed, full, without a reader, or of an encoding that lacks what is written."""

import contextlib
import errno
import io
import logging
import os
import sys
from typing import cast

from minorca.host import is_first_rank


class _Descriptor(io.FileIO):
    """What a standard stream writes to.

    Attributes:
        failure: the last error of writing.
        is_needed: whether such an error is raised; what else is written is lost.
        is_within_line: whether a line was begun and not ended.
    """

    failure: OSError | None = None
    is_needed = True
    is_within_line = False

    def write(self, data, /) -> int | None:
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            if self.is_needed:
                raise
            return memoryview(data).nbytes
        if written:
            self.is_within_line = bytes(data[written - 1 : written]) != b"\n"
        return written


_opened: dict[str, _Descriptor] = {}


def open_streams() -> None:
    """Gives this process standard streams that take any text; what Python found closed leads nowhere, but a result that
    is printed to a closed standard output is an error.

    An error of standard error, which nobody could be told of, is never raised. Streams that somebody has replaced stay.
    """
    # writing to standard output fails, as to the closed one
    for name, mode, access in (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # of the closed descriptors the lowest, which the next file would get else, and what is printed
            descriptor = os.open(os.devnull, access)
            stream = open(descriptor, mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or name in _opened:
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        descriptor = _opened[name] = _Descriptor(stream.fileno(), "w", closefd=False)
        buffer = cast(io.BufferedWriter, descriptor) if stream.write_through else io.BufferedWriter(descriptor)
        wrapped = io.TextIOWrapper(
            buffer,
            stream.encoding,
            # as \xe9, where the encoding lacks it
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, wrapped)
        # its handlers would print a traceback into the other stream
        logging.raiseExceptions = False
    if "stderr" in _opened:
        _opened["stderr"].is_needed = False


def outlive_readers() -> None:
    """From here on the process goes on when standard output cannot be written to: its results are files."""
    for descriptor in _opened.values():
        descriptor.is_needed = False


def end_line() -> None:
    """Ends the line that a progress bar has begun on standard error, so that an error has a line of its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()
    sys.stderr.flush()
    # of torchrun's processes, which share standard error, the first has the bars
    if not is_first_rank() or ("stderr" in _opened and _opened["stderr"].is_within_line):
        sys.stderr.write("\n")


def flush_output() -> None:
    """Writes what is left of standard output, and says so where some that is not needed was lost.

    Raises:
        OSError: it cannot be written, and is needed.
    """
    sys.stdout.flush()
    output = _opened.get("stdout")
    # who has closed it, or has gone, wants to be told nothing
    if output and output.failure and output.failure.errno not in (errno.EBADF, errno.EPIPE):
        end_line()
        lost = f"standard output could not be written ({output.failure.strerror}), and some of it is lost"
        print(f"minorca: warning: {lost}", file=sys.stderr)


def is_of_output(error: OSError) -> bool:
    """Whether writing to standard output has failed so."""
    return "stdout" in _opened and _opened["stdout"].failure is error
