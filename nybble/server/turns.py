"""Work on requests, done so that the event loop keeps turning for the streams that run.

`Turnstile` lets a few new requests in each turn of the loop, however many arrive at once; `Workers` reads small bodies
there and then, and large ones in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.server.limits import LARGE

NUM_A_TURN = 8
NUM_THREADS = 2
"""Few, for the tokenizer takes some hundred bytes of memory for each token it makes."""

Result = TypeVar("Result")


class Turnstile:
    """An ASGI layer, the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._places = asyncio.Semaphore(NUM_A_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            async with self._places:
                await asyncio.sleep(0)  # a place is kept for a turn
        await self._app(scope, receive, send)


class Workers:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nybble-large-body")

    async def call(self, function: Callable[..., Result], content: bytes, *args: Any) -> Result:
        """Call `function` with a body, which it only computes on."""
        if len(content) < LARGE:
            return function(content, *args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, content, *args)
