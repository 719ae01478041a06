"""Errors are OpenAI's bodies with the right status, before a stream begins and inside one."""

import json
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

from nybble.core.errors import EngineDeadError, RequestError
from nybble.core.outputs import SequenceDelta

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def fake(**options: Any) -> FakeEngine:
    return FakeEngine(tiny_tokenizer(), **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "parameter", "shown"),
    [
        (RequestError("too long", parameter="max_tokens"), 400, "max_tokens", "too long"),
        (EngineDeadError("secret reason"), 503, None, "engine is not running"),
        (ValueError("secret reason"), 500, None, "its log says why"),
        (OSError("secret reason"), 500, None, "its log says why"),
    ],
)
def test_what_the_engine_raises(stream: bool, error: Exception, status: int, parameter: str | None, shown: str) -> None:
    async def main() -> None:
        async with in_process(make_app(fake(error=error))) as client:
            response = await client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
            assert response.status_code == status
            body = response.json()["error"]
            assert set(body) == {"message", "type", "param", "code"}
            assert body["param"] == parameter
            assert shown in body["message"]
            assert "secret" not in response.text

    run(main)


def test_engine_dies_in_the_middle() -> None:
    async def main() -> None:
        async with in_process(make_app(fake(fail_after=3))) as client:
            response = await client.post(CHAT, json={"messages": MESSAGES, "stream": True})
            assert response.status_code == 200
            *events, last, end = response.text.split("\n\n")
            assert len(events) == 4  # the role and three tokens
            assert end == ""
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
            assert "secret" not in response.text
            whole = await client.post(CHAT, json={"messages": MESSAGES})
            assert whole.status_code == 503
            many = await client.post("/v1/completions", json={"prompt": ["a", "b"]})
            assert many.status_code == 503

    run(main)


class EndingEngine(FakeEngine):
    """Ends each completion after two tokens for a reason from outside."""

    reason: Any = "error"

    def _completion(self, request: Any, index: int) -> list[SequenceDelta]:
        deltas = super()._completion(request, index)[:2]
        end = SequenceDelta(
            request_id=request.request_id, index=index, finish_reason=self.reason, error="secret reason"
        )
        return [*deltas, end]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_in_the_engine(stream: bool) -> None:
    async def main() -> None:
        async with in_process(make_app(EndingEngine(tiny_tokenizer()))) as client:
            response = await client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
            assert response.status_code == (200 if stream else 500)
            assert '"code":"engine_error"' in response.text
            assert "secret" not in response.text

    run(main)


def test_a_request_that_is_aborted_in_the_engine() -> None:
    async def main() -> None:
        engine = EndingEngine(tiny_tokenizer())
        engine.reason = "abort"
        async with in_process(make_app(engine)) as client:
            response = await client.post(CHAT, json={"messages": MESSAGES})
            choice = response.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello th", "abort")
            scored = {"prompt": "ab", "echo": True, "logprobs": 1, "n": 2}
            assert (await client.post("/v1/completions", json=scored)).status_code == 200

    run(main)


def test_routes_that_are_not_there() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            for method, path, status in (
                ("GET", "/nothing", 404),
                ("POST", "/nothing", 404),
                ("GET", CHAT, 405),
                ("DELETE", "/health", 405),
                ("GET", "/v1/models/unknown/name", 404),
                ("GET", "/docs", 404),
            ):
                response = await client.request(method, path)
                assert response.status_code == status
                assert response.json()["error"]["message"]

    run(main)


