"""`BodyLimits`: an ASGI layer that reads each body whole, in bounded time and size, before anyone parses it."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.server.errors import ApiError, bad_request
from nybble.server.record import refuse
from nybble.server.settings import Limits

LARGE = 32 << 10
"""Bytes of a body from which on work on it goes to a thread: the event loop serves everyone."""

HEAD_TOO_LARGE = "the head of the request is too large"

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class BodyLimits:
    """And heads: the protocol's parser bounds only those that come in pieces."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _head_bytes(scope) > self._limits.max_head_bytes:
            error = ApiError(431, HEAD_TOO_LARGE, code="limit_exceeded", headers={"Connection": "close"})
            await refuse(error, scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.max_body_seconds):
                body = await self._read(scope, receive)
            if body is None:  # the client has gone
                return
            await self._check_shape(body)
        except TimeoutError:
            error = ApiError(408, "the body took too long to arrive", headers={"Connection": "close"})
            await refuse(error, scope, receive, send)
            return
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self._limits.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > most:
                raise _too_large(most)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _check_shape(self, body: bytes) -> None:
        limits = self._limits
        if len(body) < LARGE:
            complaint = shape_complaint(body, limits)
        else:
            complaint = await asyncio.to_thread(shape_complaint, body, limits)
        if complaint is not None:
            raise bad_request(complaint, code="limit_exceeded")


def shape_complaint(body: bytes, limits: Limits) -> str | None:
    """What is too much about the arrays and objects of a JSON text. Says nothing useful of what is no JSON.

    Strings are taken out, all else but brackets too, and then pairs of brackets from the inside outwards, one level a
    round: everything is done by C loops.
    """
    brackets = _STRINGS.sub(b"", body).translate(_TO_SQUARE, _NO_BRACKETS)
    if brackets.count(b"[") > limits.max_json_containers:
        return f"the body holds more than {limits.max_json_containers} arrays and objects"
    most = limits.max_json_depth
    for _ in range(most):
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"")
        if not brackets or len(brackets) == before:  # what never closes is no JSON: the parser will say so
            break
    if b"[]" in brackets or brackets.startswith(b"[" * (most + 1)):
        return f"the body is nested more than {most} levels deep"
    return None


def _head_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes", code="limit_exceeded", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands the body out once, and then whatever the connection says: that the client has gone."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
