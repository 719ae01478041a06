"""One record for each HTTP request: its id, its line in the log, its span."""

import asyncio
import json
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, on_port, run, tiny_tokenizer, until

from nybble.core.log import JsonFormatter, TextFormatter, ThreadedHandler
from nybble.server.record import RequestRecord, access_log, write_access_line
from nybble.server.settings import Limits
from nybble.server.tracing import Tracer

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def test_every_answer_has_an_id_and_every_request_a_record() -> None:
    async def main() -> None:
        records: list[RequestRecord] = []
        app = make_app(api_keys=["k"], sinks=[records.append])
        async with in_process(app) as client:
            key = {"authorization": "Bearer k"}
            named = await client.post(CHAT, json=BODY, headers={**key, "x-request-id": "abc-1"})
            assert named.headers["x-request-id"] == "abc-1"
            assert named.json()["id"] == "chatcmpl-abc-1"
            streamed = await client.post(CHAT, json={**BODY, "stream": True, "n": 2}, headers=key)
            assert streamed.status_code == 200
            for answer in (
                await client.get("/v1/models"),
                await client.post(CHAT, json={**BODY, "n": 0}, headers=key),
                await client.get("/nowhere", headers=key),
                await client.post(CHAT, content=b"[" * 1000, headers=key),
                await client.post(CHAT, json=BODY, headers={**key, "x-request-id": "a b\n"}),
            ):
                assert len(answer.headers["x-request-id"]) == 32
        assert [record.status for record in records] == [200, 200, 401, 400, 404, 400, 200]
        shown = [record.fields() for record in records]
        assert shown[0]["request_id"] == "abc-1"
        assert shown[0]["path"] == CHAT
        assert shown[0]["response_id"] == "chatcmpl-abc-1"
        assert (shown[0]["completion_tokens"], shown[0]["finish_reasons"], shown[0]["stream"]) == (5, "length", False)
        assert shown[0]["prompt_tokens"] > 1
        assert 0 < shown[0]["ttft_seconds"] <= shown[0]["seconds"]
        assert (shown[1]["n"], shown[1]["completion_tokens"], shown[1]["stream"]) == (2, 10, True)
        assert shown[2]["error"] == "invalid_api_key"
        assert shown[3]["error"] == "invalid_request_error"
        assert "model" not in shown[3]
        assert [line.get("error") for line in shown[4:]] == ["not_found", "limit_exceeded", None]

    run(main)


def test_who_went_and_what_failed_is_recorded() -> None:
    async def main() -> None:
        records: list[RequestRecord] = []
        engine = FakeEngine(tiny_tokenizer(), fail_after=3)
        async with in_process(make_app(engine, sinks=[records.append])) as client:
            await client.post(CHAT, json={**BODY, "stream": True})
        assert (records[0].status, records[0].error) == (200, "engine_dead")
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        async with on_port(make_app(engine, sinks=[records.append])) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            body = json.dumps(BODY)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            writer.write(f"{head}\r\n\r\n{body}".encode())
            await until(lambda: engine.num_open == 1)
            writer.close()
            await until(lambda: len(records) == 2)
            assert (records[1].status, records[1].error) == (499, "client_gone")
            del reader

    run(main)


def test_a_request_that_waits_too_long_leaves_the_queue() -> None:
    async def main() -> None:
        records: list[RequestRecord] = []
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        app = make_app(engine, Limits(max_queue_seconds=0.1), sinks=[records.append])
        async with in_process(app) as client:
            for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": ["a", "b"], "n": 2}):
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "queue_timeout"
                assert int(answer.headers["retry-after"]) >= 1
                assert engine.num_open == 0
                assert app.state.context.admission.num_completions == 0
            # What has begun may take its time.
            engine.first_gate.set()
            engine.gate = asyncio.Event()
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"}))
            await asyncio.sleep(0.3)
            engine.gate.set()
            assert (await task).status_code == 200
        assert [record.error for record in records] == ["queue_timeout"] * 3 + [None]

    run(main)


def test_all_completions_count_in_the_queue() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        app = make_app(engine, Limits(max_queued_requests=10, max_queued_tokens=100))
        async with in_process(app) as client:

            async def ask(prompt: Any, n: int) -> int:
                body = {"prompt": prompt, "n": n, "max_tokens": 1, "temperature": 1}
                return (await client.post("/v1/completions", json=body)).status_code

            first = asyncio.create_task(ask([[1] * 5, [2] * 5], 3))
            admission = app.state.context.admission
            await until(lambda: admission.num_completions == 6)
            assert admission.num_tokens == 30
            assert await ask([1], 5) == 429
            assert await ask([1] * 24, 3) == 429
            second = asyncio.create_task(ask([1], 4))
            await until(lambda: admission.num_completions == 10)
            engine.first_gate.set()
            assert await asyncio.gather(first, second) == [200, 200]
            assert (admission.num_completions, admission.num_tokens) == (0, 0)

    run(main)


def logged(formatter: logging.Formatter, record: RequestRecord) -> str:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    handler.setFormatter(formatter)
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    try:
        write_access_line(record)
    finally:
        access_log.removeHandler(handler)
        access_log.setLevel(logging.NOTSET)
    return "\n".join(lines)


