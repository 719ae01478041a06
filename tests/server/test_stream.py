"""Clients that go, that do not read, and that come in thousands, against a real uvicorn."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.server import connect, make_app, on_port, request_of, run, tiny_tokenizer, until

from nybble.server.settings import Limits

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 400}


def fake(**options: Any) -> FakeEngine:
    return FakeEngine(tiny_tokenizer(), **options)


def test_a_client_that_goes_is_aborted() -> None:
    async def main() -> None:
        for held_at_first, body, path in (
            (False, {**BODY, "stream": True}, CHAT),
            (True, {**BODY, "stream": True}, CHAT),
            (True, BODY, CHAT),
            (False, BODY, CHAT),
            (True, {"prompt": ["a", "b", "c"]}, "/v1/completions"),
            (False, {"prompt": ["a", "b", "c"], "stream": True}, "/v1/completions"),
        ):
            engine = fake()
            engine.gate = asyncio.Event()
            engine.first_gate = asyncio.Event()
            if not held_at_first:
                engine.first_gate.set()
            app = make_app(engine)
            num = len(body.get("prompt", "1"))
            async with on_port(app) as url:
                _, writer = await connect(url)
                writer.write(request_of(body, path))
                await until(lambda e=engine, n=num: e.num_open == n)
                writer.close()
                await until(lambda e=engine: e.num_open == 0)
                assert len(engine.aborted) == num
                admission = app.state.context.admission
                await until(lambda a=admission: (a.num_completions, a.num_tokens) == (0, 0))

    run(main)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_given_up() -> None:
    async def main() -> None:
        engine = fake(tokens_at_once=1000)
        assert engine.ready is not None
        engine.ready.max_model_len = 100_000
        async with on_port(make_app(engine, Limits(max_send_seconds=0.2))) as url:
            _, writer = await connect(url)
            writer.write(request_of({**BODY, "stream": True, "max_tokens": 50_000}))
            await until(lambda: engine.num_open == 1)
            await until(lambda: engine.num_open == 0)
            assert len(engine.aborted) == 1
            writer.close()

    run(main)


def test_one_connection_serves_many_requests() -> None:
    async def main() -> None:
        async with on_port(make_app()) as url, httpx.AsyncClient(base_url=url) as client:
            for stream in (True, False, True):
                response = await client.post(CHAT, json={**BODY, "stream": stream, "max_tokens": 5})
                assert response.status_code == 200
            wrong = await client.post(CHAT, json={**BODY, "n": 0})
            assert wrong.status_code == 400
            assert (await client.post(CHAT, json=BODY)).status_code == 200

    run(main)


@pytest.mark.slow
def test_large_bodies_and_many_that_wait_do_not_stall_the_loop() -> None:
    async def main() -> None:
        engine = fake()
        assert engine.ready is not None
        engine.ready.max_model_len = 10_000_000
        engine.first_gate = asyncio.Event()
        app = make_app(engine, Limits(max_queued_requests=5000, max_prompt_chars=1 << 23))
        lags = []

        async def watch() -> None:
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                lags.append(time.perf_counter() - before - 0.005)

        async with on_port(app) as url:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
                connections = [await connect(url) for _ in range(400)]
                for _, writer in connections:
                    writer.write(request_of({"prompt": ["a", "b", "c", "d", "e"], "max_tokens": 1}, "/v1/completions"))
                await until(lambda: engine.num_open == 2000)
                watching = asyncio.create_task(watch())
                large = {"prompt": "many words of a long prompt " * 100_000, "max_tokens": 1}
                tokenize = await client.post("/tokenize", json={"prompt": large["prompt"]})
                assert tokenize.status_code == 200
                await asyncio.sleep(0.2)
                watching.cancel()
                lags.sort()
                # The client runs in this loop too, and makes and reads the large bodies in it.
                assert lags[len(lags) * 90 // 100] < 0.05
                assert (await client.get("/health")).status_code == 200
                engine.first_gate.set()
                for reader, writer in connections:
                    assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
                    writer.close()
                await until(lambda: engine.num_open == 0)
                assert app.state.context.admission.num_completions == 0

    run(main)