UNSUPPORTED = [
    ("/v1/completions", {"suffix": "x"}),
    ("/v1/completions", {"best_of": 3}),
    ("/v1/completions", {"logits_processors": ["x"]}),
    ("/v1/completions", {"use_beam_search": True}),
    ("/v1/completions", {"prompt_embeds": "AAAA"}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    (CHAT, {"tool_choice": "required"}),
    (CHAT, {"functions": [{"name": "f"}]}),
    (CHAT, {"response_format": {"type": "grammar"}}),
    (CHAT, {"structured_outputs": {"whitespace_pattern": " "}}),
    ("/v1/completions", {"guided_regex": "a"}),
    (CHAT, {"guided_json": {}}),
    (CHAT, {"modalities": ["text", "audio"]}),
    (CHAT, {"audio": {"voice": "x"}}),
    (CHAT, {"chat_template": "{{ x }}"}),
    (CHAT, {"reasoning_effort": "low"}),
    (CHAT, {"function_call": {"name": "f"}}),
    (CHAT, {"include_reasoning": False}),
    (CHAT, {"store": True}),
    ("/v1/completions", {"service_tier": "flex"}),
    ("/v1/completions", {"thinking_token_budget": 5}),
]


@pytest.mark.parametrize(("path", "field"), UNSUPPORTED)
def test_unsupported_fields_are_named(path: str, field: dict[str, Any]) -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            response = await client.post(path, json={"messages": MESSAGES, "prompt": "a", **field})
            assert response.status_code == 400
            error = response.json()["error"]
            (name,) = field
            assert error["param"] == name
            assert name in error["message"]

    run(main)


def test_values_that_ask_for_nothing_pass() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            idle: dict[str, Any] = {"response_format": {"type": "text"}, "best_of": 2, "n": 2, "store": False}
            idle |= {"tools": [], "tool_choice": "none", "modalities": ["text"], "suffix": None, "logit_bias": None}
            idle |= {"max_tokens": 2, "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto"}
            for path in (CHAT, "/v1/completions"):
                response = await client.post(path, json={"messages": MESSAGES, "prompt": "a", **idle})
                assert response.status_code == 200, response.text

    run(main)


def test_out_of_range_names_the_field() -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 0}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"1": 101}}),
        ("logit_bias", {"logit_bias": [1]}),
        ("stop", {"stop": [""]}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("max_tokens", {"max_tokens": -5}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("request_id", {"request_id": "a\nb"}),
        ("cache_salt", {"cache_salt": ""}),
        ("model", {"model": "other"}),
    ]

    async def main() -> None:
        async with in_process(make_app()) as client:
            for name, fields in wrong:
                response = await client.post(CHAT, json={"messages": MESSAGES, **fields})
                assert response.status_code in (400, 404), (fields, response.text)
                assert response.json()["error"]["param"] == name, response.text

    run(main)


def test_long_prompts_are_refused_before_they_queue() -> None:
    async def main() -> None:
        engine = fake()
        async with in_process(make_app(engine)) as client:
            for path, body in (
                ("/v1/completions", {"prompt": "word " * 3000}),
                ("/v1/completions", {"prompt": [1] * 512}),
                (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}),
            ):
                response = await client.post(path, json=body)
                assert response.status_code == 400
                assert response.json()["error"]["code"] == "context_length_exceeded"
            assert engine.requests == []

    run(main)


def test_health_says_whether_the_engine_serves() -> None:
    async def main() -> None:
        engine = fake()
        async with in_process(make_app(engine)) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.head("/health")).status_code == 200
            engine.is_serving = False
            assert (await client.get("/health")).status_code == (await client.head("/health")).status_code == 503
            assert (await client.post(CHAT, json={"messages": MESSAGES})).status_code == 503
            engine.is_serving, engine.ready = True, None
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/v1/models")).status_code == 503

    run(main)


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_a_priority_that_changes_nothing_is_refused(body: dict[str, Any]) -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        async with in_process(make_app(engine)) as client:
            assert (await client.post(path, json={**body, "priority": 5})).status_code == 200
            assert engine.ready is not None
            engine.ready.settings = {"scheduling_policy": "fcfs"}
            assert (await client.post(path, json={**body, "priority": 0})).status_code == 200
            refused = await client.post(path, json={**body, "priority": 5})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")

    run(main)
