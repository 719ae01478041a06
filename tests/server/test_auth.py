"""With keys, every route asks for one: the route table is walked, so that a new route cannot be forgotten."""

import re
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

from nybble.core.request import Request
from nybble.server.auth import OPEN_PATHS, combined_salt

KEYS = ("first-key", "second-key")
ADMIN = "admin-key"
CONTROL = {("POST", "/reset_prefix_cache"), ("POST", "/abort_requests")}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    found = []
    for route in app.routes:
        assert isinstance(route, BaseRoute)
        path = re.sub(r"\{[^}]*\}", "x", getattr(route, "path", ""))
        assert path, f"{route} has no path: teach this test about it"
        found += [(method, path) for method in getattr(route, "methods", None) or ("GET",)]
    return found


def test_every_route_asks_for_a_key() -> None:
    async def main() -> None:
        app = make_app(api_keys=KEYS, admin_keys=[ADMIN])
        routes = routes_of(app)
        assert ("POST", "/v1/chat/completions") in routes
        assert ("GET", "/openapi.json") in routes
        assert {"/", "/health"} == OPEN_PATHS
        async with in_process(app) as client:
            for method, path in [*routes, ("GET", "/not/there"), ("OPTIONS", "/v1/models")]:
                response = await client.request(method, path)
                if (method, path) in CONTROL:
                    for key in KEYS:
                        headers = {"Authorization": f"Bearer {key}"}
                        assert (await client.request(method, path, headers=headers)).status_code == 403, path
                    headers = {"Authorization": f"Bearer {ADMIN}"}
                    assert (await client.request(method, path, headers=headers)).status_code in (200, 415)
                if path in OPEN_PATHS and method in ("GET", "HEAD"):
                    assert response.status_code in (200, 404)
                    continue
                assert response.status_code == 401, (method, path)
                if method != "HEAD":
                    assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"

            assert set(routes) >= CONTROL
            headers = {"Authorization": f"Bearer {ADMIN}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200

    run(main)


def test_without_an_admin_key_nobody_controls() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine)) as client, in_process(make_app(engine, admin_keys=[ADMIN])) as admins:
            for method, path in CONTROL:
                for each in (client, admins):
                    assert (await each.request(method, path)).status_code == 403
            assert (await admins.get("/v1/models")).status_code == 200  # a key for admins closes nothing else
            assert engine.num_resets == 0

    run(main)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-key2", "first-key", "Basic first-key", "Bearer FIRST-KEY"],
)
def test_wrong_keys(header: str) -> None:
    async def main() -> None:
        async with in_process(make_app(api_keys=KEYS)) as client:
            response = await client.get("/v1/models", headers={"Authorization": header})
            assert response.status_code == 401
            for path in ("//v1/models", "/health/../v1/models", "/health/", "/v1/models?x=/health", "/%2e/v1/models"):
                assert (await client.get(path, headers={"Authorization": header})).status_code == 401

    run(main)


def test_each_key_has_its_own_salt() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine, api_keys=KEYS)) as client:
            for key in (*KEYS, KEYS[0]):
                for salt in (None, "mine"):
                    body = {"prompt": "a", "max_tokens": 1, "cache_salt": salt}
                    headers = {"authorization": f"bearer {key}"}
                    response = await client.post("/v1/completions", json=body, headers=headers)
                    assert response.status_code == 200, response.text

        def salts(requests: list[Request]) -> list[str]:
            return [request.cache_salt for request in requests]

        first, second, again = (salts(engine.requests[start : start + 2]) for start in (0, 2, 4))
        assert first == again
        assert len({*first, *second}) == 4
        assert not any(key in salt for key in KEYS for salt in (*first, *second))

    run(main)


def test_without_keys_all_are_let_in() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.get("/v1/models", headers={"Authorization": "Bearer any"})).status_code == 200

    run(main)


def test_two_authorization_headers_are_refused() -> None:
    async def main() -> None:
        async with in_process(make_app(api_keys=KEYS)) as client:
            headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")]
            assert (await client.get("/v1/models", headers=headers)).status_code == 401

    run(main)


def test_salts_cannot_be_forged() -> None:
    assert combined_salt("", None) == ""
    assert combined_salt("", "a") == "a"
    assert combined_salt("k", "a") != combined_salt("k", None)


def test_a_path_prefix_opens_nothing_more() -> None:
    async def main() -> None:
        async with in_process(make_app(api_keys=KEYS), root_path="/api") as client:
            assert (await client.get("/api/health")).status_code == 200
            for path in ("/api/v1/models", "/v1/models", "/apihealth", "/api/health/x", "/api/openapi.json"):
                assert (await client.get(path)).status_code == 401
            headers = {"Authorization": "Bearer first-key"}
            assert (await client.get("/api/v1/models", headers=headers)).status_code == 200

    run(main)


def test_a_websocket_is_refused() -> None:
    async def main() -> None:
        sent = []

        async def send(message: Any) -> None:
            sent.append(message["type"])

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}
        await make_app(api_keys=KEYS)(scope, receive, send)
        assert sent == ["websocket.close"]

    run(main)
