"""Structured outputs on the embedded model: whatever it would rather say, what comes out has the form."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from nybble import LLM, AsyncLLM, SamplingParams, StructuredOutputs
from nybble.core.errors import RequestError
from nybble.core.outputs import CompletionOutput

PROMPTS = ["Count from 3 to 12.", "Who are you?"]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1.5]}, "minItems": 1, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}},
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", max_num_seqs=8, kv_cache_memory_bytes=16 << 20) as llm:
        yield llm


def completions(llm: LLM, form: StructuredOutputs, **params: Any) -> list[CompletionOutput]:
    wanted = SamplingParams(**{"n": 2, "seed": 1, "max_tokens": 400, **params}, structured_outputs=form)
    return [completion for output in llm.generate(PROMPTS, wanted) for completion in output.outputs]


def finished(llm: LLM, form: StructuredOutputs, **params: Any) -> list[str]:
    found = completions(llm, form, **params)
    assert [completion.finish_reason for completion in found] == ["stop"] * len(found), found
    return [completion.text for completion in found]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_follows_its_schema(llm: LLM, temperature: float) -> None:
    form = StructuredOutputs(json=PERSON, disable_any_whitespace=True)
    for text in finished(llm, form, temperature=temperature):
        jsonschema.validate(json.loads(text), PERSON)
        assert not re.search(r"[,:{\[] ", re.sub(r'"[^"]*"', "", text))


def test_json_with_white_space(llm: LLM) -> None:
    for completion in completions(llm, StructuredOutputs(json=PERSON), max_tokens=900):
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), PERSON)
        assert not re.search(r"\s{30}", completion.text)


def test_a_recursive_schema(llm: LLM) -> None:
    for text in finished(llm, StructuredOutputs(json=TREE, disable_any_whitespace=True), max_tokens=800):
        jsonschema.validate(json.loads(text), TREE)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_other_forms(llm: LLM, temperature: float) -> None:
    assert set(finished(llm, StructuredOutputs(choice=["yes", 'no "way"', "né 😀"]), temperature=temperature)) <= {
        "yes",
        'no "way"',
        "né 😀",
    }
    for text in finished(llm, StructuredOutputs(regex=r"\d{3}-[a-fé]{4}(x|yz)?"), temperature=temperature):
        assert re.fullmatch(r"\d{3}-[a-fé]{4}(x|yz)?", text)
    grammar = 'root ::= term (" + " term){1,3}\nterm ::= [0-9] | "(" root ")"'
    for text in finished(llm, StructuredOutputs(grammar=grammar), temperature=temperature, top_p=0.9):
        assert isinstance(eval(text), int)
    for text in finished(
        llm, StructuredOutputs(grammar='start: "a"+ "b"'), max_tokens=900, temperature=temperature or 1
    ):
        assert re.fullmatch("a+b", text)


@pytest.mark.slow
def test_any_object(llm: LLM) -> None:
    for completion in completions(llm, StructuredOutputs(json_object=True), temperature=1.5, max_tokens=900):
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)
        assert completion.text.lstrip().startswith("{")


def test_masks_of_all_kinds_hold_together(llm: LLM) -> None:
    assert llm.tokenizer is not None
    comma = llm.tokenizer.encode(",")[-1]
    params = {
        "min_tokens": 9,
        "bad_words": ["b"],
        "logit_bias": {comma: -100},
        "repetition_penalty": 1.2,
        "logprobs": 2,
    }
    found = completions(llm, StructuredOutputs(regex="[ab,]{12}c*"), **params, temperature=1.0, max_tokens=40)
    for completion in found:
        assert re.fullmatch("[ab]{12}c*", completion.text), completion
        assert not {comma, *llm.tokenizer.encode("b")} & set(completion.token_ids)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)


def test_min_tokens_holds_back_the_end_but_not_a_finished_form(llm: LLM) -> None:
    for text in finished(llm, StructuredOutputs(regex="a|ab{30}"), min_tokens=20, temperature=0):
        assert re.fullmatch("a|ab{30}", text)
    assert set(finished(llm, StructuredOutputs(choice=["yes"]), min_tokens=50, ignore_eos=True)) == {"yes"}


def test_a_form_that_other_masks_leave_nothing_of(llm: LLM) -> None:
    (first, *_) = completions(llm, StructuredOutputs(choice=["yes"]), allowed_token_ids=[5])
    assert first.finish_reason == "error"
    assert "structured_outputs" in (first.error or "")


def test_stop_strings_end_a_form_early(llm: LLM) -> None:
    for completion in completions(llm, StructuredOutputs(regex="x{40}"), stop=["xxx"]):
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("", "stop", "xxx")


def test_length_cuts_a_form(llm: LLM) -> None:
    for completion in completions(llm, StructuredOutputs(regex="[0-9]{80}"), max_tokens=7):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == 7


def test_the_others_of_a_batch_are_as_without_forms(llm: LLM) -> None:
    free = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    bound = SamplingParams(
        temperature=1.0, seed=3, max_tokens=40, structured_outputs=StructuredOutputs(regex="[xy]{30}")
    )
    alone = llm.generate(PROMPTS, free)
    mixed = llm.generate([PROMPTS[0], *PROMPTS, PROMPTS[1]], [bound, free, free, bound])
    assert [output.outputs[0].text for output in mixed[1:3]] == [output.outputs[0].text for output in alone]
    assert all(re.fullmatch("[xy]{30}", mixed[index].outputs[0].text) for index in (0, 3))


def test_the_path_of_a_gpu_gives_the_same(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step stays in flight while the next is planned: forms sit it out, the others do not."""
    form = StructuredOutputs(json=PERSON, disable_any_whitespace=True)
    bound = SamplingParams(seed=5, max_tokens=120, structured_outputs=form, logprobs=1)
    each = [bound, SamplingParams(seed=5, max_tokens=60), bound, SamplingParams(temperature=0, max_tokens=60)]
    expected = llm.generate(PROMPTS * 2, each)
    monkeypatch.setattr(llm.engine._runner, "is_async", True)
    found = llm.generate(PROMPTS * 2, each)
    for one, other in zip(expected, found, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].finish_reason == other.outputs[0].finish_reason


