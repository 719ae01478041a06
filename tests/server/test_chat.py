"""`/v1/chat/completions` over the fake engine: whole and streamed, and that the two agree."""

import json
from typing import Any

import pytest
from support.fake_engine import ANSWER, FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]


async def post(engine: FakeEngine, body: dict[str, Any], expected: int = 200, **settings: Any) -> dict[str, Any]:
    async with in_process(make_app(engine, **settings)) as client:
        response = await client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
        assert response.status_code == expected, response.text
        result: dict[str, Any] = response.json()
        return result


async def chunks_of(engine: FakeEngine, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with in_process(make_app(engine)) as client:
        response = await client.post("/v1/chat/completions", json={"messages": MESSAGES, **body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: ") for event in events[:-1])
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def fake(**options: Any) -> FakeEngine:
    return FakeEngine(tiny_tokenizer(), **options)


def test_whole() -> None:
    async def main() -> None:
        engine = fake(num_cached_tokens=4)
        body = await post(engine, {"model": "fake"})
        assert body["object"] == "chat.completion"
        assert body["model"] == "fake"
        assert body["id"].startswith("chatcmpl-")
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
        assert choice["finish_reason"] == "stop"
        usage = body["usage"]
        num_prompt = len(engine.requests[0].prompt_token_ids)
        num_answer = len(tiny_tokenizer().encode(ANSWER)) + 1  # and the end
        assert usage == {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert engine.requests[0].params.max_tokens is None  # an answer may fill the context
        assert tiny_tokenizer().decode(engine.requests[0].prompt_token_ids, False).endswith("<|im_start|>assistant\n")

    run(main)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
def test_streamed_says_what_whole_does(tokens_at_once: int) -> None:
    wishes = {"n": 2, "logprobs": True, "top_logprobs": 3, "return_token_ids": True, "max_tokens": 20}

    async def main() -> None:
        whole = await post(fake(), wishes)
        engine = fake(tokens_at_once=tokens_at_once)
        chunks = await chunks_of(engine, {**wishes, "stream_options": {"include_usage": True}})
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == ["assistant", "assistant", None]
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"] == engine.requests[0].prompt_token_ids
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        for index in range(2):
            own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
            expected = whole["choices"][index]
            assert "".join(piece["delta"].get("content", "") for piece in own) == expected["message"]["content"]
            assert [t for piece in own for t in piece.get("token_ids", [])] == expected["token_ids"]
            assert [e for p in own if p["logprobs"] for e in p["logprobs"]["content"]] == expected["logprobs"][
                "content"
            ]
            assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["length"]
            assert own[-1]["delta"] == {}

    run(main)


def test_logprobs() -> None:
    async def main() -> None:
        body = await post(fake(), {"logprobs": True, "top_logprobs": 2, "max_tokens": 2})
        first, second = body["choices"][0]["logprobs"]["content"]
        assert first["token"] == "Hello"
        assert first["bytes"] == list(b"Hello")
        assert first["top_logprobs"][0] == {"token": "Hello", "logprob": first["logprob"], "bytes": list(b"Hello")}
        # The second token is only the third likeliest: the two likeliest are shown, and they are not it.
        assert [top["logprob"] for top in second["top_logprobs"]] == [-0.25, -0.5]
        assert second["logprob"] == -0.75
        plain = await post(fake(), {"logprobs": True, "max_tokens": 1})
        assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        named = await post(fake(), {"logprobs": True, "max_tokens": 1, "return_tokens_as_token_ids": True})
        assert named["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")
        scored = await post(fake(), {"prompt_logprobs": 1, "max_tokens": 1})
        assert scored["prompt_logprobs"][0] is None
        assert len(scored["prompt_logprobs"]) == scored["usage"]["prompt_tokens"]

    run(main)


def test_continuous_usage() -> None:
    async def main() -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await chunks_of(fake(tokens_at_once=4), {"max_tokens": 5, "stream_options": options})
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 5, 5, 5]

    run(main)


def test_all_sampling_fields_reach_the_engine() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "seed": 3,
        "min_tokens": 2,
        "stop": ["x", "y"],
        "stop_token_ids": [5, 6],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "bad_words": ["bad"],
        "allowed_token_ids": [1, 2],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }

    async def main() -> None:
        engine = fake()
        more = {
            "max_completion_tokens": 9,
            "max_tokens": 3,
            "logit_bias": {"4": -100},
            "priority": -2,
            "cache_salt": "s",
            "request_id": "mine",
            "user": "someone",
            "some_future_field": {"x": 1},
        }
        body = await post(engine, {**fields, **more})
        (request,) = engine.requests
        assert {name: getattr(request.params, name) for name in fields} == fields
        assert request.params.max_tokens == 9
        assert request.params.logit_bias == {4: -100}
        assert (request.priority, request.cache_salt) == (-2, "s")
        assert body["id"] == "chatcmpl-mine"
        await post(engine, {"request_id": "mine"})  # the client's name for it need not be unique
        assert engine.requests[0].request_id != engine.requests[1].request_id

    run(main)


def test_checkpoint_defaults_apply_where_a_field_is_absent_or_null() -> None:
    async def main() -> None:
        engine = fake()
        assert engine.ready is not None
        engine.ready.default_sampling = {"temperature": 0.25, "max_tokens": 4}
        await post(engine, {"temperature": None})
        await post(engine, {"temperature": 1, "max_tokens": 6})
        assert [(r.params.temperature, r.params.max_tokens) for r in engine.requests] == [(0.25, 4), (1, 6)]

    run(main)


def test_stop_string_and_reason() -> None:
    async def main() -> None:
        body = await post(fake(), {"stop": "42"})
        choice = body["choices"][0]
        assert choice["message"]["content"] == "Hello there! 12 + 30 = "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "42")

    run(main)


def test_template_wishes() -> None:
    async def main() -> None:
        engine = fake()
        open_ended = [*MESSAGES, {"role": "assistant", "content": "It is"}]
        await post(engine, {"messages": open_ended, "continue_final_message": True})
        await post(engine, {"add_generation_prompt": False})
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        await post(engine, {"messages": [{"role": "developer", "content": parts}], "chat_template_kwargs": {"x": 1}})
        texts = [tiny_tokenizer().decode(request.prompt_token_ids, False) for request in engine.requests]
        assert texts[0].endswith("<|im_start|>assistant\nIt is")
        assert texts[1].endswith("30?<|im_end|>\n")
        assert texts[2].startswith("<|im_start|>system\none\ntwo<|im_end|>")
        for name in ("messages", "add_generation_prompt", "tools", "eos_token", "self"):
            error = await post(engine, {"chat_template_kwargs": {name: 1}}, expected=400)
            assert error["error"]["param"] == "chat_template_kwargs"

    run(main)


@pytest.mark.parametrize(
    "content",
    [
        None,
        5,
        [],
        [None],
        ["text"],
        [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}],
        [{"type": "text", "text": 5}],
        {"type": "text", "text": "x"},
    ],
)
def test_content_that_is_no_text(content: Any) -> None:
    async def main() -> None:
        error = await post(fake(), {"messages": [{"role": "user", "content": content}]}, expected=400)
        assert error["error"]["param"] == "messages"

    run(main)


def test_served_model_name() -> None:
    async def main() -> None:
        engine = fake()
        assert (await post(engine, {"model": "mine"}, served_model_name="mine"))["model"] == "mine"
        error = await post(engine, {"model": "fake"}, 404, served_model_name="mine")
        assert error["error"]["code"] == "model_not_found"
        assert error["error"]["param"] == "model"

    run(main)
