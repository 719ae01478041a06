"""An application over a `FakeEngine`, and clients for it: in this process through ASGI, or a real uvicorn on a port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
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
from nybble.server.settings import Limits, ServerSettings
from nybble.text.request_builder import RequestBuilder
from nybble.text.tokenizer import Tokenizer

TINY = Path(nybble.__file__).parent / "assets" / "tiny"


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def make_app(engine: FakeEngine | None = None, limits: Limits | None = None, **settings: Any) -> FastAPI:
    engine = engine or FakeEngine(tiny_tokenizer())
    assert engine.ready is not None
    builder = RequestBuilder(tiny_tokenizer(), engine.ready.default_sampling)
    return create_app(engine, tiny_tokenizer(), builder, ServerSettings(limits=limits or Limits(), **settings))


def in_process(app: FastAPI, root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@asynccontextmanager
async def on_port(app: FastAPI) -> AsyncGenerator[str]:
    """Serve on a free port of this machine; gives the base URL."""
    server = make_server(app, app.state.context.limits, host="127.0.0.1", port=0)
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