def test_lines_of_the_log() -> None:
    record = RequestRecord("id-1", "GET", "/v1/models%0Ax", "1.2.3.4:5", [], status=200)
    record.end = record.begin + 0.25
    line = json.loads(logged(JsonFormatter(), record))
    assert (line["request_id"], line["status"], line["seconds"], line["level"]) == ("id-1", 200, 0.25, "info")
    assert line["logger"] == "nybble.access"
    assert line["time"].endswith("Z")
    assert "request_id=id-1 method=GET path=/v1/models%0Ax status=200" in logged(TextFormatter(), record)
    record.path = "/health"
    assert logged(TextFormatter(), record) == ""
    record.status = 503
    assert "status=503" in logged(TextFormatter(), record)


def test_exceptions_are_one_line_of_json() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("nybble", logging.ERROR, "", 0, "failed %s", ("x",), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: a\nb" in json.loads(text)["exception"]


def test_a_full_disk_and_a_pipe_that_nobody_reads_delay_no_one() -> None:
    log = logging.Logger("test")
    with suppress(OSError), open("/dev/full", "w") as full:  # closing it writes once more
        handler = ThreadedHandler(full)
        log.addHandler(handler)
        for _ in range(100):
            log.error("x" * 1000)
        handler.flush()
        log.removeHandler(handler)
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        handler = ThreadedHandler(pipe)
        log.addHandler(handler)
        begin = time.monotonic()
        for _ in range(300):
            log.error("x" * 1000)  # a pipe holds 64 KiB
        assert time.monotonic() - begin < 1
        received = []
        reader = threading.Thread(target=lambda: received.append(os.read(reading, 1 << 20)))
        reader.start()
        reader.join()
        while b"the end" not in received[-1]:
            log.error("the end")
            received.append(os.read(reading, 1 << 20))
        handler.flush()
    os.close(reading)


def test_spans_of_requests() -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

    async def main() -> None:
        app = make_app(sinks=[tracer.record])
        async with in_process(app) as client:
            parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
            assert (await client.post(CHAT, json={**BODY, "temperature": 0.5}, headers=parent)).status_code == 200
            assert (await client.get("/v1/models", headers=parent)).status_code == 200
            assert (await client.post("/v1/completions", json={"prompt": ["a", "b"]})).status_code == 200

    exporter = export.InMemorySpanExporter()
    tracer = Tracer("http://nowhere", exporter)
    run(main)
    tracer.close()
    chat, completion = exporter.get_finished_spans()
    assert chat.name == "llm_request"
    assert chat.context.trace_id == int("ab" * 16, 16)
    assert chat.parent.span_id == int("cd" * 8, 16)
    assert chat.attributes["gen_ai.usage.completion_tokens"] == 5
    assert chat.attributes["gen_ai.request.temperature"] == 0.5
    assert chat.attributes["gen_ai.response.model"] == "fake"
    assert 0 < chat.attributes["gen_ai.latency.time_to_first_token"] <= chat.attributes["gen_ai.latency.e2e"]
    assert chat.end_time - chat.start_time == pytest.approx(chat.attributes["gen_ai.latency.e2e"] * 1e9, rel=0.01)
    assert completion.parent is None
    assert completion.attributes["gen_ai.usage.num_sequences"] == 2


def test_browsers_are_let_in_only_from_known_origins() -> None:
    async def main() -> None:
        ours, theirs = "https://example.org", "https://example.com"
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        async with (
            in_process(make_app(api_keys=["k"], allow_origins=[ours])) as some,
            in_process(make_app(api_keys=["k"])) as none,
            in_process(make_app(allow_origins=["*"])) as every,
        ):
            for client, origin, is_allowed in (
                (some, ours, True), (some, theirs, False), (none, ours, False), (every, theirs, True)
            ):  # fmt: skip
                asked = await client.options(CHAT, headers={"Origin": origin, **preflight})
                assert (asked.status_code == 200) == is_allowed
                answer = await client.post(CHAT, json=BODY, headers={"Origin": origin, "Authorization": "Bearer k"})
                assert ("access-control-allow-origin" in answer.headers) == is_allowed
                assert answer.headers.get("access-control-allow-credentials") is None
            refused = await some.post(CHAT, json=BODY, headers={"Origin": ours})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == ours  # so that the page can read why

    run(main)


def test_nothing_is_redirected_and_links_follow_the_root_path() -> None:
    async def main() -> None:
        async with on_port(make_app(), root_path="/some/root") as url, in_process(make_app()) as client:
            import httpx

            async with httpx.AsyncClient(base_url=url) as proxied:  # a proxy has taken the prefix off
                for path in ("/health", "/v1/models", "/"):
                    assert (await proxied.get(path)).status_code == 200
                schema = (await proxied.get("/openapi.json")).json()
                assert schema["servers"] == [{"url": "/some/root"}]
                page = (await proxied.get("/")).text
                assert not [link for link in ('href="/', 'src="/', 'fetch("/', "fetch('/", "fetch(`/") if link in page]
            for path in ("/v1/models/", "/health/", "/tokenize/"):
                assert (await client.get(path)).status_code in (404, 405), path

    run(main)
