"""Bodies that no honest client sends: each is answered with a 4xx in OpenAI's shape, and the server goes on."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**30
MESSAGE = {"role": "user", "content": "a"}

RAW_BODIES = [
    b"",
    b"null",
    b"5",
    b"[]",
    b'"text"',
    b"{",
    b'{"prompt": "a"',
    b'{"prompt": "a"} x',
    b"{'prompt': 'a'}",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\ud800\\ud800 x"}',
    b'{"prompt": "\\udc00 and more text"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt": "a", "x": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
    b"\x00" * 100,
    "{}".encode("utf-16"),
]

WRONG: dict[str, list[Any]] = {
    "prompt": [None, 5, 1.5, True, {}, [], [[]], [None], [1, "a"], ["a", 1], [1.5], [True], [[1], []], [["a"]], [-1]],
    "n": [0, -1, 17, HUGE, 1.5, "1", True, [], {}],
    "temperature": [-1, HUGE, "hot", [], True, 1e308],
    "top_p": [0, 1.1, -1, "x", HUGE],
    "top_k": [-2, HUGE, 1.5, "x"],
    "min_p": [-0.1, 2, "x"],
    "repetition_penalty": [0, -1, 1e300, "x"],
    "presence_penalty": [3, "x"],
    "frequency_penalty": [-3, "x"],
    "seed": [HUGE, -HUGE, 1.5, "x"],
    "max_tokens": [0, -1, HUGE, 1.5, "x", True],
    "min_tokens": [-1, HUGE, "x"],
    "stop": [5, [5], [None], [""], "", {}, ["x"] * 17, "x" * 300, [["a"]]],
    "stop_token_ids": [5, ["a"], [1.5], [-1], [HUGE], [None], {}],
    "bad_words": ["x", [""], [5], ["x"] * 2000],
    "allowed_token_ids": [[], ["a"], [-1], [HUGE], 5],
    "logit_bias": [5, [], "x", {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": None}, {"1": 1000}, {str(HUGE): 1}, {"²": 1}],
    "prompt_logprobs": [-1, 21, HUGE, "x", 1.5],
    "priority": [HUGE, 1.5, "x"],
    "cache_salt": ["", 5, "x" * 1000],
    "request_id": ["", 5, "x" * 1000, "a b", "a\r\nb", "é"],
    "stream": ["yes", 1, []],
    "stream_options": [5, [], {"include_usage": "x"}, {"include_usage": True}],
    "model": [5, "nobody", "x" * 100_000],
    "skip_special_tokens": [5, "x"],
    "ignore_eos": ["x"],
    "return_token_ids": [5],
    "best_of": [5, "x", []],
}
WRONG_COMPLETION: dict[str, list[Any]] = {"logprobs": [-1, 21, HUGE, True, "x", 1.5], "echo": [5, "x"]}
WRONG_COMPLETION |= {"prompt": [*WRONG["prompt"], [HUGE], [512_000], "", [[[1]]], {"text": "a"}, [1] * 5000]}
WRONG_COMPLETION |= {"suffix": ["x", 5], "min_tokens": [17]}  # by default 16 are generated
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [None, [], {}, "x", 5, [None], [[]], ["x"], [{}], [{"role": "user"}], [{"content": "x"}]]
    + [[{**MESSAGE, "role": role}] for role in (None, 5, "", "nobody", [], {})]
    + [[{**MESSAGE, "content": content}] for content in (None, 5, [], {}, [5], [{}], [{"type": "image_url"}])]
    + [[{**MESSAGE, "tool_calls": [{}]}], [MESSAGE] * 3000],
    "logprobs": [5, "x"],
    "top_logprobs": [1, -1, HUGE, "x"],
    "max_completion_tokens": [0, -1, HUGE, "x"],
    "chat_template_kwargs": [5, [], "x", {"messages": []}, {"self": 1}, {"tools": 1}],
    "continue_final_message": [5, "x"],
    "add_generation_prompt": [5, "x"],
    "tools": [5, "x", {}, [5], [{}], [{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": [5, "x", {}, [], "required", {"type": "function", "function": {"name": HUGE}}],
    "parallel_tool_calls": [5, "x", []],
    "response_format": [5, {}, {"type": "json_schema"}, {"type": "nothing"}],
}


def check(response: Any, shown: object) -> None:
    assert 400 <= response.status_code < 500, (shown, response.status_code, response.text[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(path: str) -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            for content in RAW_BODIES:
                check(
                    await client.post(path, content=content, headers={"content-type": "application/json"}), content[:80]
                )
            assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200

    run(main)


@pytest.mark.parametrize(
    ("path", "good", "wrong"),
    [
        (COMPLETIONS, {"prompt": "a"}, {**WRONG, **WRONG_COMPLETION}),
        (CHAT, {"messages": [MESSAGE]}, {**{k: v for k, v in WRONG.items() if k != "prompt"}, **WRONG_CHAT}),
        ("/tokenize", {}, {"prompt": [5, [], {}, ["a"]], "messages": WRONG_CHAT["messages"][1:-1]}),
        ("/tokenize", {"prompt": "a"}, {"messages": [[MESSAGE]], "model": ["nobody", 5]}),
        ("/detokenize", {}, {"tokens": [None, 5, "x", ["a"], [-1], [HUGE], [1.5], [True], [[1]], [100_000]]}),
    ],
)
def test_wrong_values(path: str, good: dict[str, Any], wrong: dict[str, list[Any]]) -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine)) as client:
            for name, values in wrong.items():
                for value in values:
                    body = {**good, name: value}
                    check(await client.post(path, json=body), body)
            if path in (COMPLETIONS, CHAT):
                response = await client.post(path, json={**good, "max_tokens": 2})
                assert response.status_code == 200, response.text
                assert engine.num_open == 0

    run(main)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=8,
)
FIELDS = [*WRONG, *WRONG_COMPLETION, *WRONG_CHAT, "tokens", "user", "unknown"]
VALUES = JSON | st.sampled_from(
    [value for values in (WRONG, WRONG_CHAT) for wrong in values.values() for value in wrong]
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6)
GOOD = {"prompt": "a", "messages": [MESSAGE], "max_tokens": 2, "tokens": [1]}


@pytest.mark.slow
def test_no_body_is_the_servers_fault() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
                for body in bodies:
                    response = await client.post(path, json=body)
                    assert response.status_code < 500, (path, body, response.text)
                    if response.status_code >= 400:
                        check(response, body)

    bodies: list[Any] = []

    @settings(max_examples=300, deadline=None, database=None)
    @given(BODIES, st.booleans())
    def collect(body: dict[str, Any], is_nearly_good: bool) -> None:
        bodies.append({**GOOD, **body} if is_nearly_good else body)

    collect()
    run(main)


def test_unknown_fields_are_ignored() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            deep: Any = 1
            for _ in range(50):
                deep = {"a": [deep][0]}
            for value in (None, 5, HUGE, "x" * 10_000, deep, [[]]):
                body = json.dumps({"prompt": "a", "unknown": value, "constructor": value, "__class__": value})
                headers = {"content-type": "application/json"}
                assert (await client.post(COMPLETIONS, content=body, headers=headers)).status_code == 200

    run(main)
