"""`RequestRecord`: what is known of one HTTP request; `Recorder`, the ASGI layer that opens one for each and hands it,
at the end, to whoever writes logs, metrics and traces.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.core.log import logger
from nybble.server.errors import ApiError

if TYPE_CHECKING:
    from nybble.server.job import Job

CLIENT_GONE = 499
"""Status of a request whose client left before there was one to send; nginx's number for it."""

QUIET_PATHS = ("/health", "/metrics")
"""Asked every few seconds; logged only if something is wrong."""

access_log = logger.getChild("access")


@dataclass(slots=True)
class RequestRecord:
    """Times are seconds; `begin` of the monotonic clock, `arrival` since 1970."""

    request_id: str
    method: str
    path: str  # as it was sent
    client: str
    headers: Sequence[tuple[bytes, bytes]]
    begin: float = field(default_factory=time.monotonic)
    arrival: float = field(default_factory=time.time)
    end: float = 0.0
    status: int = CLIENT_GONE
    error: str | None = None  # a word for what went wrong
    job: Job | None = None  # if it came so far

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def fields(self) -> dict[str, Any]:
        """For a line of a log."""
        shown: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "client": self.client,
        }
        if self.error is not None:
            shown["error"] = self.error
        if (job := self.job) is not None:
            usage = job.usage()
            shown |= {
                "model": job.model,
                "response_id": job.response_id,
                "stream": job.streams,
                "prompts": len(job.requests),
                "n": job.requests[0].params.n,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "finish_reasons": ",".join(sorted(job.finish_reasons)),
            }
            for name, value in (("queue_seconds", job.queue_seconds), ("ttft_seconds", job.first_token_seconds)):
                if value is not None:
                    shown[name] = round(value, 4)
        return shown


Sink = Callable[[RequestRecord], None]


class Recorder:
    """The outermost layer. Gives each request an id, the client's own if it sent one, and each answer that id."""

    def __init__(self, app: ASGIApp, sinks: Sequence[Sink]) -> None:
        self._app = app
        self._sinks = sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _opened(scope)
        scope.setdefault("state", {})["record"] = record
        id_header = (b"x-request-id", record.request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.end = time.monotonic()
            for sink in self._sinks:
                try:
                    sink(record)
                except Exception:
                    logger.exception("a request could not be recorded")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error where no route is reached."""
    record_of(scope).error = error.word
    await error.response()(scope, receive, send)


def write_access_line(record: RequestRecord) -> None:
    """A `Sink`."""
    if record.status >= 400 or record.path not in QUIET_PATHS:
        access_log.info("request", extra={"fields": record.fields()})


def record_of(scope: Mapping[str, Any]) -> RequestRecord:
    record: RequestRecord = scope["state"]["record"]
    return record


def _opened(scope: Scope) -> RequestRecord:
    headers = scope["headers"]
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    name = given.decode("latin-1")
    is_sound = 0 < len(name) <= 128 and name.isascii() and name.isprintable() and " " not in name
    client = scope.get("client")
    return RequestRecord(
        request_id=name if is_sound else uuid.uuid4().hex,
        method=scope["method"],
        path=(scope.get("raw_path") or b"").decode("latin-1")[:200],
        client=f"{client[0]}:{client[1]}" if client else "",
        headers=headers,
    )
