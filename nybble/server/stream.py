"""Answers that take time: `EventStream` and `WholeReply`. Each is a `Reply`, which ends its work when the client goes.

They are ASGI applications without a layer between, for the way of each token through here is what a stream costs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nybble.server.errors import ApiError, as_api_error
from nybble.server.record import RequestRecord

DONE = b"data: [DONE]\n\n"
STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would collect events
    ],
}
_encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


class ClientGoneError(ConnectionError):
    """Nothing can be sent any more."""


class Reply(Response):
    """Runs `answer` until it is done or the client has gone.

    Args:
        max_send_seconds: how long a client may leave what is sent unread.
    """

    def __init__(self, max_send_seconds: float) -> None:
        self.background = None
        self.status_code = 200
        self.body = b""
        self._max_send_seconds = max_send_seconds
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        record: RequestRecord | None = state.get("record")
        transport: asyncio.Transport | None = state.get("transport")
        work = asyncio.create_task(self._guarded(send, record, transport))
        watch = asyncio.create_task(_disconnected(receive))
        try:
            while not work.done():
                await asyncio.wait((work, watch), timeout=self._max_send_seconds, return_when=asyncio.FIRST_COMPLETED)
                if self._is_stuck() and transport is not None:
                    transport.abort()  # closing it would wait for its reader
                if watch.done() or self._is_stuck():
                    if record is not None and not work.done():
                        record.error = "client_too_slow" if self._is_stuck() else "client_gone"
                    break
        finally:
            # Waited for, so that the engine has been told when this returns.
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def answer(self, send: Send) -> ApiError | None:
        """Returns the error that it answered with."""
        raise NotImplementedError

    async def send_in_time(self, send: Send, message: Message) -> None:
        self._sending_since = time.monotonic()
        await send(message)
        self._sending_since = None

    def _is_stuck(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since >= self._max_send_seconds

    async def _guarded(self, send: Send, record: RequestRecord | None, transport: asyncio.Transport | None) -> None:
        async def send_if_open(message: Message) -> None:
            if transport is not None and transport.is_closing():
                raise ClientGoneError
            await send(message)

        try:
            failure = await self.answer(send_if_open)
            if failure is not None and record is not None:
                record.error = failure.word
        except ClientGoneError:
            if record is not None:
                record.error = "client_gone"


class EventStream(Reply):
    """Server-sent events. An error before the first one is an ordinary response, later it is the last event."""

    def __init__(self, events: AsyncGenerator[bytes], max_send_seconds: float) -> None:
        super().__init__(max_send_seconds)
        self._events = events

    async def answer(self, send: Send) -> ApiError | None:
        has_started = False
        failure = None
        last = DONE
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    if not has_started:
                        has_started = True
                        await self.send_in_time(send, STREAM_START)
                    await self.send_in_time(send, {"type": "http.response.body", "body": data, "more_body": True})
        except ClientGoneError:
            raise
        except Exception as error:
            failure = as_api_error(error)
            if not has_started:
                await failure.response()({"type": "http"}, _nothing, send)
                return failure
            last = b"data: " + failure.body() + b"\n\n"
        await self.send_in_time(send, {"type": "http.response.body", "body": last})
        return failure


class WholeReply(Reply):
    """One JSON body, once it is known."""

    def __init__(self, body: Callable[[], Awaitable[Any]], max_send_seconds: float) -> None:
        super().__init__(max_send_seconds)
        self._make_body = body

    async def answer(self, send: Send) -> ApiError | None:
        failure = None
        try:
            response = Response(_encode(await self._make_body()), media_type="application/json")
        except Exception as error:
            failure = as_api_error(error)
            response = failure.response()
        await self.send_in_time(
            send, {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self.send_in_time(send, {"type": "http.response.body", "body": response.body})
        return failure


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
