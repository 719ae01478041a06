"""Tool calls and reasoning in `/v1/chat/completions` over the fake engine, whole and streamed: the two agree."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.server import TINY, in_process, make_app, on_port, run, tiny_tokenizer

from nybble.core.errors import ConfigError
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.server.answer import WholeChoice
from nybble.server.app import create_app
from nybble.server.reading import Reader, Reading
from nybble.server.responses import ChatChunkChoice
from nybble.server.settings import ServerSettings
from nybble.text.request_builder import RequestBuilder
from nybble.text.tokenizer import Tokenizer

HERMES = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content + "" }}
{%- for call in m.tool_calls %}{{ "\n" }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3_CODER = HERMES.replace(
    '{"name": ..., "arguments": ...}', "<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>"
)
LLAMA3 = HERMES.replace(
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>', '<|start_header_id|>{"name": "x", "parameters": {}}'
).replace("tool_call>", "x>")
TEMPLATES = {"hermes": HERMES, "qwen3_coder": QWEN3_CODER, "llama3_json": LLAMA3}
THINKING = HERMES + "{# </think> #}"
ALWAYS_THINKING = THINKING + "{%- if add_generation_prompt %}<think>\n{% endif %}"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather — of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": None}}
TOOLS = [WEATHER, CLOCK]
MESSAGES: Any = [{"role": "user", "content": "Weather in Łódź?"}]
ARGUMENTS = {"city": "Łódź 😀", "days": 2}


def written(form: str, *, with_second: bool = True, arguments: dict[str, Any] = ARGUMENTS) -> str:
    """Calls as the models of a format write them."""
    if form == "qwen3_coder":
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        first = f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>"
        return first + ("\n<tool_call>\n<function=clock>\n</function>\n</tool_call>" if with_second else "")
    text = json.dumps(arguments, ensure_ascii=False)
    if form == "llama3_json":
        first = f'{{"name": "weather", "parameters": {text}}}'
        return first + ('; {"name": "clock", "parameters": {}}' if with_second else "")
    first = f'<tool_call>\n{{"name": "weather", "arguments": {text}}}\n</tool_call>'
    return first + ('\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>' if with_second else "")


class Served:
    """A fake engine and its application over a checkpoint with a chat template."""

    def __init__(
        self,
        path: Path,
        template: str,
        answer: str = "",
        tokens_at_once: int = 1,
        special: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        config = json.loads((TINY / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        size = tiny_tokenizer().vocab_size
        declared = {str(size + place): {"content": tag, "special": True} for place, tag in enumerate(special)}
        config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **declared}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
        self.tokenizer = Tokenizer.load(path)
        self.engine = FakeEngine(self.tokenizer, answer, tokens_at_once=tokens_at_once)
        assert self.engine.ready is not None
        self.engine.ready.model_path = str(path)
        self.engine.ready.max_model_len = 8192
        builder = RequestBuilder(self.tokenizer, {})
        self.app: FastAPI = create_app(self.engine, self.tokenizer, builder, ServerSettings(**settings))

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.requests[-1].prompt_token_ids, False)

    async def post(self, body: dict[str, Any], expected: int = 200, path: str = "/v1/chat/completions") -> Any:
        async with in_process(self.app) as client:
            response = await client.post(path, json={"messages": MESSAGES, **body})
            assert response.status_code == expected, response.text
            return response.json()

    async def chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        async with in_process(self.app) as client:
            whole = {"messages": MESSAGES, **body, "stream": True, "stream_options": {"include_usage": True}}
            response = await client.post("/v1/chat/completions", json=whole)
            assert response.status_code == 200, response.text
            events = response.text.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that a stream's chunks add up to, as a whole body has it; checks each delta's shape."""
    message: dict[str, Any] = {"content": None}
    choice: dict[str, Any] = {"message": message, "finish_reason": None, "token_ids": [], "logprobs": []}
    for chunk in chunks:
        for piece in chunk["choices"]:
            if piece["index"] != index:
                continue
            assert choice["finish_reason"] is None, "a piece after the end"
            delta = piece["delta"]
            for key in ("content", "reasoning_content"):
                if delta.get(key) is not None:
                    message[key] = (message.get(key) or "") + delta[key]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if "id" in call:
                    assert call["index"] == len(calls)
                    assert call["type"] == "function"
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                else:
                    assert call["index"] == len(calls) - 1
                    assert set(call["function"]) == {"arguments"}
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            choice["token_ids"] += piece.get("token_ids", [])
            if piece["logprobs"]:
                choice["logprobs"] += piece["logprobs"]["content"]
                assert len(piece["logprobs"]["content"]) == len(piece["token_ids"])
            choice["finish_reason"] = piece["finish_reason"]
            if piece["finish_reason"]:
                assert delta == {}
                choice["stop_reason"] = piece["stop_reason"]
    return choice


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids are made anew for each answer; `role` and `refusal` are told elsewhere."""
    kept = {key: value for key, value in message.items() if key not in ("role", "refusal")}
    if "tool_calls" in kept:
        ids = [call["id"] for call in kept["tool_calls"]]
        assert len(set(ids)) == len(ids)
        assert all(name.startswith("call_") for name in ids)
        kept["tool_calls"] = [{**call, "id": ""} for call in kept["tool_calls"]]
    return kept


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]


ANSWERS = {
    "two calls": written,
    "one call": lambda form: written(form, with_second=False),
    "text before": lambda form: "Let me look — 😀.\n\n" + written(form),
    "text only": lambda form: "It rains. 3 < 4, {x}",
    "malformed": lambda form: written(form).replace("weather", "").replace("clock", ""),
    "cut off": lambda form: written(form)[:60],
}


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("kind", ANSWERS)
def test_streamed_says_what_whole_does(tmp_path: Path, form: str, kind: str) -> None:
    answer = ANSWERS[kind](form)
    wishes = {"tools": TOOLS, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}

    async def main() -> None:
        served = Served(tmp_path, TEMPLATES[form], answer)
        whole = await served.post(wishes)
        plain = await served.post({})  # without tools all is content
        assert plain["choices"][0]["message"]["content"] == answer
        assert plain["usage"]["completion_tokens"] * 2 == whole["usage"]["completion_tokens"]
        for tokens_at_once in (1, 3, 1000):
            served = Served(tmp_path, TEMPLATES[form], answer, tokens_at_once)
            chunks = await served.chunks(wishes)
            assert chunks[-1]["usage"] == whole["usage"]
            for index, expected in enumerate(whole["choices"]):
                found = joined(chunks, index)
                assert without_ids(found["message"]) == without_ids(expected["message"])
                assert found["token_ids"] == expected["token_ids"]
                assert found["logprobs"] == expected["logprobs"]["content"]
                assert len(found["token_ids"]) == len(found["logprobs"])
                assert found["finish_reason"] == expected["finish_reason"]
            assert joined(await served.chunks({"tools": TOOLS}))["message"].keys() == found["message"].keys()
            assert served.engine.num_open == 0
            assert not served.engine.aborted

    run(main)


@pytest.mark.parametrize("form", TEMPLATES)
def test_calls(tmp_path: Path, form: str) -> None:
    async def main() -> None:
        choice = (await Served(tmp_path, TEMPLATES[form], written(form)).post({"tools": TOOLS}))["choices"][0]
        assert calls_of(choice["message"]) == [("weather", ARGUMENTS), ("clock", {})]
        assert choice["message"]["content"] is None
        assert set(choice["message"]) == {"role", "content", "refusal", "tool_calls"}
        assert set(choice["message"]["tool_calls"][0]) == {"id", "type", "function"}
        assert choice["finish_reason"] == "tool_calls"
        if form != "llama3_json":  # there a call stands alone
            served = Served(tmp_path, TEMPLATES[form], "I look.\n" + written(form))
            choice = (await served.post({"tools": TOOLS}))["choices"][0]
            assert choice["message"]["content"] == "I look."
            assert len(calls_of(choice["message"])) == 2

    run(main)


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_malformed_call_stays_content(tmp_path: Path, form: str) -> None:
    answer = ANSWERS["malformed"](form)

    async def main() -> None:
        choice = (await Served(tmp_path, TEMPLATES[form], answer).post({"tools": TOOLS}))["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": answer, "refusal": None}
        assert choice["finish_reason"] == "stop"

    run(main)


def test_an_answer_cut_off_by_its_length_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path, HERMES, written("hermes"))
        num_tokens = len(served.tokenizer.encode(written("hermes", with_second=False).partition("days")[0]))
        choice = (await served.post({"tools": TOOLS, "max_tokens": num_tokens}))["choices"][0]
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["arguments"].startswith('{"city": "Łódź')
        with pytest.raises(ValueError):
            json.loads(call["function"]["arguments"])

    run(main)


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("tokens_at_once", [1, 3, 1000])
def test_without_parallel_calls_the_request_ends_after_the_first(
    tmp_path: Path, form: str, tokens_at_once: int
) -> None:
    answer = written(form) + " and on" * 50
    wishes = {"tools": TOOLS, "parallel_tool_calls": False, "return_token_ids": True}

    async def main() -> None:
        served = Served(tmp_path, TEMPLATES[form], answer, tokens_at_once)
        for n in (1, 3):
            whole = await served.post({**wishes, "n": n})
            chunks = await served.chunks({**wishes, "n": n})
            assert chunks[-1]["usage"] == whole["usage"]
            assert whole["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in whole["choices"])
            assert whole["usage"]["completion_tokens"] < n * len(served.tokenizer.encode(written(form)))
            for index, choice in enumerate(whole["choices"]):
                assert calls_of(choice["message"]) == [("weather", ARGUMENTS)]
                assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
                found = joined(chunks, index)
                assert without_ids(found["message"]) == without_ids(choice["message"])
                assert found["finish_reason"] == "tool_calls"
        assert served.engine.num_open == 0
        if tokens_at_once < 1000:
            assert len(served.engine.finished) == 4
            assert not served.engine.aborted

    run(main)


class Varied(FakeEngine):
    """Gives each of the n choices an answer of its own."""

    answers: tuple[str, ...]

    def _completion(self, request: Request, index: int) -> list[SequenceDelta]:
        self._answer_ids = self._tokenizer.encode(self.answers[index], add_special_tokens=False)
        return super()._completion(request, index)


def test_a_choice_that_is_cut_waits_for_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        one = written("hermes", with_second=False)
        num_ignored = len(tiny_tokenizer().encode("ignored" * 30))
        for last, is_cut in (("Just text, and a lot of it. " * 30, False), (" " * 200 + written("hermes"), True)):
            served = Served(tmp_path, HERMES)
            engine = Varied(served.tokenizer)
            engine.answers = (one + "ignored" * 30, last)
            assert engine.ready is not None
            engine.ready = served.engine.ready
            app = create_app(engine, served.tokenizer, RequestBuilder(served.tokenizer, {}), ServerSettings())
            served.app, served.engine = app, engine
            wishes = {"tools": TOOLS, "n": 2, "parallel_tool_calls": False, "return_token_ids": True}
            whole = await served.post(wishes)
            first, second = whole["choices"]
            assert calls_of(first["message"]) == [("weather", ARGUMENTS)]
            assert len(first["token_ids"]) < num_ignored
            assert second["message"]["content"] == (None if is_cut else last)
            assert second["finish_reason"] == ("tool_calls" if is_cut else "stop")
            assert whole["usage"]["completion_tokens"] == len(first["token_ids"]) + len(second["token_ids"])
            chunks = await served.chunks(wishes)
            assert chunks[-1]["usage"] == whole["usage"]
            assert without_ids(joined(chunks, 1)["message"]) == without_ids(second["message"])
            assert len(engine.finished) == 2 * is_cut
            assert not engine.aborted

    run(main)


def test_tool_choice(tmp_path: Path) -> None:
    async def main() -> None:
        answer = written("hermes")
        served = Served(tmp_path, HERMES, answer)
        for choice in (None, "auto"):
            found = (await served.post({"tools": TOOLS, "tool_choice": choice}))["choices"][0]
            assert found["finish_reason"] == "tool_calls"
            assert '"weather"' in served.prompt
        found = (await served.post({"tools": TOOLS, "tool_choice": "none"}))["choices"][0]
        assert (found["message"]["content"], found["finish_reason"]) == (answer, "stop")
        assert '"weather"' not in served.prompt
        wrong: list[Any] = ["any", 5, {}, [], {"type": "function"}, {"function": {"name": "nobody"}}]
        for choice in [*wrong, {"function": {"name": "x" * 100_000}}]:
            error = (await served.post({"tools": TOOLS, "tool_choice": choice}, 400))["error"]
            assert error["param"] == "tool_choice"
            assert len(error["message"]) < 1000
        assert (await served.post({"tool_choice": "required"}, 400))["error"]["param"] == "tool_choice"
        assert (await served.post({"tools": [], "tool_choice": "auto"}))["choices"][0]["finish_reason"] == "stop"

    run(main)


def test_a_model_that_knows_no_tools(tmp_path: Path) -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 2}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "tools"
            response = await client.post("/v1/chat/completions", json={**body, "tool_choice": "none"})
            assert response.status_code == 200
        plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
        served = Served(tmp_path, plain, written("llama3_json"), tool_call_parser="llama3_json")
        assert calls_of((await served.post({"tools": TOOLS}))["choices"][0]["message"])[0] == ("weather", ARGUMENTS)
        with pytest.raises(ConfigError, match="hermes, llama3_json, qwen3_coder"):
            ServerSettings(tool_call_parser="nothing")

    run(main)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    "tools",
    [
        5,
        "x",
        {},
        {"type": "function"},
        [5],
        [{}],
        [None],
        [{"type": "function"}],
        [{"type": "retrieval", "function": {"name": "f"}}],
        [{"function": {"name": "f"}}],
        [{"type": "function", "function": []}],
        [function(name=None)],
        [function(name="")],
        [function(name=5)],
        [function(name="x" * 100_000)],
        [function(parameters=[])],
        [function(parameters="{}")],
        [function(description=5)],
        [WEATHER, function(parameters=1)],
    ],
)
def test_wrong_tools_are_named(tmp_path: Path, tools: Any) -> None:
    async def main() -> None:
        for path in ("/v1/chat/completions", "/tokenize"):
            error = (await Served(tmp_path, HERMES).post({"tools": tools}, 400, path))["error"]
            assert error["param"] == "tools"
            assert len(error["message"]) < 1000

    run(main)


def test_messages_with_calls_round_trip(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path, HERMES, written("hermes"))
        message = (await served.post({"tools": TOOLS}))["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": f"result of {call['function']['name']}"}
            for call in message["tool_calls"]
        ]
        history = [*MESSAGES, {**message, "annotations": None, "function_call": None}, *results]
        await served.post({"tools": TOOLS, "messages": history})
        prompt = served.prompt
        assert json.dumps(WEATHER, ensure_ascii=False) in prompt
        assert '{"type": "function", "function": {"name": "clock"}}' in prompt  # null is left out
        assert f"<|im_start|>assistant\n\n{written('hermes')}<|im_end|>" in prompt
        ids = [call["id"] for call in message["tool_calls"]]
        assert f"<|im_start|>tool\nresult of weather({ids[0]})<|im_end|>" in prompt
        assert f"<|im_start|>tool\nresult of clock({ids[1]})<|im_end|>" in prompt
        tokens = await served.post({"tools": TOOLS, "messages": history}, path="/tokenize")
        assert tokens["tokens"] == served.engine.requests[-1].prompt_token_ids
        # A template prints calls of the past without tools too, and arguments may be left out.
        bare = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}
        for arguments in (None, "", " ", "{}", {}):
            bare["tool_calls"] = [{"function": {"name": "clock", "arguments": arguments}}]
            await served.post({"messages": [*MESSAGES, bare]})
            assert '{"name": "clock", "arguments": {}}' in served.prompt
        # No calls are no key, for templates ask for that.
        await served.post({"messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": []}]})

    run(main)


def call(**fields: Any) -> dict[str, Any]:
    base = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [base, {**base, **fields}]}


@pytest.mark.parametrize(
    "message",
    [
        *[call(function={"name": "f", "arguments": a}) for a in ("{", "[]", "5", "nul", '{"a": 1}}', 5, [], "NaN")],
        call(function={"name": "f", "arguments": '{"a":' * 100_000}),
        call(function={"name": "f", "arguments": '{"a":' * 100 + "1" + "}" * 100}),
        call(function={"name": "f", "arguments": '{"a": [' + "[]," * 70_000 + "[]]}"}),
        call(function={"name": "f", "arguments": '{"a": "\\ud800'}),
        call(function={"name": "", "arguments": "{}"}),
        call(function={"name": 5, "arguments": "{}"}),
        call(function=None),
        call(id=5),
        call(type="other"),
        {**call(), "tool_calls": 5},
        {**call(), "tool_calls": {"a": 1}},
        {**call(), "tool_calls": [5]},
        {**call(), "role": "user"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "tool", "tool_call_id": "x"},
        {"role": "tool", "tool_call_id": 5, "content": "x"},
    ],
)
def test_wrong_calls_in_messages_are_named(tmp_path: Path, message: dict[str, Any]) -> None:
    async def main() -> None:
        served = Served(tmp_path, HERMES)
        error = (await served.post({"messages": [*MESSAGES, message]}, 400))["error"]
        assert error["param"] == "messages"
        assert "messages[1]" in error["message"] or error["code"] == "limit_exceeded"
        assert len(error["message"]) < 1000

    run(main)


def test_tags_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")

    async def main() -> None:
        answer = "<think>hm</think>" + written("hermes")
        served = Served(tmp_path, THINKING, answer, special=tags)
        message = (await served.post({"tools": TOOLS, "skip_special_tokens": True}))["choices"][0]["message"]
        assert message["reasoning_content"] == "hm"
        assert len(calls_of(message)) == 2
        served = Served(tmp_path, HERMES, written("hermes"), special=tags[:2])
        await served.post({})
        await served.post({"tools": TOOLS})
        assert [request.params.skip_special_tokens for request in served.engine.requests] == [True, False]
        served = Served(tmp_path, HERMES)
        await served.post({"tools": TOOLS})
        assert served.engine.requests[0].params.skip_special_tokens

    run(main)


def test_the_end_that_waits_for_a_result(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path, LLAMA3, written("llama3_json"), special=("<|eom_id|>",))
        eom = served.tokenizer.backend.token_to_id("<|eom_id|>")
        await served.post({"tools": TOOLS, "stop_token_ids": [3]})
        await served.post({"tools": TOOLS, "ignore_eos": True, "max_tokens": 3})
        await served.post({})
        assert [r.params.stop_token_ids for r in served.engine.requests] == [[3, eom], None, None]

    run(main)


@pytest.mark.parametrize(
    ("template", "answer", "reasoning", "content"),
    [
        (THINKING, "<think>\nIs it?\n\nYes.\n</think>\n\nIt rains.", "Is it?\n\nYes.", "It rains."),
        (THINKING, "It rains.", None, "It rains."),
        (THINKING, "<think>Is", "Is", None),
        (THINKING, "<think>\n\n</think>\n\nIt rains.", None, "It rains."),
        (ALWAYS_THINKING, "Is it?\n</think>\nIt rains.", "Is it?", "It rains."),
        (ALWAYS_THINKING, "Is it <tool_call>?", "Is it <tool_call>?", None),
        (HERMES, "<think>Is</think>It rains.", None, "<think>Is</think>It rains."),
    ],
)
@pytest.mark.parametrize("with_calls", [False, True])
def test_reasoning(
    tmp_path: Path, template: str, answer: str, reasoning: str | None, content: str | None, with_calls: bool
) -> None:
    calls_come = with_calls and content is not None
    answer += "\n" + written("hermes") if calls_come else ""
    wishes = {"tools": TOOLS} if with_calls else {}
    more = {**wishes, "return_token_ids": True, "logprobs": True}

    async def main() -> None:
        served = Served(tmp_path, template, answer)
        whole = await served.post(more)
        message = whole["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
        assert ("reasoning_content" in message) == (reasoning is not None)
        assert len(calls_of(message)) == (2 if calls_come else 0)
        assert whole["usage"]["completion_tokens"] == len(served.tokenizer.encode(answer)) + 1
        for tokens_at_once in (1, 3, 1000):
            served = Served(tmp_path, template, answer, tokens_at_once)
            chunks = await served.chunks(more)
            found = joined(chunks)
            assert without_ids(found["message"]) == without_ids(message)
            assert found["token_ids"] == whole["choices"][0]["token_ids"]
            assert found["logprobs"] == whole["choices"][0]["logprobs"]["content"]
            assert chunks[-1]["usage"] == whole["usage"]
            for chunk in await served.chunks(wishes):  # there are clients that read no second thing in a delta
                for piece in chunk["choices"]:
                    assert len(piece["delta"].keys() & {"content", "reasoning_content", "tool_calls"}) <= 1

    run(main)


def test_reasoning_that_is_continued(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path, THINKING, " it?</think>Yes.")
        history = [*MESSAGES, {"role": "assistant", "content": "<think>Is"}]
        message = (await served.post({"messages": history, "continue_final_message": True}))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (" it?", "Yes.")
        history[-1]["content"] = "<think>Is it?</think>So"
        message = (await served.post({"messages": history, "continue_final_message": True}))["choices"][0]["message"]
        assert message["content"] == " it?</think>Yes."

    run(main)


def test_each_chunk_shows_its_own_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        served = Served(tmp_path, THINKING, "<think>Hm.</think>So.\n" + written("hermes"))
        wishes = {"tools": TOOLS, "logprobs": True, "top_logprobs": 0, "return_token_ids": True}
        chunks = await served.chunks(wishes)
        pieces = [piece for chunk in chunks for piece in chunk["choices"]]
        for piece in pieces:
            ids = piece.get("token_ids", [])
            shown = piece["logprobs"]["content"] if piece["logprobs"] else []
            assert [entry["token"] for entry in shown] == [served.tokenizer.token_text(i) for i in ids]
        # Tokens whose text is held back or is syntax come at once, with nothing said.
        assert pieces[0]["delta"] == {"role": "assistant", "content": None}
        assert any(piece["delta"] == {} and piece["token_ids"] for piece in pieces[1:-1])

    run(main)


def test_the_openai_clients_helper_accumulates_the_calls(tmp_path: Path) -> None:
    served = Served(tmp_path, THINKING, "<think>Hm.</think>I look.\n" + written("hermes"), 3)
    tools: Any = [WEATHER, {"type": "function", "function": {"name": "clock", "strict": True, "parameters": {}}}]

    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=tools) as stream:
                events = list(stream)
                message = stream.get_final_completion().choices[0].message
            done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
            told = [(event.name, json.loads(event.arguments)) for event in done]
            assert told == [("weather", ARGUMENTS), ("clock", {})]
            assert message.content == "I look."
            assert message.tool_calls is not None
            assert [call.function.parsed_arguments for call in message.tool_calls] == [ARGUMENTS, {}]
            assert message.model_extra == {"reasoning_content": "Hm."}
            whole = client.chat.completions.create(model="fake", messages=MESSAGES, tools=tools)
            assert whole.choices[0].finish_reason == "tool_calls"
            answer = whole.choices[0].message
            assert answer.tool_calls
            results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in answer.tool_calls]
            again = client.chat.completions.create(
                model="fake", messages=[*MESSAGES, answer.model_dump(), *results], tools=tools, tool_choice="none"
            )
            assert again.choices[0].finish_reason == "stop"

    async def main() -> None:
        async with on_port(served.app) as url:
            await asyncio.to_thread(use, url)

    run(main)


TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<function=weather>", "</function>", "<parameter=city>"]
JSONS = ['{"name": "weather", "parameters": {"city": "Łódź"}}', '{"name": "clock", "arguments": {}}']
REST = ["</parameter>", ";", "{", "}", "text", "😀", "<", "\n", " "]
FRAGMENTS = st.sampled_from([*TAGS, *JSONS, *REST, *map(written, TEMPLATES)])


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from([None, *TEMPLATES]), st.booleans(), st.booleans(), st.booleans(), st.lists(FRAGMENTS), st.data())
def test_any_cut_reads_alike(
    form: str | None, parallel: bool, thinks: bool, is_thinking: bool, fragments: list[str], data: st.DataObject
) -> None:
    """With one difference: an answer that is cut after its first call is read no further."""
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    reading = Reading(tool_calls=form, tools=tuple(TOOLS), parallel=parallel, may_think=thinks, is_thinking=is_thinking)

    def read(pieces: list[str]) -> dict[str, Any]:
        reader, choice = Reader(reading), WholeChoice(0)
        deltas = [delta for piece in pieces for delta in reader.push(piece)]
        for delta in (*deltas, *reader.finish()):
            choice.add(ChatChunkChoice(0, delta))
        message = msgspec.to_builtins(choice.join().message)
        assert len(message.get("tool_calls", ())) <= (100 if parallel else 1)
        return without_ids(message)

    whole = read([text])
    assert read([text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]) == whole
    assert read(list(text)) == whole


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.sampled_from(["function", "{}", "[1]", "f"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "function", "name", "arguments", "id"]), values, max_size=5)
    ),
    max_leaves=12,
)
FUNCTIONS = st.fixed_dictionaries({"name": st.just("f")}, optional={"arguments": VALUES, "parameters": VALUES})
WRAPPED = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS | VALUES}, optional={"id": VALUES})
ANY_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional={
        "content": st.text(max_size=5) | VALUES,
        "tool_calls": VALUES | st.lists(WRAPPED, max_size=3),
        "tool_call_id": VALUES,
        "reasoning_content": VALUES,
    },
)
ANY_BODY = st.fixed_dictionaries(
    {"messages": st.lists(ANY_MESSAGE, min_size=1, max_size=3)},
    optional={"tools": VALUES | st.lists(WRAPPED, max_size=3), "tool_choice": VALUES, "parallel_tool_calls": VALUES},
)


@pytest.mark.slow
def test_no_body_is_the_servers_fault(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    @settings(max_examples=300, deadline=None, database=None)
    @given(ANY_BODY)
    def collect(body: dict[str, Any]) -> None:
        bodies.append(body)

    async def main() -> None:
        num_good = 0
        async with in_process(Served(tmp_path, THINKING, written("hermes")).app) as client:
            for body in bodies:
                response = await client.post("/v1/chat/completions", json={**body, "max_tokens": 5})
                assert response.status_code in (200, 400), (body, response.text)
                num_good += response.status_code == 200
        assert num_good

    collect()
    run(main)
