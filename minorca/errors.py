"""The exceptions that end a command without a traceback, and how the first is raised for several things at once."""


class UserError(Exception):
    """Something the user can mend: says which file, key or line, what was expected, and what to do.

    Commands print it as one line and exit with status 2 (`cli.run`); it never carries a traceback.
    """


def refuse(problems: dict[str, bool]) -> None:
    """UserError with all the messages, in order, whose problem there is."""
    if wrong := [message for message, is_wrong in problems.items() if is_wrong]:
        raise UserError("; ".join(wrong))


class Ended(Exception):
    """This rank ends, with this exit status, because another one did; the message is empty where that one has said why."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status
