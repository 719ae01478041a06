"""`/v1/completions` over the fake engine: kinds of prompts, echo, scoring, and that streamed and whole agree."""

import json
from typing import Any

import pytest
from support.fake_engine import ANSWER, FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer


def fake(**options: Any) -> FakeEngine:
    return FakeEngine(tiny_tokenizer(), **options)


async def post(engine: FakeEngine, body: dict[str, Any], expected: int = 200) -> dict[str, Any]:
    async with in_process(make_app(engine)) as client:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == expected, response.text
        result: dict[str, Any] = response.json()
        return result


async def chunks_of(engine: FakeEngine, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with in_process(make_app(engine)) as client:
        response = await client.post("/v1/completions", json={**body, "stream": True})
        assert response.status_code == 200, response.text
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [("ab", 1), (["ab", "cd e"], 2), ([67, 68], 1), ([[67], [68, 69], [70]], 3)]
)
def test_prompts(prompt: Any, num_prompts: int) -> None:
    async def main() -> None:
        engine = fake()
        body = await post(engine, {"prompt": prompt, "max_tokens": 3, "n": 2})
        assert len(engine.requests) == num_prompts
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * num_prompts))
        assert {choice["text"] for choice in body["choices"]} == {"Hello there"}
        assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
        assert body["usage"]["completion_tokens"] == 6 * num_prompts
        assert body["usage"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in engine.requests)
        assert body["object"] == "text_completion"

    run(main)


def test_default_is_sixteen_tokens() -> None:
    async def main() -> None:
        assert (await post(fake(), {"prompt": "a"}))["usage"]["completion_tokens"] == 16

    run(main)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
@pytest.mark.parametrize("echo", [False, True])
def test_streamed_says_what_whole_does(tokens_at_once: int, echo: bool) -> None:
    wishes = {
        "prompt": ["What is", "12 + 30?"],
        "n": 2,
        "logprobs": 2,
        "echo": echo,
        "max_tokens": 50,
        "return_token_ids": True,
    }

    async def main() -> None:
        whole = await post(fake(), wishes)
        chunks = await chunks_of(
            fake(tokens_at_once=tokens_at_once), {**wishes, "stream_options": {"include_usage": True}}
        )
        assert chunks[-1]["usage"] == whole["usage"]
        for index, expected in enumerate(whole["choices"]):
            own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
            assert "".join(piece["text"] for piece in own) == expected["text"]
            assert expected["text"] == (wishes["prompt"][index // 2] if echo else "") + ANSWER  # type: ignore[index]
            for name, values in expected["logprobs"].items():
                assert [value for piece in own if piece["logprobs"] for value in piece["logprobs"][name]] == values
            assert [t for piece in own for t in piece.get("token_ids", [])] == expected["token_ids"]
            assert own[0]["prompt_token_ids"] == expected["prompt_token_ids"]
            assert [piece["finish_reason"] for piece in own][-1] == expected["finish_reason"] == "stop"

    run(main)


def test_text_offsets_point_at_the_tokens() -> None:
    async def main() -> None:
        body = await post(fake(), {"prompt": "naïve 😀 test", "echo": True, "logprobs": 1, "max_tokens": 60})
        (choice,) = body["choices"]
        logprobs, text = choice["logprobs"], choice["text"]
        assert len({len(values) for values in logprobs.values()}) == 1
        whole_tokens = 0
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if "\ufffd" not in token and token != "<|im_end|>":  # bytes of a character have no text of their own
                assert text[offset : offset + len(token)] == token
                whole_tokens += 1
        assert whole_tokens > 20
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])

    run(main)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["12 + 30", [67, 68, 69]])
def test_scoring(max_tokens: int, prompt: Any) -> None:
    async def main() -> None:
        engine = fake()
        body = await post(engine, {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens})
        (choice,) = body["choices"]
        token_ids = engine.requests[0].prompt_token_ids
        prompt_text = tiny_tokenizer().decode(token_ids)
        assert choice["text"] == prompt_text + ("Hello" if max_tokens else "")
        assert len(choice["logprobs"]["tokens"]) == len(token_ids) + max_tokens
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(isinstance(value, float) for value in choice["logprobs"]["token_logprobs"][1:])
        assert choice["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == max_tokens

    run(main)


def test_echo_without_logprobs() -> None:
    async def main() -> None:
        body = await post(fake(), {"prompt": "12", "echo": True, "max_tokens": 0})
        assert body["choices"][0]["text"] == "12"
        chunks = await chunks_of(fake(), {"prompt": [67, 68], "echo": True, "max_tokens": 2})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abHello th"

    run(main)


def test_prompt_logprobs() -> None:
    async def main() -> None:
        body = await post(fake(), {"prompt": "abc", "prompt_logprobs": 2, "max_tokens": 1})
        first, second, _ = body["choices"][0]["prompt_logprobs"]
        assert first is None
        assert second["68"] == {"logprob": -0.25, "rank": 1, "decoded_token": "b"}
        error = await post(fake(), {"prompt": "abc", "prompt_logprobs": 2, "stream": True}, expected=400)
        assert error["error"]["param"] == "prompt_logprobs"

    run(main)


def test_max_tokens_0_needs_echo() -> None:
    async def main() -> None:
        error = await post(fake(), {"prompt": "a", "max_tokens": 0}, expected=400)
        assert error["error"]["param"] == "max_tokens"

    run(main)


def test_logprobs_0_gives_the_tokens_own() -> None:
    async def main() -> None:
        body = await post(fake(), {"prompt": "a", "max_tokens": 2, "logprobs": 0})
        assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"Hello": -0.25}, {" th": -0.75}]

    run(main)
