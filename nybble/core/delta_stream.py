"""`DeltaStream`: one request's deltas on their way to the event loop that reads them. Owns what was not read yet."""

from __future__ import annotations

import asyncio

from nybble.core.errors import RequestError
from nybble.core.outputs import SequenceDelta


class DeltaStream:
    """Made in the loop that reads it, where `give`, `fail` and `take` belong too.

    Args:
        num_completions: the request's n.
    """

    def __init__(self, num_completions: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_open = num_completions  # completions whose last delta was not taken yet
        self.num_to_come = num_completions  # completions whose last delta was not sent yet; counted by whoever sends
        self._deltas: list[SequenceDelta] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def give(self, delta: SequenceDelta) -> None:
        if delta.refused_parameter is not None:
            self.fail(RequestError(delta.error or "", parameter=delta.refused_parameter))
            return
        self._deltas.append(delta)
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()

    async def take(self) -> list[SequenceDelta]:
        """What has come since the last call; waits for at least one delta. After them raises what `fail` got."""
        while not self._deltas and self._error is None:
            self._news.clear()
            await self._news.wait()
        deltas, self._deltas = self._deltas, []
        if not deltas and self._error is not None:
            self.num_open = 0  # nothing is left to abort
            raise self._error
        self.num_open -= sum(delta.finish_reason is not None for delta in deltas)
        return deltas
