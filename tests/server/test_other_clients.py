"""LangChain, litellm and schemathesis, as their users run them, against a real server on a port."""

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.fake_engine import ANSWER, FakeEngine
from support.server import make_app, on_port, run, tiny_tokenizer

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched from the net

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings are those packages' own

NO_LITELLM = "litellm (200 MB) comes with the extra `clients` only: pip install 'nybble[clients]'"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def against(engine: FakeEngine, use: Callable[[str], None], **options: Any) -> None:
    async def main() -> None:
        async with on_port(make_app(engine, api_keys=["key"], admin_keys=["root"], **options)) as url:
            await asyncio.to_thread(use, url)

    run(main)


def test_langchain() -> None:
    langchain = pytest.importorskip("langchain_openai")
    engine = FakeEngine(tiny_tokenizer())

    def use(url: str) -> None:
        chat = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="key", model="fake", temperature=0.3, max_retries=0)
        answer = chat.invoke([("system", "Be brief."), ("user", "hi")])
        assert answer.content == ANSWER
        assert answer.usage_metadata["output_tokens"] > 5
        assert engine.requests[-1].params.temperature == 0.3
        assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == ANSWER
        assert [message.content for message in chat.batch(["a", "b", "c"])] == [ANSWER] * 3
        told = chat.bind(logprobs=True, top_logprobs=2, stop=["42"]).invoke("hi")
        assert told.content == ANSWER.partition("42")[0]
        assert len(told.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
        text = langchain.OpenAI(base_url=f"{url}/v1", api_key="key", model="fake", max_tokens=3)
        assert text.invoke("a") == "Hello there"

    against(engine, use)


def test_langchain_tools() -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    def use(url: str) -> None:
        chat = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="key", model="fake").bind_tools([WEATHER])
        question = HumanMessage("Weather in Łódź?")
        answer = chat.invoke([question])
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Łódź"})
        again = chat.invoke([question, answer, ToolMessage("Rain.", tool_call_id=call["id"])])
        assert again.tool_calls
        whole = None
        for chunk in chat.stream([question]):
            whole = chunk if whole is None else whole + chunk
        assert whole.tool_calls[0]["args"] == {"city": "Łódź"}

    against(FakeEngine(tiny_tokenizer(), CALL), use, tool_call_parser="hermes")


def test_litellm() -> None:
    litellm = pytest.importorskip("litellm", reason=NO_LITELLM)
    engine = FakeEngine(tiny_tokenizer())
    message = [{"role": "user", "content": "hi"}]

    def use(url: str) -> None:
        for provider in ("hosted_vllm", "openai"):
            options = {"model": f"{provider}/fake", "api_base": f"{url}/v1", "api_key": "key", "messages": message}
            answer = litellm.completion(**options, temperature=0.3, n=2, seed=1)
            assert [choice.message.content for choice in answer.choices] == [ANSWER] * 2
            assert engine.requests[-1].params.temperature == 0.3
            chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
            assert litellm.stream_chunk_builder(chunks, messages=message).usage.completion_tokens > 5
            with pytest.raises(litellm.BadRequestError, match="top_p"):
                litellm.completion(**options, top_p=7)
            with pytest.raises(litellm.AuthenticationError):
                litellm.completion(**{**options, "api_key": "wrong"})
        text = litellm.text_completion(
            model="text-completion-openai/fake", api_base=f"{url}/v1", api_key="key", prompt="a", max_tokens=3
        )
        assert text.choices[0].text == "Hello there"

    against(engine, use)


def test_litellm_tools() -> None:
    litellm = pytest.importorskip("litellm", reason=NO_LITELLM)

    def use(url: str) -> None:
        answer = litellm.completion(
            model="hosted_vllm/fake",
            api_base=f"{url}/v1",
            api_key="key",
            messages=[{"role": "user", "content": "Weather in Łódź?"}],
            tools=[{"type": "function", "function": WEATHER}],
            tool_choice="auto",
        )
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Łódź"})

    against(FakeEngine(tiny_tokenizer(), CALL), use, tool_call_parser="hermes")


@pytest.mark.parametrize("key", ["key", "root"])
def test_schemathesis_finds_no_fault_of_the_server(key: str) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error

    statuses: set[int] = set()

    def use(url: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) > 8
        for operation in operations:

            @settings(
                max_examples=40,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy())
            def call(case: Any) -> None:
                case.headers.update(headers)
                response = case.call()
                statuses.add(response.status_code)
                case.validate_response(response, checks=[not_a_server_error])

            call()

    against(FakeEngine(tiny_tokenizer()), use)
    assert {200, 400} <= statuses
