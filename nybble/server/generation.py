"""`generate`: several engine requests run at once, and what comes of them is one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from nybble.core.log import logger
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.server.admission import Admission
from nybble.server.errors import ApiError

News = tuple[int, list[SequenceDelta]]
"""Which of the requests, and its deltas."""


class Client(Protocol):
    """The part of `EngineClient` that generating needs."""

    def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]: ...


async def generate(client: Client, requests: Sequence[Request], admission: Admission) -> AsyncGenerator[News]:
    """Yield what comes of `requests` until all are finished. Closing the generator aborts those that are not.

    Raises:
        RequestError, EngineDeadError: from any of them; the others are aborted.
        ApiError: the queue is full, or the engine failed in one of them.
    """
    ticket = admission.enter(requests)  # here, for a generator that never starts never leaves either
    source = _one(client, requests[0]) if len(requests) == 1 else _merged(client, requests)
    num_waiting = len(requests)
    seen = [False] * num_waiting
    try:
        async with aclosing(source) as news:
            async for item in news:
                index, deltas = item
                if not seen[index]:
                    seen[index] = True
                    ticket.begun(index)
                for delta in deltas:
                    if delta.finish_reason == "error":
                        # The reason may hold the engine's internals, so it goes to the log only.
                        logger.error("%s failed: %s", delta.request_id, delta.error)
                        raise ApiError(500, "the engine failed while serving this request", code="engine_error")
                yield item
    finally:
        ticket.close()


async def _one(client: Client, request: Request) -> AsyncGenerator[News]:
    async with aclosing(client.stream(request)) as stream:
        async for deltas in stream:
            yield 0, deltas


async def _merged(client: Client, requests: Sequence[Request]) -> AsyncGenerator[News]:
    queue: asyncio.Queue[News | Exception | None] = asyncio.Queue()

    async def run(index: int, request: Request) -> None:
        try:
            async with aclosing(client.stream(request)) as stream:
                async for deltas in stream:
                    queue.put_nowait((index, deltas))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(run(index, request)) for index, request in enumerate(requests)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
