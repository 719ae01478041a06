"""`Outbox`: messages to the engine process. Requests that are made in one turn of the event loop and share their
parameters, as the prompts of a list do, travel together.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from nybble.core import messages
from nybble.core.request import Request

PROMPTS_A_MESSAGE = 16
"""The engine takes in a message as a whole between two steps, so it must not be large."""


class Outbox:
    """
    Args:
        send: puts bytes on the way without waiting: the socket's queue has no end, and whoever waited would hang where
            the process does.
    """

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send
        self._unsent: list[Request] = []

    def submit(self, request: Request) -> None:
        """At the end of this turn of the loop, or before the next message."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(request)

    def send(self, message: messages.ToEngine) -> None:
        self._flush()
        self._send(messages.encode(message))

    def close(self) -> None:
        """Nobody listens any more."""
        self._unsent = []

    def _flush(self) -> None:
        requests, self._unsent = self._unsent, []
        for _, sharing in itertools.groupby(requests, key=lambda request: id(request.params)):
            group = list(sharing)
            for start in range(0, len(group), PROMPTS_A_MESSAGE):
                batch = group[start : start + PROMPTS_A_MESSAGE]
                self._send(messages.encode(messages.Submit.of(batch[0].params, batch)))
