"""`response_format`, `structured_outputs` and forced tools: what the engine is asked for, and how refusals arrive."""

import json
from pathlib import Path
from typing import Any

import pytest
from server.test_tools import ALWAYS_THINKING, CLOCK, HERMES, LLAMA3, MESSAGES, TEMPLATES, THINKING, WEATHER, Served
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

from nybble.core.errors import RequestError
from nybble.core.structured import StructuredOutputs

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
PLAIN_WEATHER = {**WEATHER, "function": {**WEATHER["function"], "strict": False}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def described(**more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}}


ASKED: list[tuple[dict[str, Any], StructuredOutputs | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True, source="response_format")),
    (described(strict=True, description="y"), StructuredOutputs(json=SCHEMA, source="response_format")),
    (described(strict=None), StructuredOutputs(json=SCHEMA, source="response_format")),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, StructuredOutputs(json=SCHEMA)),
    ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
    ({"structured_outputs": {"choice": ["a"]}}, StructuredOutputs(choice=["a"])),
    ({"structured_outputs": {"grammar": "x"}}, StructuredOutputs(grammar="x")),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        StructuredOutputs(json_object=True, disable_any_whitespace=True),
    ),
    (
        {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
        StructuredOutputs(
            structural_tag={"type": "structural_tag", "format": {"type": "any_text"}}, source="response_format"
        ),
    ),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_a_body_asks_for(path: str) -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine)) as client:
            for fields, form in ASKED:
                response = await client.post(
                    path, json={"messages": MESSAGES, "prompt": "a", "max_tokens": 2, **fields}
                )
                assert response.status_code == 200, response.text
                assert engine.requests[-1].params.structured_outputs == form

    run(main)


WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"response_format": value}, "response_format") for value in (5, [], "json", {}, {"type": 5}, {"type": "xml"})),
    *(
        ({"response_format": {"type": "json_schema", "json_schema": value}}, "response_format")
        for value in (None, 5, {}, {"schema": 5}, {"name": 5, "schema": {}}, {"schema": {}, "strict": "x"})
    ),
    (described(schema={"multipleOf": 2}), "response_format"),
    (described(schema={"enum": ["x" * 300_000]}), "response_format"),
    *(
        ({"structured_outputs": value}, "structured_outputs")
        for value in (5, [], "json", {}, {"regex": 5}, {"choice": []}, {"choice": [5]}, {"json": 5}, {"json": "{"})
    ),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "nothing": 1}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"guided_json": SCHEMA}, "guided_json"),
    ({"guided_choice": ["a"]}, "guided_choice"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_wrong_is_named(path: str) -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine)) as client:
            for fields, name in WRONG:
                response = await client.post(path, json={"messages": MESSAGES, "prompt": "a", **fields})
                assert response.status_code == 400, fields
                error = response.json()["error"]
                assert error["param"] == name, fields
                assert len(error["message"]) < 600
                if name.startswith("guided"):
                    assert "structured_outputs" in error["message"]
            assert not engine.requests

    run(main)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_refusal_comes_before_any_header(path: str) -> None:
    async def main() -> None:
        error = RequestError("response_format: it is bad", parameter="response_format")
        async with in_process(make_app(FakeEngine(tiny_tokenizer(), error=error))) as client:
            for streams in (False, True):
                body = {"messages": MESSAGES, "prompt": "a", "stream": streams, **described()}
                response = await client.post(path, json=body)
                assert response.status_code == 400
                assert response.json()["error"]["param"] == "response_format"

    run(main)


def asked(served: Served) -> StructuredOutputs | None:
    return served.engine.requests[-1].params.structured_outputs


def format_of(served: Served) -> dict[str, Any]:
    form = asked(served)
    assert form is not None
    assert form.kind == "structural_tag"
    found: dict[str, Any] = json.loads(form.text)["format"]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_forced_calls(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        served = Served(tmp_path, TEMPLATES[name], "")
        tools = [PLAIN_WEATHER, CLOCK]
        await served.post({"tools": tools, "tool_choice": "required"})
        found = format_of(served)
        assert (len(found["tags"]), found["at_least_one"], found["stop_after_first"]) == (2, True, False)
        assert "weather" in found["tags"][0]["begin"]
        assert '"city"' in json.dumps(found["tags"][0]) or "<parameter=city>" in json.dumps(found["tags"][0])
        await served.post({"tools": tools, "tool_choice": "required", "parallel_tool_calls": False})
        assert format_of(served)["stop_after_first"]
        await served.post({"tools": tools, "tool_choice": NAMED})
        found = format_of(served)
        assert (len(found["tags"]), found["stop_after_first"]) == (1, True)
        await served.post({"tools": tools})
        assert asked(served) is None
        await served.post({"tools": [WEATHER, CLOCK]})
        assert asked(served) is not None, "a strict tool"
        await served.post({"tools": [WEATHER, CLOCK], "tool_choice": "none"})
        assert asked(served) is None
        await served.post({"tools": tools, **described()})
        assert [each["type"] for each in format_of(served)["elements"]] == ["json_schema", "tags_with_separator"]
        strict = {**WEATHER, "function": {**WEATHER["function"], "parameters": {"not": {}}}}
        error = (await served.post({"tools": [strict], "tool_choice": "required"}, 400))["error"]
        assert error["param"] == "tools"
        assert '"not"' in error["message"]

    run(main)


def test_finish_reasons_of_forced_calls(tmp_path: Path) -> None:
    """As OpenAI's server: a function that the client named ends with "stop"."""

    async def main() -> None:
        answer = '<tool_call>\n{"name": "weather", "arguments": {"city": "x", "days": 1}}\n</tool_call>'
        served = Served(tmp_path, HERMES, answer)
        for choice, reason in (("required", "tool_calls"), (NAMED, "stop")):
            body = {"tools": [WEATHER], "tool_choice": choice}
            found = (await served.post(body))["choices"][0]
            assert found["finish_reason"] == reason
            assert found["message"]["tool_calls"][0]["function"]["name"] == "weather"
            assert found["message"]["content"] is None
            chunks = await served.chunks(body)
            assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == reason
        cut = (await served.post({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 12}))["choices"][0]
        assert cut["finish_reason"] == "length"

    run(main)


@pytest.mark.parametrize(
    ("template", "more", "reasoning"),
    [
        (HERMES, {}, None),
        (LLAMA3, {}, None),
        (THINKING, {}, "may_open"),
        (ALWAYS_THINKING, {}, "is_open"),
        (ALWAYS_THINKING.replace("<think>\n{% endif", "<think>\n\n</think>\n\n{% endif"), {}, None),
    ],
)
def test_a_form_waits_for_the_reasoning(tmp_path: Path, template: str, more: dict[str, Any], reasoning: str) -> None:
    async def main() -> None:
        served = Served(tmp_path, template, "")
        for body in (described(), {"structured_outputs": {"regex": "a"}}):
            await served.post({**body, **more})
            form = asked(served)
            assert form is not None
            assert form.reasoning == reasoning
        await served.post({})
        assert asked(served) is None

    run(main)
