"""API keys: an ASGI layer around the whole application, so that no route can be forgotten.

Open are /health, which load balancers ask, and the page at /, which holds no data. A key becomes a prefix-cache salt:
what one client's prompts left in the cache cannot be timed by another.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.server.errors import ApiError

OPEN_PATHS = frozenset({"/", "/health"})


class ApiKeys:
    """The layer. Without keys it lets everyone in, all with the same salt."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        # Digests have one length, so that comparing them takes the same time whatever is sent.
        self._salts = {hashlib.sha256(key.encode()).digest(): _key_salt(key) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._salts:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in OPEN_PATHS
        salt = self._salt_of(scope)
        if salt is None and not is_open:
            await _refuse(scope, receive, send)
            return
        scope.setdefault("state", {})["key_salt"] = salt or ""
        await self._app(scope, receive, send)

    def _salt_of(self, scope: Scope) -> str | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known, salt in self._salts.items():  # to the end, so that the time does not tell which key it was
            if hmac.compare_digest(known, digest):
                found = salt
        return found if scheme.lower() == b"bearer" else None


def combined_salt(key_salt: str, request_salt: str | None) -> str:
    """The prefix-cache salt of a request. No two pairs of a server give the same one: a key's part has a fixed length,
    and all requests have one or none has."""
    return ":".join(part for part in (key_salt, request_salt) if part)


def _key_salt(key: str) -> str:
    return hashlib.sha256(b"nybble prefix cache\0" + key.encode()).hexdigest()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = ApiError(
        401,
        "this server needs an API key: send it as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
    )
    await error.response()(scope, receive, send)
