"""Connections of clients that are slow, broken or hostile, against a real server on a port."""

import asyncio
import gc
import logging
import selectors
import socket
import time
import weakref
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.server import connect, make_app, on_port, request_of, run, tiny_tokenizer, until

from nybble.server.collector import QUIET, collect_when_quiet
from nybble.server.settings import Limits
from nybble.server.turns import NUM_A_TURN, NUM_SOCKETS_A_TURN, Door, FewSockets, make_loop

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


async def exchange(url: str, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What the server says until it closes the connection."""
    reader, writer = await connect(url)
    for piece in pieces:
        with suppress(ConnectionError):
            writer.write(piece)
            await writer.drain()
        await asyncio.sleep(pause)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.slow
def test_heads_that_come_slowly_or_not_at_all() -> None:
    async def main() -> None:
        async with on_port(make_app(limits=Limits(max_head_seconds=0.3))) as url:
            for pieces in ((), (b"GET",), (b"GET /", b"health HTTP/1.1\r\n", b"a: b\r\n", *[b"c: d\r\n"] * 10)):
                begin = time.monotonic()
                answer = await exchange(url, *pieces, pause=0.05)
                assert time.monotonic() - begin < 2
                if len(pieces) < 9:  # who goes on writing may not come to read why
                    assert answer.startswith(b"HTTP/1.1 408"), pieces
                    assert b'"error":{"message":"the head of a request took too long' in answer
            # The second head on a connection has its limit too.
            answer = await exchange(url, GET + b"\r\n", GET, pause=0.1)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"HTTP/1.1 408" in answer

    run(main)


def test_a_request_that_runs_is_not_given_up() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        async with on_port(make_app(engine, Limits(max_head_seconds=0.1))) as url:
            reader, writer = await connect(url)
            writer.write(request_of(BODY))
            await asyncio.sleep(0.3)
            engine.first_gate.set()
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()

    run(main)


def test_heads_that_are_too_large_or_no_http() -> None:
    async def main() -> None:
        async with on_port(make_app(limits=Limits(max_head_bytes=2000))) as url:
            for head, status in (
                (GET + b"x: " + b"a" * 3000 + b"\r\n\r\n", b"431"),
                (GET + b"x: y\r\n" * 600 + b"\r\n", b"431"),
                (b"GET /" + b"a" * 3000, b"431"),
                (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
                (b"hello there\r\n\r\n", b"400"),
                (GET + b"Content-Length: x\r\n\r\n", b"400"),
                (GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
                (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            ):
                answer = await exchange(url, head)
                assert answer.startswith(b"HTTP/1.1 " + status), (head[:60], answer)
                assert answer.endswith(b"}}")
            assert (await exchange(url, GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")

    run(main)


def test_requests_sent_at_once_are_answered_in_order() -> None:
    async def main() -> None:
        async with on_port(make_app()) as url:
            models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
            answer = await exchange(url, GET + b"\r\n" + models + request_of(BODY) + GET + b"Connection: close\r\n\r\n")
            assert answer.count(b"HTTP/1.1 200") == 4
            places = [answer.index(text) for text in (b'"status"', b'"object":"list"', b"chat.completion")]
            assert places == sorted(places)

    run(main)


@pytest.mark.slow
def test_a_reader_that_takes_nothing_is_cut_off_without_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer(), tokens_at_once=100)
        assert engine.ready is not None
        engine.ready.max_model_len = 1_000_000
        app = make_app(engine, Limits(max_send_seconds=0.3))
        async with on_port(app) as url:
            body = {**BODY, "stream": True, "ignore_eos": True, "max_tokens": 30_000}
            reader, writer = await connect(url)
            writer.write(request_of(body))
            await until(lambda: engine.num_open == 1)
            await until(lambda: engine.num_open == 0)
            with suppress(ConnectionError):  # the connection is gone, and what was on its way with it
                while await asyncio.wait_for(reader.read(1 << 16), 5):
                    pass
            # A client that goes while there is much to send.
            for _ in range(5):
                reader, writer = await connect(url)
                writer.write(request_of(body))
                await reader.read(100)
                writer.transport.abort()
            await until(lambda: engine.num_open == 0)

    with caplog.at_level(logging.WARNING):
        run(main)
    assert not [record for record in caplog.records if "socket.send()" in record.message]
    assert not [record for record in caplog.records if record.exc_info]


def test_large_bodies_in_pieces_arrive_whole() -> None:
    async def main() -> None:
        async with on_port(make_app()) as url:
            text = "many words " * 40_000
            request = request_of({"prompt": text}, "/tokenize").replace(b"Host: x", b"Host: x\r\nConnection: close")
            pieces = [request[start : start + 50_000] for start in range(0, len(request), 50_000)]
            answers = await asyncio.gather(*(exchange(url, *pieces) for _ in range(3)))
            assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
            assert len({answer.partition(b"\r\n\r\n")[2] for answer in answers}) == 1

    run(main)


def test_the_door_lets_a_few_in_each_turn() -> None:
    async def main() -> None:
        door, seen, turns = Door(), [], []
        for number in range(50):
            door.queue(lambda number=number: seen.append(number))
        while len(seen) < 50:
            await asyncio.sleep(0)
            turns.append(len(seen))
        assert seen == list(range(50))
        assert max(b - a for a, b in pairwise([0, *turns])) == NUM_A_TURN
        door.queue(lambda: seen.append(50))
        await asyncio.sleep(0)
        assert seen[-1] == 50

    run(main)


def test_the_door_stays_open_when_a_reading_fails() -> None:
    async def main() -> None:
        door, seen, failures = Door(), [], []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))
        door.queue(lambda: 1 / 0)
        for number in range(3 * NUM_A_TURN):
            door.queue(lambda number=number: seen.append(number))
        await until(lambda: len(seen) == 3 * NUM_A_TURN)
        assert [type(failure) for failure in failures] == [ZeroDivisionError]

    run(main)


def test_sockets_that_always_have_something_keep_nobody_out() -> None:
    selector = FewSockets()
    pairs = [socket.socketpair() for _ in range(2 * NUM_SOCKETS_A_TURN + 1)]
    for ours, theirs in pairs:
        selector.register(ours, selectors.EVENT_READ)
        theirs.send(b"x")  # and it is never read
    turns = [{key.fd for key, _ in selector.select(0)} for _ in range(3)]
    selector.close()
    for pair in pairs:
        for end in pair:
            end.close()
    assert [len(turn) for turn in turns] == [NUM_SOCKETS_A_TURN] * 3
    assert len(set.union(*turns)) == len(pairs)


def test_a_thousand_sockets_at_once_leave_room_for_others() -> None:
    """Each is read in the end, and in between the loop comes round to everybody else."""
    pairs = [socket.socketpair() for _ in range(5 * NUM_SOCKETS_A_TURN // 2)]
    seen: list[int] = []
    turns: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for index, (ours, theirs) in enumerate(pairs):
            loop.add_reader(ours, lambda ours=ours, index=index: (ours.recv(1), seen.append(index)))
            theirs.send(b"x")
        while len(seen) < len(pairs):
            turns.append(len(seen))
            await asyncio.sleep(0)
        for ours, _ in pairs:
            loop.remove_reader(ours)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main())
    for pair in pairs:
        for end in pair:
            end.close()
    assert sorted(seen) == list(range(len(pairs)))
    assert max(b - a for a, b in pairwise([*turns, len(seen)])) == NUM_SOCKETS_A_TURN


def test_garbage_waits_for_quiet() -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    async def main() -> None:
        before = gc.get_threshold()
        num_open = QUIET + 1
        collecting = asyncio.create_task(collect_when_quiet(lambda: num_open, period_seconds=0.01))
        await asyncio.sleep(0.05)
        ring = weakref.ref(kept := Ring())
        gc.collect(1)  # what lives through this is old
        del kept
        await asyncio.sleep(0.05)
        assert ring() is not None
        num_open = QUIET
        await until(lambda: ring() is None)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        assert gc.get_threshold() == before

    run(main)
