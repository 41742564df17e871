"""Errors in the form that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from lmm_jax.errors import DeadlineError, DeviceError, TryLaterError, UserError

RETRY_SECONDS = 5
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """What a client did that cannot be answered, and the status that says so."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        """Keeps what the client is told; `retry_after` in seconds."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """That go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        """JSON."""
        return body(self.status, str(self), self.code, self.param)


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as JSON."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: UserError) -> ApiError:
    """The status of an error from inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DeadlineError):
        return ApiError(400, str(error), code="deadline_exceeded")  # clients would try again after a 408
    if isinstance(error, TryLaterError):
        return ApiError(503, str(error), code="try_later", retry_after=RETRY_SECONDS)
    if isinstance(error, DeviceError):
        return ApiError(500, str(error), code="device_error")
    return ApiError(400, str(error))
