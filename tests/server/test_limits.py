"""What one client may ask for: sizes, depths, counts, and places in the queue."""

import asyncio
import json
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, on_port, run, tiny_tokenizer, until

from nybble.server.limits import shape_complaint
from nybble.server.settings import Limits

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        (b"{}", 1),
        (b"[[]]", 2),
        (b'{"a": [{"b": "]]]]"}], "c": {}}', 3),
        (b'["\\"[[[[[[", [[]], []]', 3),
        (b'"[[[["', 0),
        (b"[[[[[[", 6),
        (b'[[1, 2], [[3], [4, {"a": []}]]]', 5),
    ],
)
def test_depth(body: bytes, depth: int) -> None:
    assert shape_complaint(body, Limits(max_json_depth=max(depth, 1))) is None
    assert depth < 2 or "levels deep" in str(shape_complaint(body, Limits(max_json_depth=depth - 1)))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", [b"[", b"[]", b'"', b'\\"', b'"\\', b'{"a":', b"]", b'["', b"a"])
def test_shape_takes_little_time(piece: bytes) -> None:
    limits = Limits(max_json_containers=1 << 30)
    shape_complaint(piece * ((4 << 20) // len(piece)), limits)
    shape_complaint(b'"' + piece * ((4 << 20) // len(piece)), limits)


def test_sizes_and_counts() -> None:
    limits = Limits(
        max_body_bytes=4000,
        max_json_depth=5,
        max_json_containers=12,
        max_n=2,
        max_logprobs=3,
        max_stops=2,
        max_stop_chars=5,
        max_output_tokens=7,
        max_prompt_tokens=20,
        max_prompts=3,
        max_list_items=4,
    )
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"prompt": "a" * 4000}, 413, None),
        ({"metadata": [[[[[]]]]]}, 400, None),
        ({"metadata": [[]] * 12}, 400, None),
        ({"n": 3}, 400, "n"),
        ({"logprobs": 4}, 400, "logprobs"),
        ({"prompt_logprobs": 4}, 400, "prompt_logprobs"),
        ({"stop": ["a", "b", "c"]}, 400, "stop"),
        ({"stop": "abcdef"}, 400, "stop"),
        ({"bad_words": ["a"] * 5}, 400, "bad_words"),
        ({"stop_token_ids": [1] * 5}, 400, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(5)}}, 400, "logit_bias"),
        ({"max_tokens": 8}, 400, "max_tokens"),
        ({"prompt": [1] * 21}, 400, "prompt"),
        ({"prompt": ["a"] * 4}, 400, "prompt"),
    ]

    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine, limits)) as client:
            for fields, status, parameter in cases:
                response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields})
                assert response.status_code == status, (fields, response.text)
                assert response.json()["error"]["param"] == parameter
            assert engine.requests == []
            response = await client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]})
            assert response.json()["usage"]["completion_tokens"] == 7
            response = await client.post("/v1/completions", json={"prompt": "a"})  # the default is more
            assert response.json()["usage"]["completion_tokens"] == 7

    run(main)


def test_a_body_without_a_length_is_counted() -> None:
    async def main() -> None:
        async def endless() -> Any:
            while True:
                yield b" " * 1000

        async with on_port(make_app(limits=Limits(max_body_bytes=10_000))) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head.encode())
            for _ in range(20):
                writer.write(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 413")
            writer.close()

    run(main)


def test_a_body_that_does_not_come() -> None:
    async def main() -> None:
        async with on_port(make_app(limits=Limits(max_body_seconds=0.1))) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
            writer.close()

    run(main)


def test_content_type_must_be_json() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            content = json.dumps({"prompt": "a"})
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
                response = await client.post("/v1/completions", content=content, headers={"content-type": kind})
                assert response.status_code == 415
            headers = {"content-type": "application/json; charset=utf-8"}
            assert (await client.post("/v1/completions", content=content, headers=headers)).status_code == 200

    run(main)


def test_the_queue_has_an_end() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        app = make_app(engine, Limits(max_queued_requests=3, max_queued_tokens=30))
        admission = app.state.context.admission
        async with in_process(app) as client:

            async def ask(**fields: Any) -> Any:
                return await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **fields})

            # One may enter an empty queue whatever its size.
            waiting = [asyncio.create_task(ask(prompt=[1] * 31))]
            await until(lambda: len(engine.requests) == 1)
            refused = await ask()
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await ask(stream=True)).status_code == 429
            engine.first_gate.set()
            assert (await waiting[0]).status_code == 200
            engine.first_gate.clear()
            waiting = [asyncio.create_task(ask()) for _ in range(3)]
            await until(lambda: len(engine.requests) == 4)
            assert (await ask()).status_code == 429
            assert (await ask(prompt=["a", "b"])).status_code == 429
            waiting[0].cancel()
            engine.first_gate.set()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert (admission.num_completions, admission.num_tokens) == (0, 0)
            assert (await ask()).status_code == 200

    run(main)
