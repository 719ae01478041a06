"""Streamed tokens a second through the HTTP server alone: a real uvicorn, and an engine that answers at once.

    python -m benchmarks.server_streams --streams 128 --tokens 500
    python -m benchmarks.server_streams --burst 2000
    python -m benchmarks.server_streams --tokens 20 --requests 80 --go 10    # 51,200 requests, each tenth one left

The server is a process of its own; this one is the client: raw sockets, all streams at once, one request after another
on each connection. The engine "steps" as fast as the event loop lets it and gives every open stream one token a step,
so each token is an event, and a write, of its own. In a burst so many clients ask for one token at once, on new
connections and then once more on the same ones. Event-loop lag is how much later than asked a 5 ms sleep ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import nybble
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request

WORDS = [" the", " naïve", " server", "\n", " tokens", ' "quoted"', " 42", " streams"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=500, help="a request")
    parser.add_argument("--requests", type=int, default=2, help="on each connection, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--go", type=int, metavar="N", help="each N-th request's client goes in the middle of it")
    parser.add_argument("--burst", type=int, metavar="N", help="N requests at once, in place of the streams")
    parser.add_argument("--route", choices=["chat", "completions"], default="chat")
    parser.add_argument("--profile", metavar="FILE", help="write the server's cProfile statistics")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.profile)
    else:
        asyncio.run(measure(options))


async def measure(options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "benchmarks.server_streams", "--serve"]
    command += ["--profile", options.profile] if options.profile else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        await run_round(port, options, num_requests=1)  # warm up
        server.send_signal(signal.SIGUSR1)  # forget what was measured so far
        rates, resident = [], []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            if options.burst:
                num = await run_burst(port, options)
            else:
                num = await run_round(port, options, options.requests)
            rates.append(num / (time.perf_counter() - begin))
            resident.append(resident_mib(server.pid))
    finally:
        server.send_signal(signal.SIGUSR2)
    report = json.loads(server.stdout.readline())
    server.wait()
    if options.burst:
        print(f"bursts of {options.burst} requests, {options.route}, {options.rounds} rounds")
    else:
        print(f"{options.streams} streams of {options.tokens} tokens, {options.route}, {options.rounds} rounds")
    unit = "requests" if options.burst else "tokens"
    print(f"{unit}/s: median {statistics.median(rates):,.0f} (from {min(rates):,.0f} to {max(rates):,.0f})")
    print(f"resident after each round: {', '.join(map(str, resident))} MiB")
    print("server: " + ", ".join(f"{name} {value}" for name, value in report.items()))


def resident_mib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


async def run_burst(port: int, options: argparse.Namespace) -> int:
    """Plain sockets, all connected and written to before any is read."""
    request = request_of(options, {"max_tokens": 1})
    connections = []
    for _ in range(options.burst):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        connections.append(connection)
    for is_last in (False, True):
        for connection in connections:
            received = b""
            while b"}]" not in received:  # of the choices
                piece = connection.recv(1 << 16)
                assert piece, "the server closed the connection"
                received += piece
            assert received.startswith(b"HTTP/1.1 200"), received
        if not is_last:
            for connection in connections:
                connection.sendall(request)
    for connection in connections:
        connection.close()
    return 2 * options.burst


async def run_round(port: int, options: argparse.Namespace, num_requests: int) -> int:
    request = request_of(
        options, {"stream": True, "max_tokens": options.tokens, "stream_options": {"include_usage": True}}
    )
    counts = await asyncio.gather(
        *(run_stream(port, request, num_requests, options, first) for first in range(options.streams))
    )
    return sum(counts)


def request_of(options: argparse.Namespace, body: dict[str, Any]) -> bytes:
    if options.route == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Say something."}]
    else:
        path, body["prompt"] = "/v1/completions", "Say something."
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def run_stream(port: int, request: bytes, num_requests: int, options: argparse.Namespace, first: int) -> int:
    """Returns the tokens that came. `first`: where this client begins to count the requests it leaves."""
    num_tokens = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(first, first + num_requests):
        writer.write(request)
        if options.go and number % options.go == 0:
            await reader.readuntil(b"\ndata: ")  # it has begun
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            piece = await reader.read(1 << 16)
            assert piece, "the server closed the connection"
            received += piece
        # One event for each token; the others say role, end and usage.
        assert received.count(b"\ndata: ") >= options.tokens + 2, received[-500:]
        assert f'"completion_tokens":{options.tokens},'.encode() in received, received[-500:]
        assert b"data: [DONE]\n\n" in received
        num_tokens += options.tokens
    writer.close()
    return num_tokens


class InstantEngine:
    """An `EngineClient` whose steps take no time."""

    def __init__(self, ready: Any) -> None:
        self.ready = ready
        self.is_serving = True
        self._open: dict[str, _Stream] = {}
        self._stepping: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]:
        stream = self._open[request.request_id] = _Stream(request)
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step())
        try:
            is_open = True
            while is_open:
                await stream.news.wait()
                stream.news.clear()
                deltas, stream.deltas = stream.deltas, []
                yield deltas
                is_open = deltas[-1].finish_reason is None
        finally:
            self._open.pop(request.request_id, None)

    async def _step(self) -> None:
        while self._open:
            for request_id, stream in list(self._open.items()):
                stream.num_tokens += 1
                is_last = stream.num_tokens == stream.request.params.max_tokens
                stream.deltas.append(
                    SequenceDelta(
                        request_id=request_id,
                        index=0,
                        token_ids=[stream.num_tokens],
                        text=WORDS[stream.num_tokens % len(WORDS)],
                        finish_reason="length" if is_last else None,
                    )
                )
                stream.news.set()
                if is_last:
                    del self._open[request_id]
            await asyncio.sleep(0)
        self._stepping = None


class _Stream:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_tokens = 0
        self.deltas: list[SequenceDelta] = []
        self.news = asyncio.Event()


def serve(profile: str | None) -> None:
    import cProfile

    profiler = cProfile.Profile() if profile else None
    if profiler is not None:
        profiler.enable()
    from nybble.server.turns import make_loop

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(_serve())
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)


async def _serve() -> None:
    from nybble.server.app import create_app
    from nybble.server.collector import collect_when_quiet
    from nybble.server.http_server import make_server
    from nybble.server.settings import Limits, ServerSettings
    from nybble.text.request_builder import RequestBuilder
    from nybble.text.tokenizer import Tokenizer

    class Ready:
        model, max_model_len, vocab_size, default_sampling = "instant", 1 << 20, 4096, {}

    tokenizer = Tokenizer.load(Path(nybble.__file__).parent / "assets" / "tiny")
    settings = ServerSettings(limits=Limits(max_queued_requests=1 << 20))
    engine = InstantEngine(Ready)
    app = create_app(engine, tokenizer, RequestBuilder(tokenizer, {}), settings)
    server = make_server(app, settings.limits, port=0)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    collecting = asyncio.create_task(collect_when_quiet(lambda: engine.num_open))
    lags: list[float] = []
    begin = [time.process_time(), time.perf_counter()]

    def forget() -> None:
        lags.clear()
        begin[:] = time.process_time(), time.perf_counter()

    def leave() -> None:  # on a signal that uvicorn does not raise again
        server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, forget)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, leave)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    while not serving.done():
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        lags.append(time.perf_counter() - before - 0.005)
    collecting.cancel()
    lags.sort()
    report = {
        "lag p50 (ms)": round(lags[len(lags) // 2] * 1e3, 1),
        "lag p99 (ms)": round(lags[len(lags) * 99 // 100] * 1e3, 1),
        "lag max (ms)": round(lags[-1] * 1e3, 1),
        "CPU": f"{(time.process_time() - begin[0]) / (time.perf_counter() - begin[1]):.0%}",
        "open requests": engine.num_open,
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "peak memory (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
