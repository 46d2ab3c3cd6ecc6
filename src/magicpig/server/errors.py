"""Errors as OpenAI's interface says them: a status and one JSON object."""

from __future__ import annotations

from typing import Any

from magicpig.errors import MagicPigError

STATUS = {
    "queue_full": 429,
    "shutting_down": 503,
    "group_ended": 503,
    "timeout": 504,
    "internal_error": 500,
    "not_finite": 500,
}
"""By the code of a `MagicPigError`; all others are about what was asked: 400."""

RETRY_AFTER = {429: "1", 503: "5"}  # seconds


class ApiError(MagicPigError):
    """An answer that is not 200.

    told: the code that the client gets, which programs rely on; param: which field of the request is to blame.
    """

    code = "api_error"

    def __init__(self, status: int, message: str, *, told: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.told, self.param = status, message, told, param

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": RETRY_AFTER[self.status]} if self.status in RETRY_AFTER else {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.told}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the engine; ValueErrors are about the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MagicPigError):
        return ApiError(STATUS.get(error.code, 400), str(error), told=error.code)
    if isinstance(error, ValueError):
        return ApiError(400, str(error), told="invalid_argument")
    return ApiError(500, f"{type(error).__name__} in the server; its log says more", told="internal_error")


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    if status == 503:
        return "service_unavailable_error"
    return "invalid_request_error" if status < 500 else "server_error"
