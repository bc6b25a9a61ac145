"""ApiError: errors in the shape of the OpenAI API."""

import logging
import math

from fastapi.responses import JSONResponse

from veratune.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterStateError,
    InUseError,
    JobNotFoundError,
    PoolFullError,
    QueueFullError,
    ShutdownError,
    StoreError,
    VeratuneError,
)

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error that a client sees."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after: float = 1.0,
    ) -> None:
        """Describe the error.

        Args:
            status: The HTTP status.
            message: One line for people.
            kind: OpenAI's type of the error.
            code: A word for programs.
            param: The field of the request that is wrong.
            retry_after: Seconds for the Retry-After header of 429 and 503.
        """
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def to_api_error(error: BaseException) -> ApiError:
    """An error as a client sees it. Causes inside the server go to the log only."""
    match error:
        case ApiError():
            return error
        case AdapterNotFoundError():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case JobNotFoundError():
            return ApiError(404, str(error), code="not_found")
        case QueueFullError() | PoolFullError():
            return ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded")
        case AdapterStateError():
            return ApiError(409, str(error), code="stale")
        case InUseError():
            return ApiError(409, str(error), code="in_use")
        case StoreError():
            log.error("store: %s", error)
            return ApiError(503, "the store of adapters cannot be reached", "server_error")
        case ShutdownError():
            return ApiError(503, str(error), "server_error")
        case AdapterFileError():
            return ApiError(400, f"the adapter was refused: {error}", code="invalid_adapter")
        case VeratuneError():
            return ApiError(400, str(error))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the cause", "server_error")
