"""API keys: an ASGI layer around the whole application, so that no route can be forgotten.

Open are /health, which load balancers ask, and the page at /, which holds no data. A key becomes a prefix-cache salt:
what one client's prompts left in the cache cannot be timed by another. Control routes ask for an admin key, which opens
all others too.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import NamedTuple

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from nybble.server.errors import ApiError
from nybble.server.record import refuse

OPEN_PATHS = frozenset({"/", "/health"})


class Holder(NamedTuple):
    """Who has a key."""

    salt: str
    is_admin: bool


class ApiKeys:
    """The layer. Without `keys` everyone may use what is not for admins; all without a key have the same salt."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        self._app = app
        # Digests have one length, so that comparing them takes the same time whatever is sent.
        self._holders = {
            hashlib.sha256(key.encode()).digest(): Holder(_key_salt(key), is_admin)
            for group, is_admin in ((keys, False), (admin_keys, True))
            for key in group
        }
        self._is_closed = any(not holder.is_admin for holder in self._holders.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in OPEN_PATHS
        holder = self._holder_of(scope) if self._holders else None
        if holder is None and self._is_closed and not is_open:
            await _refuse(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key_salt"] = holder.salt if holder else ""
        state["is_admin"] = holder is not None and holder.is_admin
        await self._app(scope, receive, send)

    def _holder_of(self, scope: Scope) -> Holder | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for known, holder in self._holders.items():  # to the end, so that the time does not tell which key it was
            if hmac.compare_digest(known, digest):
                found = holder
        return found if scheme.lower() == b"bearer" else None


def need_admin(request: Request) -> None:
    """What control routes depend on.

    Raises:
        ApiError: the request has no admin key.
    """
    if not request.state.is_admin:
        raise ApiError(
            403,
            "this route needs an admin key, which the server takes with --admin-key or --admin-key-file",
            code="admin_key_needed",
        )


def combined_salt(key_salt: str, request_salt: str | None) -> str:
    """The prefix-cache salt of a request. No two pairs of a server give the same one: a key's part has a fixed length,
    and who has none cannot guess another's."""
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
    await refuse(error, scope, receive, send)
