"""`Connection`: one client's connection, on top of uvicorn's, with what a server on an open port needs beside it.

Heads have a time and a size limit, what thousands of clients send at once is read a few at a time, and errors of the
protocol have OpenAI's bodies. The transport is shown to the application, as `scope["state"]["transport"]`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from nybble.server.errors import ApiError
from nybble.server.limits import HEAD_TOO_LARGE
from nybble.server.turns import Door

LARGE_PIECE = 64 << 10
"""Bytes received at once from which on no more is taken before these had their turn."""


class Connection(H11Protocol):
    def __init__(self, *, door: Door, max_head_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._door = door
        self._max_head_seconds = max_head_seconds
        self._received: list[bytes] = []
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._received.clear()
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if not self._received:
            self._door.queue(self._read)
        self._received.append(data)
        if len(data) >= LARGE_PIECE:
            self.flow.pause_reading()

    def _read(self) -> None:
        if not self._received or self.transport.is_closing():
            return
        data = b"".join(self._received)
        self._received.clear()
        self.flow.resume_reading()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._head_timer is None:
            self._watch_head()

    def _watch_head(self) -> None:
        self._head_timer = self.loop.call_later(self._max_head_seconds, self._give_up)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, "the head of a request took too long to arrive"))

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this where it handles h11's error, which knows the status."""
        cause = sys.exception()
        status = cause.error_status_hint if isinstance(cause, h11.RemoteProtocolError) else 400
        words = HEAD_TOO_LARGE if status == 431 else "this is no valid HTTP request"
        self._refuse(ApiError(status, words))

    def _refuse(self, error: ApiError) -> None:
        body = error.body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = (
            h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        with suppress(h11.LocalProtocolError):  # in the middle of an answer there is nothing to say
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
