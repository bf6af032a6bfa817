"""The one exception that belongs to the user's world."""


class UserError(Exception):
    """Something the user can mend: says which file, key or line, what was expected, and what to do.

    Commands print it as one line and exit with status 2 (`cli.run`); it never carries a traceback.
    """
