"""`generate`: several engine requests run at once, and what comes of them is one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from nybble.core.log import logger
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.server.admission import Ticket
from nybble.server.context import Client, Context
from nybble.server.errors import ApiError
from nybble.server.job import Job

News = tuple[int, list[SequenceDelta]]
"""Which of the requests, and its deltas."""


async def generate(job: Job, context: Context) -> AsyncGenerator[News]:
    """Yield what comes of a job's requests until all are finished. Closing the generator aborts those that are not.

    Raises:
        RequestError, EngineDeadError: from any of them; the others are aborted.
        ApiError: the queue is full, one waited there for too long, or the engine failed in one.
    """
    requests = job.requests
    ticket = context.admission.enter(requests)  # here, for a generator that never starts never leaves either
    source = _one(context.client, requests[0]) if len(requests) == 1 else _merged(context.client, requests)
    try:
        async with aclosing(source), aclosing(_begun_in_time(source, ticket)) as news:
            async for item in news:
                index, deltas = item
                job.hear(deltas)
                if ticket.is_waiting:
                    ticket.begun(index)
                for delta in deltas:
                    if delta.finish_reason == "error":
                        # The reason may hold the engine's internals, so it goes to the log only.
                        logger.error("%s failed: %s", delta.request_id, delta.error)
                        raise ApiError(500, "the engine failed while serving this request", code="engine_error")
                yield item
    finally:
        ticket.close()


async def _begun_in_time(source: AsyncGenerator[News], ticket: Ticket) -> AsyncGenerator[News]:
    """The same, unless something is still waiting when the ticket has expired."""
    while ticket.is_waiting:
        try:
            async with asyncio.timeout_at(ticket.expires):
                item = await anext(source, None)
        except TimeoutError:
            raise ticket.too_late() from None
        if item is None:
            return
        yield item
    async for item in source:
        yield item


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
