"""Which format a template shows, and what a request's tool_choice asks for."""

from typing import Any

import pytest
from text.tool_calls.driver import tool

from nybble.core.errors import RequestError
from nybble.text.tool_calls import FORMATS, detect, plan_tools

TOOLS = [tool("f"), tool("g")]
NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        (
            """{{- "<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <json-object>}\\n</tool_call>" }}""",
            "hermes",
        ),
        (
            """{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}""",
            "hermes",
        ),
        (
            """{{- '<tool_call>\\n<function=' + call.name + '>\\n' }}{{- '<parameter=' + key + '>\\n' }} arguments""",
            "qwen3_coder",
        ),
        (
            """{{- "<|python_tag|>" + name + ".call(" }}{{- '{"name": "' + name + '", ' }}{{- '"parameters": ' }}""",
            "llama3_json",
        ),
        (
            """{{- '<|start_header_id|>assistant' }}{{- '"parameters": ' }}{{- arguments | tojson }}""",
            "llama3_json",
        ),
        ("""{{- '<|header_start|>' }}{{- '{\\"name\\": \\"' }}{{- '\\"parameters\\": ' }}""", "llama3_json"),
        ("""<tool_call>{{ name }}<arg_key>{{ key }}</arg_key>{{ arguments }}""", None),  # GLM
        ("""<|start_header_id|>{{ role }}<|end_header_id|>""", None),
    ],
)
def test_detect(template: str, form: str | None) -> None:
    assert detect(template) == form


@pytest.mark.parametrize("form", FORMATS)
def test_plans(form: str) -> None:
    for choice in (None, "auto"):
        plan = plan_tools(form, TOOLS, choice)
        assert plan.parses
        assert plan.must_call == ()
        assert plan.tags == (() if form == "llama3_json" else ("<tool_call>", "</tool_call>"))
        assert plan.stop_tokens == (("<|eom_id|>",) if form == "llama3_json" else ())
    assert plan_tools(form, TOOLS, "required").must_call == ("f", "g")
    assert plan_tools(form, TOOLS, NAMED).must_call == ("g",)
    for tools, choice in ((TOOLS, "none"), ([], None), (None, "auto"), (None, "none")):
        assert not plan_tools(form, tools, choice).parses


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (None, "required", "needs tools"),
        (TOOLS, "always", "tool_choice must be"),
        (TOOLS, 5, "tool_choice must be"),
        (TOOLS, ["auto"], "tool_choice must be"),
        (TOOLS, {"type": "function"}, "tool_choice must be"),
        (TOOLS, {"function": {"name": 5}}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "h"}}, "'h'"),
        (None, NAMED, "'g'"),
    ],
)
def test_choices_that_cannot_be_met_name_the_parameter(tools: Any, choice: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plan_tools("hermes", tools, choice)
    assert caught.value.parameter == "tool_choice"


def test_a_model_without_a_known_format_serves_requests_that_need_none() -> None:
    assert not plan_tools(None, None).parses
    assert not plan_tools(None, TOOLS, "none").parses
    with pytest.raises(RequestError, match="no format") as caught:
        plan_tools(None, TOOLS)
    assert caught.value.parameter == "tools"
