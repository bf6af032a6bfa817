"""The exceptions that end a command without a traceback."""

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

# of the machine, whatever a program does: a disk that is full, lost or not ours to write; no descriptors, no memory
MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
}


class UserError(Exception):
    """Something the user can fix. Commands print it as one line and exit with status 2 (`cli.run`).

    Args:
        message: what is wrong, what was expected, and what to do. After a `field` it is the rest of the sentence.
        path: the file or directory that the message is about.
        where: the place in that file, as "line 3" or "row 7".
        field: the key, option, column or tensor that is wrong.
        advice: what else may help, known to the caller of what raised it.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        where: str | None = None,
        field: str | None = None,
        advice: str | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.path = path
        self.where = where
        self.field = field
        self.advice = advice

    @property
    def problems(self) -> list["UserError"]:
        """What is wrong, one thing each."""
        return [self]

    @property
    def sentence(self) -> str:
        """The message with its field, without the file's name."""
        sentence = self.message if self.field is None else f"{self.field} {self.message}"
        return sentence if self.advice is None else f"{sentence}; {self.advice}"

    def __str__(self) -> str:
        place = ", ".join(str(part) for part in (self.path, self.where) if part is not None)
        return f"{place}: {self.sentence}" if place else self.sentence


class UserErrors(UserError):
    """Several problems found together; a command prints a line for each."""

    def __init__(self, problems: list[UserError]):
        super().__init__("; ".join(map(str, problems)))
        self._problems = problems

    def __reduce__(self):
        return UserErrors, (self._problems,)

    @property
    def problems(self) -> list[UserError]:
        return self._problems


def nearest(name: str, known: Iterable[str], n: int = 1) -> str:
    """The end of a message about an unknown name: those of the known ones that were meant, perhaps; or nothing."""
    near = difflib.get_close_matches(name, known, n=n)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def raise_problems(problems: Iterable[UserError]) -> None:
    """Raises all of the problems as one exception; does nothing where there are none."""
    found = [problem for error in problems for problem in error.problems]
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserErrors(found)


class RunEnded(Exception):
    """This rank ends with this exit status because another rank did.

    The message is empty where the other rank has printed the reason.
    """

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


def memory_asked_for(error: Exception) -> str:
    """What torch says of memory that ran out, without what follows about its allocator."""
    return str(error).partition(" Of the allocated")[0]


def disk_reason(error: Exception, path: Path) -> str:
    """What a disk reports of a path; one whose inodes are used up says that no space is left, which `df` denies."""
    # as safetensors says it
    is_full = f"(os error {errno.ENOSPC})" in str(error)
    if is_full or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        directory = next(parent for parent in path.absolute().parents if parent.exists())
        disk = os.statvfs(directory)
        if disk.f_files and not disk.f_favail:
            return "its disk has no inodes left, of which every file needs one; remove files, see df -i"
    return str(error)


def one_line(text: str) -> str:
    """Text for a terminal: non-printable characters are escaped, and very long text is cut."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return text if len(text) <= 4000 else f"{text[:4000]} [...]"
