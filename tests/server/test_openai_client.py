"""The `openai` package, as its users call it, against a real uvicorn on a port."""

import asyncio
from typing import Any

import openai
import pytest
from support.fake_engine import ANSWER, FakeEngine
from support.server import make_app, on_port, run, tiny_tokenizer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_sync_client() -> None:
    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
            model = client.models.list().data[0].id
            assert client.models.retrieve(model).id == model
            chat = client.chat.completions.create(
                model=model, messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, seed=1, max_completion_tokens=20
            )
            assert len(chat.choices) == 2
            assert chat.choices[0].finish_reason == "length"
            assert chat.choices[0].logprobs is not None
            assert chat.choices[0].logprobs.content is not None
            assert chat.choices[0].logprobs.content[0].top_logprobs[1].bytes
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 40
            chunks = list(
                client.chat.completions.create(
                    model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
                )
            )
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
            assert chunks[-1].usage is not None
            with client.chat.completions.stream(model=model, messages=MESSAGES) as stream:
                kinds = {event.type for event in stream}
                final = stream.get_final_completion()
            assert {"chunk", "content.delta", "content.done"} <= kinds
            assert final.choices[0].message.content == ANSWER
            completion = client.completions.create(model=model, prompt=["a", "b"], logprobs=1, echo=True, max_tokens=2)
            assert completion.choices[1].text == "bHello th"
            assert completion.choices[1].logprobs is not None
            assert completion.choices[1].logprobs.text_offset == [0, 1, 6]
            texts = client.completions.create(model=model, prompt="a", stream=True, max_tokens=3)
            assert "".join(chunk.choices[0].text for chunk in texts) == "Hello there"
            with pytest.raises(openai.NotFoundError, match="no model"):
                client.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError) as raised:
                client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
            assert raised.value.param == "temperature"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"

    async def main() -> None:
        async with on_port(make_app(api_keys=("key",))) as url:
            await asyncio.to_thread(use, url)

    run(main)


def test_async_client() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with on_port(make_app(engine)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:

            async def read() -> str:
                stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert await asyncio.gather(*(read() for _ in range(20))) == [ANSWER] * 20
            whole = await client.chat.completions.create(
                model="fake", messages=MESSAGES, extra_body={"top_k": 5, "return_token_ids": True, "stop": "42"}
            )
            assert whole.choices[0].message.content == ANSWER.partition("42")[0]
            assert engine.requests[-1].params.top_k == 5
            texts = await client.completions.create(model="fake", prompt=[67, 68], max_tokens=2)
            assert texts.choices[0].text == "Hello th"
            assert [model.id async for model in await client.models.list()] == ["fake"]

    run(main)


def test_an_error_inside_a_stream_is_raised() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer(), fail_after=3)
        async with on_port(make_app(engine)) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError, match="engine is not running"):
                async for _ in stream:
                    pass

    run(main)
