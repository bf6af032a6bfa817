"""Errors as OpenAI's clients expect them."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException
from pydantic import BaseModel

from minorca.errors import UserError, one_line


class ErrorResponse(BaseModel):
    """The body of every response that is an error."""

    class Details(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Details


class APIError(HTTPException):
    """An error that a client receives.

    Args:
        status: the HTTP status.
        message: what is wrong and what was expected.
        param: the field of the request body that is wrong.
        code: OpenAI's code for the error, if it has one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """An `ErrorResponse`. Its strings may quote the client's, so characters that cannot be encoded are escaped."""
    types = {401: "authentication_error", 429: "rate_limit_error"}
    kind = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": one_line(message), "type": kind, "param": param and one_line(param), "code": code}}


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Turns what a user can fix into a client's error about a field."""
    try:
        yield
    except UserError as error:
        # Without the path, which clients should not see.
        raise APIError(400, "; ".join(problem.sentence for problem in error.problems), param) from None
