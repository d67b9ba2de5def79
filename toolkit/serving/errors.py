"""Errors of requests, and the body that every response has that is not 2xx."""

from collections.abc import Callable
from typing import Any, TypeAlias

from toolkit.errors import ToolkitError

Json: TypeAlias = dict[str, Any]

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class RequestError(ToolkitError):
    """A request that cannot be served as given.

    Args:
        message: one sentence.
        param: the field at fault, where there is one.
        status: of HTTP.
        code: a name for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


ErrorStyle: TypeAlias = Callable[[RequestError, str], Json]
"""What makes the body of an error, of it and of the request's id."""


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """The body of every response that is not 2xx."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
