"""Errors of the API in OpenAI's shape."""

from __future__ import annotations

from typing import Any

# OpenAI's name for each kind of error; 4xx that have none are invalid requests.
TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class APIError(Exception):
    """What a client is told; `param` names the field of its request that is at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        message = f"{self.param}: {self.message}" if self.param else self.message
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come back."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
