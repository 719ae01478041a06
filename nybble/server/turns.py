"""Work on requests, done so that the event loop keeps turning for the streams that run.

`FewSockets` gives the loop a few sockets a turn, however many have something; `Door` lets what a few connections have
sent in; `Workers` reads small bodies there and then, and large ones in threads.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from nybble.server.limits import LARGE

NUM_SOCKETS_A_TURN = 64
NUM_A_TURN = 4
NUM_THREADS = 2
"""Few, for the tokenizer takes some hundred bytes of memory for each token it makes."""

Result = TypeVar("Result")


class FewSockets(selectors.DefaultSelector):
    """A thousand connections that close at once are a thousand callbacks: timers and streams come in between.

    What is left over comes first in the next turn. The system would name sockets that always have something first each
    time, and as many of them as a turn takes would keep the others out for good.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[int, int] = {}  # file descriptor → its place among those left over

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout)
        if self._left:
            ready.sort(key=lambda each: self._left.get(each[0].fd, len(self._left)))  # stable
        self._left = {key.fd: place for place, (key, _) in enumerate(ready[NUM_SOCKETS_A_TURN:])}
        return ready[:NUM_SOCKETS_A_TURN]


def make_loop() -> asyncio.AbstractEventLoop:
    """The event loop that a server runs on."""
    return asyncio.SelectorEventLoop(FewSockets())


class Door:
    """Where everything that has to be read waits for its turn."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def queue(self, read: Callable[[], None]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._open)
        self._waiting.append(read)

    def _open(self) -> None:
        try:
            for _ in range(min(NUM_A_TURN, len(self._waiting))):
                self._waiting.popleft()()
        finally:  # one that fails must not leave the others standing
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._open)


class Workers:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nybble-large-body")

    async def call(self, function: Callable[..., Result], content: bytes, *args: Any) -> Result:
        """Call `function` with a body, which it only computes on."""
        if len(content) < LARGE:
            return function(content, *args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, content, *args)
