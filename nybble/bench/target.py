"""`Target`: an OpenAI-compatible server as the bench sees it: what it serves, one request, its metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import msgspec

from nybble.bench.connection import Disconnected, Pool
from nybble.bench.http_reader import MalformedResponse
from nybble.bench.record import Record
from nybble.bench.sse import AnswerReader
from nybble.core.errors import ConfigError

Route = Literal["completions", "chat"]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class TargetSettings(msgspec.Struct, kw_only=True, frozen=True):
    """Where requests go and what all of them have."""

    base_url: str
    model: str
    route: Route = "completions"
    api_key: str | None = None
    ignore_eos: bool = True
    wants_token_ids: bool = False
    body: dict[str, Any] = {}  # sampling, and whatever else the user wants sent
    timeout: float = 600.0  # seconds for one request


class Target:
    """A client of one server, for one event loop."""

    def __init__(self, settings: TargetSettings) -> None:
        self.settings = settings
        self.pool = Pool(settings.base_url, settings.api_key)
        self._body: dict[str, Any] = {
            "model": settings.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if settings.ignore_eos else {}),
            **({"return_token_ids": True} if settings.wants_token_ids else {}),
            **settings.body,
        }

    async def ask(
        self, prompt: str | list[int] | list[dict[str, Any]], num_tokens: int, record: Record, *, keeps_text: bool
    ) -> None:
        """Send one request and read its answer into `record`. A failure is told there, never raised."""
        name = "messages" if self.settings.route == "chat" else "prompt"
        body = msgspec.json.encode({**self._body, name: prompt, "max_tokens": num_tokens})
        message = self.pool.message("POST", PATHS[self.settings.route], body)
        record.num_asked_tokens = num_tokens
        reader = AnswerReader(record, keeps_text)
        whole: list[bytes] = []

        def take(piece: bytes, now: float) -> None:
            reader.feed(piece, now)
            if not record.first_token and len(whole) < 16:
                whole.append(piece)

        record.start = time.perf_counter()
        try:
            async with asyncio.timeout(self.settings.timeout):
                connection = await self.pool.send(message, take)
        except TimeoutError:
            record.fail("timeout", f"no complete answer within {self.settings.timeout:g} s")
        except MalformedResponse as error:
            record.fail("malformed", str(error))
        except (Disconnected, ConnectionResetError, BrokenPipeError) as error:
            record.fail("disconnected", str(error))
        except OSError as error:
            record.fail("connect", error.strerror or str(error))
        else:
            if connection.status != 200:
                record.failure = None  # an error's body is no stream
                record.fail("http", f"{connection.status}: {_error_text(b''.join(whole))}")
            reader.finish(connection.end_time)
        record.end = record.end or time.perf_counter()

    async def fetch(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """The status and body of another route: GET, or POST if there is a body.

        Raises:
            OSError, Disconnected, MalformedResponse, TimeoutError: no answer.
        """
        pieces: list[bytes] = []
        message = (
            self.pool.message("GET", path)
            if body is None
            else self.pool.message("POST", path, msgspec.json.encode(body))
        )
        async with asyncio.timeout(min(self.settings.timeout, 30)):
            connection = await self.pool.send(message, lambda piece, _: pieces.append(piece))
        return connection.status, b"".join(pieces)

    def close(self) -> None:
        self.pool.close()


async def served_model(base_url: str, api_key: str | None, wanted: str | None, preferred: str | None = None) -> str:
    """The name of the model that the server has; checks that it is `wanted`. `preferred`: taken if it has several.

    Raises:
        ConfigError: the server is not there, is no OpenAI API, or has not got it.
    """
    target = Target(TargetSettings(base_url=base_url, model="", api_key=api_key))
    try:
        status, body = await target.fetch("/v1/models")
    except (OSError, Disconnected, MalformedResponse, TimeoutError) as error:
        why = str(error) or type(error).__name__
        raise ConfigError(
            f"no server answers at {target.pool.base_url} ({why}); start one, or give another --base-url"
        ) from None
    finally:
        target.close()
    if status in (401, 403):
        raise ConfigError(f"{target.pool.base_url} wants a key: give --api-key")
    try:
        names = [model["id"] for model in msgspec.json.decode(body)["data"]] if status == 200 else []
    except (msgspec.DecodeError, KeyError, TypeError):
        names = []
    if not names:
        if wanted is not None and status == 404:
            return wanted  # not every server lists its models
        raise ConfigError(
            f"{target.pool.base_url}/v1/models answered {status} and no list of models: is this an OpenAI-compatible "
            "server? --model names one where the server cannot"
        )
    if wanted is None:
        if preferred in names:
            return str(preferred)
        if len(names) > 1:
            raise ConfigError(f"{target.pool.base_url} serves {', '.join(names)}; say which with --model")
        return str(names[0])
    if wanted not in names:
        raise ConfigError(f"{target.pool.base_url} serves {', '.join(names)}, not {wanted}; correct --model")
    return wanted


def _error_text(body: bytes) -> str:
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return repr(body[:200].decode("utf-8", "replace"))
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return str(value)[:300]
