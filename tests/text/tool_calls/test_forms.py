"""Forms of tool calls: whatever they allow, the format's parser reads as calls with arguments of the tool's schema."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from support.grammars import compiling, walk
from text.tool_calls.driver import parse, tool

from nybble.core.structured import StructuredOutputs
from nybble.grammar.compiler import GrammarCompiler
from nybble.grammar.matcher import Grammar
from nybble.text.tool_calls import FORMATS, forms

WEATHER = tool(
    "get_weather",
    {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["C", "F"]},
        "where": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "note": {"type": ["string", "null"], "minLength": 2},
        "kind": {"$ref": "#/$defs/kind"},
        "code": {"type": "string", "pattern": "^[a-z]{2}$"},
    },
    required=["city", "units"],
    additionalProperties=False,
    **{"$defs": {"kind": {"type": "integer", "minimum": 0, "maximum": 3}}},
)
CLOCK = tool('the "clock"')
LOOSE = tool("loose", {"a": {"type": "integer", "multipleOf": 2}})  # a keyword that cannot be kept
TOOLS = [WEATHER, CLOCK, LOOSE]
SCHEMAS = {forms.tool_name(each): each["function"]["parameters"] for each in TOOLS}


def strict(each: Any) -> Any:
    return {**each, "function": {**each["function"], "strict": True}}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with compiling() as compiler:
        yield compiler


def compiled(compiler: GrammarCompiler, wanted: forms.Format) -> Grammar:
    tag = {"type": "structural_tag", "format": wanted}
    return compiler.compile(StructuredOutputs(structural_tag=tag)).result(timeout=60)


def check(calls: list[tuple[str, str]], *, ignores: tuple[str, ...] = ()) -> None:
    for name, arguments in calls:
        value = json.loads(arguments)
        assert isinstance(value, dict)
        if name not in ignores:
            jsonschema.validate(value, SCHEMAS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_calls(compiler: GrammarCompiler, name: str) -> None:
    grammar = compiled(compiler, forms.calls(name, [WEATHER, CLOCK], parallel=True))
    counts = set()
    for seed in range(12):
        text = walk(grammar, seed)
        content, calls = parse(name, [text], [WEATHER, CLOCK])
        assert calls, text
        assert not content.strip(), text
        check(calls)
        counts.add(len(calls))
    assert 1 in counts


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_when_one_is_wanted(compiler: GrammarCompiler, name: str) -> None:
    grammar = compiled(compiler, forms.calls(name, [WEATHER], parallel=False))
    for seed in range(8):
        text = walk(grammar, seed)
        content, calls = parse(name, [text], [WEATHER])
        assert [called for called, _ in calls] == ["get_weather"], text
        assert not content.strip()
        check(calls)


@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_amid_text(compiler: GrammarCompiler, name: str) -> None:
    tools = [strict(WEATHER), LOOSE]
    grammar = compiled(compiler, forms.text_or_calls(name, tools, parallel=True))
    assert walk(grammar, 1) is not None
    before = "" if name == "llama3_json" else "Let me see. "
    begin = {
        "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"',
        "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=",
        "llama3_json": '{"name": "get_weather", "parameters": {"',
    }[name]
    for text, is_allowed in (
        ("Hello, is this text?", True),
        (before + begin + "city", True),
        (before + begin + "days", False),  # city is required, and comes first
        (before + begin + "other", False),
        (before + begin.replace("get_weather", "loose") + "other", True),
    ):
        assert accepts(grammar, text) is is_allowed, text


def accepts(grammar: Grammar, text: str) -> bool:
    from support.server import tiny_tokenizer

    matcher = grammar.open()
    try:
        for token_id in tiny_tokenizer().encode(text, add_special_tokens=False):
            matcher.accept(token_id)
    except ValueError:
        return False
    return True


def test_a_schema_that_cannot_be_kept_is_a_hint(compiler: GrammarCompiler) -> None:
    _, calls = parse("hermes", [walk(compiled(compiler, forms.calls("hermes", [LOOSE], parallel=False)), 5)], [LOOSE])
    check(calls, ignores=("loose",))


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "integer", "minimum": 5, "maximum": 9}},
        {"json_object": True},
        {"regex": "[5-9]"},
        {"choice": ["5", "6"]},
        {"grammar": 'root ::= "5"'},
        {"structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "5"}}},
    ],
)
def test_a_text_of_a_form_or_calls(compiler: GrammarCompiler, fields: dict[str, Any]) -> None:
    form = StructuredOutputs(**fields, disable_any_whitespace=True)
    wanted = forms.either(forms.of_text(form), forms.calls("hermes", [CLOCK], parallel=False))
    grammar = compiled(compiler, wanted)
    assert accepts(grammar, "{" if "json_object" in fields else "5")
    assert accepts(grammar, '<tool_call>\n{"name": ')
    assert not accepts(grammar, "text")
