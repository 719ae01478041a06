"""An application over a `FakeEngine`, and clients for it: in this process through ASGI, or a real uvicorn on a port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from support.fake_engine import FakeEngine

import nybble
from nybble.server.app import create_app
from nybble.server.http_server import make_server
from nybble.server.record import Sink
from nybble.server.settings import Limits, ServerSettings
from nybble.text.request_builder import RequestBuilder
from nybble.text.tokenizer import Tokenizer

TINY = Path(nybble.__file__).parent / "assets" / "tiny"


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def make_app(
    engine: FakeEngine | None = None, limits: Limits | None = None, sinks: Sequence[Sink] = (), **settings: Any
) -> FastAPI:
    engine = engine or FakeEngine(tiny_tokenizer())
    assert engine.ready is not None
    builder = RequestBuilder(tiny_tokenizer(), engine.ready.default_sampling)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    known = ServerSettings(limits=limits or Limits(), **settings)
    return create_app(engine, tiny_tokenizer(), builder, known, sinks=sinks)


def in_process(app: FastAPI, root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@asynccontextmanager
async def on_port(app: FastAPI, **options: Any) -> AsyncGenerator[str]:
    """Serve on a free port of this machine; gives the base URL."""
    server = make_server(app, app.state.context.limits, host="127.0.0.1", port=0, **options)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def request_of(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
