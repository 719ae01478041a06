"""Control routes, for whoever runs the server: they act on everybody's requests, so they ask for the admin key."""

from __future__ import annotations

import msgspec
from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from nybble.server.auth import need_admin
from nybble.server.body import check_content_type, read_body
from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.openapi import body_of
from nybble.server.protocol import AbortRequest


def add_control_routes(app: FastAPI, context: Context) -> None:
    admins_only = [Depends(need_admin)]

    @app.post("/reset_prefix_cache", dependencies=admins_only)
    async def reset_prefix_cache() -> Response:
        """No request that comes later finds a prefix of before."""
        context.ready()
        context.client.reset_prefix_cache()
        return Response()

    @app.post("/abort_requests", dependencies=admins_only, openapi_extra=body_of(AbortRequest))
    async def abort_requests(request: Request) -> Response:
        """End running requests by the ids of their responses, or all of them."""
        check_content_type(request)
        body = read_body(await request.body(), AbortRequest, {})
        if (body.request_ids is None) == (not body.abort_all):
            raise bad_request("give either request_ids or abort_all = true", "request_ids", "invalid_value")
        wanted = frozenset(body.request_ids or ())
        # The engine's id of a request is its response's, and a number.
        found = [name for name in context.client.open_ids if body.abort_all or name.rpartition("-")[0] in wanted]
        for name in found:
            context.client.abort(name)
        return Response(msgspec.json.encode({"num_aborted": len(found)}), media_type="application/json")
