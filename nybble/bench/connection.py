"""`Connection` and `Pool`: HTTP/1.1 requests over kept TCP or TLS connections, straight on asyncio's transports.

Why not an HTTP library: they hand each piece of a body to a waiting task, which costs about as much again as reading it
does, and delays the time stamp. Here a piece is stamped and read in the callback that receives it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from nybble.bench.http_reader import HttpReader, MalformedResponse
from nybble.core.errors import ConfigError


class Disconnected(Exception):
    """The connection ended before the response. `is_unused`: nothing of the response had come."""

    def __init__(self, message: str, *, is_unused: bool = False) -> None:
        super().__init__(message)
        self.is_unused = is_unused


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._reader = HttpReader(self._head, self._body, self._end)
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._take: Callable[[bytes, float], None] | None = None
        self._now = 0.0
        self._has_head = False
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.end_time = 0.0
        self.is_open = False

    async def exchange(self, request: bytes, take: Callable[[bytes, float], None]) -> None:
        """Send a request; `take` gets each piece of the body and the time it came. Returns at the end of the body.

        Raises:
            Disconnected: the connection ended too early.
            MalformedResponse: no HTTP.
        """
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._take = take
        self._has_head = False
        if not self.is_open:
            raise Disconnected("the server had closed the connection", is_unused=True)
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._done = self._take = None

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._reader.feed(data)
        except MalformedResponse as error:
            self._fail(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exception: Exception | None) -> None:
        self.is_open = False
        if self._done is None:
            return
        self._now = time.perf_counter()
        if self._has_head and exception is None and self._reader.feed_end():
            return
        why = str(exception) if exception else "the server closed the connection"
        self._fail(Disconnected(why, is_unused=not self._has_head))

    # of the HttpReader

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self._has_head = True
        self.status, self.headers = status, headers

    def _body(self, piece: bytes) -> None:
        if self._take is not None:
            self._take(piece, self._now)

    def _end(self, is_persistent: bool) -> None:
        self.end_time = self._now
        self.is_open = self.is_open and is_persistent
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: Exception) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Pool:
    """Connections to one server.

    Args:
        base_url: `http://` or `https://`, host, port, and a path that the requests' paths are put behind.
        api_key: sent as a bearer token.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url {base_url}: must look like http://127.0.0.1:8000")
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"--base-url {base_url}: {error}") from None
        self._host = parts.hostname
        self._path = parts.path.rstrip("/").removesuffix("/v1")  # people give it with and without
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        name = f"[{self._host}]" if ":" in self._host else self._host
        self._common = f"Host: {name}:{self._port}\r\nUser-Agent: nybble-bench\r\n"
        if api_key:
            self._common += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []
        self.base_url = f"{parts.scheme}://{name}:{self._port}{self._path}"

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request's bytes."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._common}"
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body

    async def open(self, num_connections: int) -> None:
        """Have so many connections ready, so that no request waits for one.

        Raises:
            OSError: the server cannot be reached.
        """
        for _ in range(num_connections - len(self._idle)):
            self._idle.append(await self._connect())

    async def send(self, request: bytes, take: Callable[[bytes, float], None]) -> Connection:
        """Send a request on a kept connection or a new one; returns it, for the status and the end's time.

        Raises:
            OSError, Disconnected, MalformedResponse: no complete response.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                await connection.exchange(request, take)
            except Disconnected as error:
                if error.is_unused:  # it was closed while idle
                    continue
                raise
            return self._keep(connection)
        connection = await self._connect()
        await connection.exchange(request, take)
        return self._keep(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _keep(self, connection: Connection) -> Connection:
        if connection.is_open:
            self._idle.append(connection)
        else:
            connection.close()
        return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection
