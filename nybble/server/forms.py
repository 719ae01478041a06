"""`response_format`, `structured_outputs` and forced tools of a body → the form that its answer must have."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from nybble.core.checks import shown
from nybble.core.json_schema import unsupported_keyword
from nybble.core.structured import Reasoning, StructuredOutputs
from nybble.server.errors import ApiError, bad_request
from nybble.server.protocol import SamplingFields
from nybble.server.reading import Reading
from nybble.server.tools import ToolWishes
from nybble.text.tool_calls import forms

_TYPES = ("text", "json_object", "json_schema", "structural_tag")
_END_OF_THOUGHT = "</think>"


def form_of(body: SamplingFields) -> StructuredOutputs | None:
    """What a body asks for itself.

    Raises:
        ApiError, RequestError: it is not sound, as far as that shows before it is compiled.
    """
    by_format = None if body.response_format is None else _of_response_format(body.response_format)
    if body.structured_outputs is None:
        return by_format
    if by_format is not None:
        raise bad_request(
            "response_format and structured_outputs cannot be combined; send one", "structured_outputs", "invalid_value"
        )
    given = body.structured_outputs
    if not isinstance(given, dict):
        raise _wrong("structured_outputs", "must be an object", given)
    return StructuredOutputs.of(given)


def chat_form(
    form: StructuredOutputs | None, wishes: ToolWishes, reading: Reading, prompt: str
) -> StructuredOutputs | None:
    """The form of a chat's answer: the body's own, unless tools are called.

    Args:
        form: of the body itself.
        prompt: the rendered conversation.

    Raises:
        ApiError: a strict tool's schema cannot be kept.
    """
    tools = [tool for tool in wishes.tools if forms.tool_name(tool) in wishes.plan.must_call] or wishes.tools
    name = reading.tool_calls
    if name is not None and (wishes.plan.must_call or form is not None or any(map(forms.is_strict, tools))):
        _check_strict(tools)
        parallel = reading.parallel and not wishes.names_call
        if wishes.plan.must_call:
            wanted = forms.calls(name, tools, parallel=parallel)
        elif form is not None:
            wanted = forms.either(forms.of_text(form), forms.calls(name, tools, parallel=parallel))
        else:
            wanted = forms.text_or_calls(name, tools, parallel=parallel)
        source = "tools" if form is None else form.source
        form = StructuredOutputs(structural_tag={"type": "structural_tag", "format": wanted}, source=source)
    return None if form is None else replace(form, reasoning=_reasoning(reading, prompt))


def _reasoning(reading: Reading, prompt: str) -> Reasoning | None:
    if not reading.may_think or (not reading.is_thinking and prompt.rstrip().endswith(_END_OF_THOUGHT)):
        return None
    return "is_open" if reading.is_thinking else "may_open"


def _check_strict(tools: list[dict[str, Any]]) -> None:
    for index, tool in enumerate(tools):
        if forms.is_strict(tool) and (keyword := unsupported_keyword(tool["function"].get("parameters"))) is not None:
            raise bad_request(
                f"tools[{index}].function is strict, but its parameters use {keyword}, which is not supported; leave "
                f"it out",
                "tools",
                "unsupported_field",
            )


def _of_response_format(given: object) -> StructuredOutputs | None:
    name = "response_format"
    if not isinstance(given, dict):
        raise _wrong(name, "must be an object", given)
    kind = given.get("type")
    if kind not in _TYPES:
        raise _wrong(f"{name}.type", f"must be one of {', '.join(_TYPES)}", kind)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True, source=name)
    if kind == "structural_tag":
        return StructuredOutputs(structural_tag=given, source=name)
    described = given.get("json_schema")
    if not isinstance(described, dict):
        raise _wrong(f"{name}.json_schema", "must be an object with name and schema", described)
    for field, types, words in (
        ("name", (str, type(None)), "a string"),
        ("strict", (bool, type(None)), "true or false"),
        ("schema", (dict,), "an object: a JSON schema"),
    ):
        if not isinstance(described.get(field), types):
            raise _wrong(f"{name}.json_schema.{field}", f"must be {words}", described.get(field))
    return StructuredOutputs(json=described["schema"], source=name)


def _wrong(place: str, rule: str, value: object) -> ApiError:
    return bad_request(f"{place} {rule}, got {shown(value)}", place.partition(".")[0], "invalid_value")
