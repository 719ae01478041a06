"""OpenAI's error bodies, and which exception becomes which.

`ApiError` is what this folder raises; `as_api_error` makes one of anything. What is not known to be safe to show is
logged, and the client learns only that it was the server's fault.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nybble.core.errors import EngineClosedError, EngineDeadError, RequestError
from nybble.core.log import logger


class ApiError(Exception):
    """An answer that is an error.

    Args:
        parameter: the field of the request that is at fault.
        code: a word that programs can test for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.parameter = parameter
        self.code = code
        self.headers = dict(headers or {})

    @property
    def word(self) -> str:
        """For logs."""
        return self.code or _type_of(self.status)

    def body(self) -> bytes:
        detail = {"message": self.message, "type": _type_of(self.status), "param": self.parameter, "code": self.code}
        return msgspec.json.encode({"error": detail})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def bad_request(message: str, parameter: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, parameter=parameter, code=code)


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception; logs the unexpected ones."""
    match error:
        case ApiError():
            return error
        case RequestError():
            # The engine's name for it means nothing to a client.
            parameter = "prompt" if error.parameter == "prompt_token_ids" else error.parameter
            return ApiError(400, str(error), parameter=parameter)
        case EngineClosedError():
            return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})
        case EngineDeadError():
            logger.error("a request was lost: %s", error)
            return ApiError(503, "the engine is not running; try again later", code="engine_dead")
        case HTTPException():
            headers = error.headers
            return ApiError(
                error.status_code, str(error.detail).lower(), headers=headers, code=_CODES.get(error.status_code)
            )
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed while serving this request; its log says why", code="internal_error")


_CODES = {404: "not_found", 405: "method_not_allowed"}


def _type_of(status: int) -> str:
    match status:
        case 401 | 403:
            return "authentication_error"
        case 429:
            return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