@pytest.mark.slow
def test_preempted_forms() -> None:
    """A cache that holds a fraction of what runs."""
    with LLM("tiny", max_num_seqs=8, kv_cache_memory_bytes=1 << 20, max_model_len=256, block_size=16) as llm:
        params = SamplingParams(
            seed=1, n=8, max_tokens=200, structured_outputs=StructuredOutputs(regex="([a-z]{3} ){45}")
        )
        outputs = llm.generate(PROMPTS, params)
        assert llm.stats.num_preemptions > 0
    for completion in (completion for output in outputs for completion in output.outputs):
        assert completion.finish_reason in ("stop", "length")
        assert re.fullmatch("([a-z]{3} )*[a-z]{0,3}", completion.text)


HOSTILE: list[dict[str, Any]] = [
    {"regex": "["},
    {"regex": "(.{1,1000}){1,1000}"},
    {"grammar": "root ::= root"},
    {"json": {"$ref": "#/$defs/x"}},
    {"json": {"type": "frob"}},
]


@pytest.mark.slow
def test_hostile_forms_are_refused_and_the_engine_goes_on(llm: LLM) -> None:
    for fields in HOSTILE:
        with pytest.raises(RequestError) as caught:
            completions(llm, StructuredOutputs(**fields))
        assert caught.value.parameter == "structured_outputs"
        assert set(finished(llm, StructuredOutputs(choice=["yes"]))) == {"yes"}
        assert not llm.engine.has_work


@pytest.mark.slow
def test_a_compilation_holds_up_no_one() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", kv_cache_memory_bytes=16 << 20) as llm:

            async def first(params: SamplingParams) -> str:
                async for output in llm.generate("Count from 3 to 12.", params):
                    if output.finished:
                        return output.outputs[0].text
                raise AssertionError

            form = SamplingParams(structured_outputs=StructuredOutputs(regex="(.{1,1000}){1,1000}"))
            endless = asyncio.create_task(first(form))
            await asyncio.sleep(0.1)
            begin = time.monotonic()
            assert await first(SamplingParams(temperature=0, max_tokens=10))
            assert time.monotonic() - begin < 5
            assert not endless.done()
            with pytest.raises(RequestError, match=r"regex cannot be used|took more than") as caught:
                await endless
            assert caught.value.parameter == "structured_outputs"
            assert await first(SamplingParams(structured_outputs=StructuredOutputs(choice=["yes"]))) == "yes"
        assert not any(thread.name == "nybble-engine" for thread in threading.enumerate())

    asyncio.run(main())
