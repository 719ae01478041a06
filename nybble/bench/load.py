"""One client's share of a load: closed loop (a number of streams) or open loop (requests at their times)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec

from nybble.bench.connection import Disconnected
from nybble.bench.http_reader import MalformedResponse
from nybble.bench.record import Record
from nybble.bench.target import Target
from nybble.bench.workload import Turn, Workload

GIVE_UP_AFTER = 3
"""So many requests in a row without a connection: the server has gone, and the rest is not sent."""


class Share(msgspec.Struct, kw_only=True):
    """What one client sends in one part of a run.

    `dues`: seconds after the start for each index; None for a closed loop of `num_streams`, which also limits an open
    loop unless it is 0.
    """

    part: str
    indices: list[int]
    num_streams: int
    dues: list[float] | None = None
    keeps_text: bool = False


class ShareResult(msgspec.Struct, kw_only=True):
    """`cpu_share`: processor time by time of this client, 1 is a whole core. `lag_p99`: seconds that its event loop
    woke later than it should have."""

    records: list[Record]
    cpu_share: float
    lag_p99: float


class Load:
    """Sends shares to one target, from one event loop."""

    def __init__(self, target: Target, workload: Workload) -> None:
        self._target = target
        self._workload = workload
        self.num_done = 0
        self.num_tokens = 0

    async def prepare(self, share: Share) -> list[list[Turn]]:
        """Make the prompts and open connections, so that no request waits for either."""
        num_connections = min(share.num_streams or 64, len(share.indices))
        # If it fails, the requests will say so.
        with suppress(OSError, Disconnected, MalformedResponse):
            await self._target.pool.open(num_connections)
        return [self._workload.conversation(share.part, index) for index in share.indices]

    async def run(self, share: Share, conversations: list[list[Turn]], start_at: float) -> ShareResult:
        """Send what `prepare` made, from `start_at` on (a `time.perf_counter()`)."""
        self.num_done = self.num_tokens = 0
        records: list[Record] = []
        async with _watched() as watch:
            await asyncio.sleep(max(0.0, start_at - time.perf_counter()))
            watch.begin()
            if share.dues is None:
                await self._closed(share, conversations, records)
            else:
                await self._open(share, conversations, [start_at + due for due in share.dues], records)
            watch.end()
        return ShareResult(records=records, cpu_share=watch.cpu_share, lag_p99=watch.lag_p99)

    async def _closed(self, share: Share, conversations: list[list[Turn]], records: list[Record]) -> None:
        waiting = iter(zip(share.indices, conversations, strict=True))

        async def stream() -> None:
            for index, turns in waiting:
                if self._has_gone(records):
                    return
                await self._converse(share, index, turns, 0.0, records)

        await asyncio.gather(*(stream() for _ in range(min(share.num_streams, len(conversations)))))

    async def _open(
        self, share: Share, conversations: list[list[Turn]], dues: list[float], records: list[Record]
    ) -> None:
        limit = asyncio.Semaphore(share.num_streams) if share.num_streams else None

        async def one(index: int, turns: list[Turn], due: float) -> None:
            try:
                await self._converse(share, index, turns, due, records)
            finally:
                if limit is not None:
                    limit.release()

        async with asyncio.TaskGroup() as group:
            for index, turns, due in zip(share.indices, conversations, dues, strict=True):
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                if limit is not None:
                    await limit.acquire()
                    due = time.perf_counter()  # being kept back by the limit is not being late
                if self._has_gone(records):
                    return
                group.create_task(one(index, turns, due))

    async def _converse(self, share: Share, index: int, turns: list[Turn], due: float, records: list[Record]) -> None:
        said: Any = None
        for number, turn in enumerate(turns):
            prompt = turn.prompt if said is None else _after(said, turn.prompt)
            record = Record(index=index, turn=number)
            keeps_text = share.keeps_text or number + 1 < len(turns)
            await self._target.ask(prompt, turn.num_output_tokens, record, keeps_text=keeps_text)
            if due and not number:
                record.late = max(0.0, record.start - due)
            records.append(record)
            self.num_tokens += record.num_output_tokens
            if record.failure:
                break
            said = _after(prompt, record.text if isinstance(prompt, str) else [_answer(record.text)])
        self.num_done += 1

    @staticmethod
    def _has_gone(records: list[Record]) -> bool:
        last = records[-GIVE_UP_AFTER:]
        return len(last) == GIVE_UP_AFTER and all(record.failure == "connect" for record in last)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _after(said: Any, more: Any) -> Any:
    return f"{said} {more}" if isinstance(said, str) else [*said, *more]


class _Watch:
    """This process's work and the event loop's punctuality while a share runs."""

    INTERVAL = 0.01

    def __init__(self) -> None:
        self._lags: list[float] = []
        self.cpu_share = 0.0
        self.lag_p99 = 0.0

    def begin(self) -> None:
        self._lags.clear()
        self._began = time.process_time(), time.perf_counter()

    def end(self) -> None:
        cpu, wall = self._began
        self.cpu_share = (time.process_time() - cpu) / max(1e-9, time.perf_counter() - wall)
        lags = sorted(self._lags)
        self.lag_p99 = lags[len(lags) * 99 // 100] if lags else 0.0

    async def tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(self.INTERVAL)
            self._lags.append(time.perf_counter() - before - self.INTERVAL)


@asynccontextmanager
async def _watched() -> AsyncIterator[_Watch]:
    watch = _Watch()
    task = asyncio.create_task(watch.tick())
    try:
        yield watch
    finally:
        task.cancel()
