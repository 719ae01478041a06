"""`make_server`: uvicorn as nybble runs it. The sockets, and when it ends, are the caller's."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from nybble.server.connection import Connection
from nybble.server.settings import Limits
from nybble.server.turns import NUM_A_TURN, Door

BACKLOG = 2048
"""Connections that the kernel keeps for us."""


class HttpServer(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:
        return nullcontext()  # they are the caller's; uvicorn would raise them once more when it is done

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:  # type: ignore[override]
        await super().startup(list(sockets) if sockets else None)
        # asyncio accepts as many connections in one go as its backlog has, so that is small; the kernel's is not.
        for server in self.servers:
            for listener in server.sockets:
                with listener.dup() as twin:  # asyncio's wrapper has no listen()
                    twin.listen(BACKLOG)


def make_server(app: ASGIApp, limits: Limits, **options: Any) -> HttpServer:
    """
    Args:
        options: further ones of uvicorn's.
    """
    protocol = partial(Connection, door=Door(), max_head_seconds=limits.max_head_seconds)
    config = uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]  # it is only called
        ws="none",
        h11_max_incomplete_event_size=limits.max_head_bytes,
        backlog=NUM_A_TURN,
        log_level="warning",
        access_log=False,
        lifespan="off",
        **options,
    )
    return HttpServer(config)
