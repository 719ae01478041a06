"""`Clients`: client processes that send one part of a run together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Self

import msgspec

from nybble.bench.load import Load, Share, ShareResult
from nybble.bench.target import Target, TargetSettings
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.core.errors import MeasurementError, NybbleError

NEWS_INTERVAL = 0.2
START_DELAY = 0.05
"""Seconds from when the last client is ready to the first request."""


class _Job(msgspec.Struct, tag=True):
    target: TargetSettings
    workload: WorkloadSettings


class _Ready(msgspec.Struct, tag=True):
    pass


class _Start(msgspec.Struct, tag=True):
    at: float


class _News(msgspec.Struct, tag=True):
    num_done: int
    num_tokens: int


class _Failed(msgspec.Struct, tag=True):
    message: str


class _Result(ShareResult, tag=True):
    pass


_Message = _Ready | _News | _Failed | _Result
_encode = msgspec.msgpack.Encoder().encode


class Clients:
    """Started once for a run, so that connections and imports are warm.

    Args:
        num_clients: processes.
    """

    def __init__(self, num_clients: int, target: TargetSettings, workload: WorkloadSettings) -> None:
        context = multiprocessing.get_context("spawn")
        job = _encode(_Job(target, workload))
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(num_clients):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(theirs, job), daemon=True, name=f"client {number}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        part: str,
        num_conversations: int,
        num_streams: int,
        dues: list[float] | None = None,
        *,
        keeps_text: bool = False,
        on_news: Callable[[int, int], None] = lambda num_done, num_tokens: None,
    ) -> list[ShareResult]:
        """Send a part: conversation i goes to client i mod n, a closed loop's streams are spread evenly.

        Args:
            on_news: called now and then with conversations done and tokens received.

        Raises:
            MeasurementError: a client process failed.
        """
        num_used = max(1, min(len(self._pipes), num_conversations, num_streams or num_conversations))
        pipes = self._pipes[:num_used]
        for number, pipe in enumerate(pipes):
            indices = list(range(number, num_conversations, num_used))
            share = Share(
                part=part,
                indices=indices,
                num_streams=len(range(number, num_streams, num_used)),
                dues=None if dues is None else [dues[i] for i in indices],
                keeps_text=keeps_text,
            )
            pipe.send_bytes(_encode(share))
        for pipe in pipes:
            while not isinstance(self._receive(pipe), _Ready):
                pass
        begin = _encode(_Start(time.perf_counter() + START_DELAY))
        for pipe in pipes:
            pipe.send_bytes(begin)
        news = dict.fromkeys(pipes, (0, 0))
        results: dict[Connection, ShareResult] = {}
        while len(results) < num_used:
            for ready in wait([pipe for pipe in pipes if pipe not in results], timeout=1.0):
                assert isinstance(ready, Connection)
                message = self._receive(ready)
                if isinstance(message, _News):
                    news[ready] = (message.num_done, message.num_tokens)
                elif isinstance(message, _Result):
                    results[ready] = message
            on_news(sum(done for done, _ in news.values()), sum(tokens for _, tokens in news.values()))
        return [results[pipe] for pipe in pipes]

    def _receive(self, pipe: Connection) -> _Message:
        try:
            message: _Message = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Message)
        except (EOFError, ConnectionResetError):
            raise MeasurementError("a client process ended by itself; is there enough memory?") from None
        if isinstance(message, _Failed):
            raise MeasurementError(message.message)
        return message

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle client leaves
        for process in self._processes:
            process.terminate()
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _main(pipe: Connection, job_bytes: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            asyncio.run(_serve(pipe, msgspec.msgpack.decode(job_bytes, type=_Job)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            pipe.send_bytes(_encode(_Failed(str(error) if isinstance(error, NybbleError) else repr(error))))


async def _serve(pipe: Connection, job: _Job) -> None:
    target = Target(job.target)
    load = Load(target, Workload(job.workload))
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)  # a collection amid a part would look like the server's delay
    while True:
        share = msgspec.msgpack.decode(pipe.recv_bytes(), type=Share)
        conversations = await load.prepare(share)
        pipe.send_bytes(_encode(_Ready()))
        start = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Start)
        telling = asyncio.create_task(_tell(pipe, load))
        result = await load.run(share, conversations, start.at)
        telling.cancel()
        pipe.send_bytes(_encode(_Result(records=result.records, cpu_share=result.cpu_share, lag_p99=result.lag_p99)))
        gc.collect()


async def _tell(pipe: Connection, load: Load) -> None:
    while True:
        await asyncio.sleep(NEWS_INTERVAL)
        pipe.send_bytes(_encode(_News(load.num_done, load.num_tokens)))
