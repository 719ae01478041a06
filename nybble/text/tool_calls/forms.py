"""The form that an answer must have so that it is tool calls, for each format: in xgrammar's structural tags.

The arguments follow the tool's JSON schema. What a form allows, the format's parser reads as calls of these tools.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nybble.core.json_schema import unsupported_keyword
from nybble.core.structured import StructuredOutputs
from nybble.text.tool_calls.parser import Tool, parameters_of, tool_name
from nybble.text.tool_calls.qwen3_forms import parameters_form

Format = dict[str, Any]
"""A `format` of a structural tag."""

MAX_WHITESPACE = 13  # between two parts of JSON, as where a schema alone is asked for
_SEPARATORS = {"hermes": "\n", "qwen3_coder": "\n", "llama3_json": "; "}
_TRIGGER = "<tool_call>"
_ANY_OBJECT = {"type": "object"}


def calls(format_name: str, tools: Sequence[Tool], *, parallel: bool) -> Format:
    """At least one call of `tools` and nothing else; exactly one without `parallel`."""
    return _calls(format_name, [_tag(format_name, tool, keeps_schema=True) for tool in tools], parallel)


def text_or_calls(format_name: str, tools: Sequence[Tool], *, parallel: bool) -> Format:
    """Any text, and calls in it; the arguments of tools that are strict follow their schemas."""
    tags = [_tag(format_name, tool, keeps_schema=is_strict(tool)) for tool in tools]
    if format_name != "llama3_json":
        return {
            "type": "triggered_tags",
            "triggers": [_TRIGGER],
            "tags": tags,
            "stop_after_first": not parallel,
            # Without its tag a call would be read all the same.
            **({"excludes": ["<function="]} if format_name == "qwen3_coder" else {}),
        }
    # Nothing marks a call: any answer that begins like one is one.
    text = {"type": "regex", "pattern": r"\s*([^\s{][\s\S]*)?"}
    return either(text, _calls(format_name, tags, parallel))


def either(*formats: Format) -> Format:
    return {"type": "or", "elements": list(formats)}


def _calls(format_name: str, tags: list[Format], parallel: bool) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": _SEPARATORS[format_name],
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def of_text(form: StructuredOutputs) -> Format:
    """The form of a text as a part of a larger one."""
    spaces = 1 if form.disable_any_whitespace else MAX_WHITESPACE  # here it cannot be none
    match form.kind:
        case "json" | "json_object":
            schema = {"type": "object"} if form.kind == "json_object" else json.loads(form.text)
            return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": spaces}
        case "regex":
            return {"type": "regex", "pattern": form.text}
        case "grammar":
            return {"type": "grammar", "grammar": form.text}
        case "choice":
            return either(*({"type": "const_string", "value": text} for text in form.choice or ()))
    tag: Format = json.loads(form.text)["format"]
    return tag


def is_strict(tool: Tool) -> bool:
    return tool["function"].get("strict") is True


def _tag(format_name: str, tool: Tool, *, keeps_schema: bool) -> Format:
    name = tool_name(tool)
    quoted = json.dumps(name, ensure_ascii=False)
    schema = _schema(tool) if keeps_schema else None
    if format_name == "qwen3_coder":
        begin, end = f"<tool_call>\n<function={name}>\n", "</function>\n</tool_call>"
        return {"type": "tag", "begin": begin, "content": parameters_form(schema), "end": end}
    if format_name == "hermes":
        begin, end = f'<tool_call>\n{{"name": {quoted}, "arguments": ', "}\n</tool_call>"
    else:
        begin, end = f'{{"name": {quoted}, "parameters": ', "}"
    content = {"type": "json_schema", "json_schema": schema or _ANY_OBJECT, "max_whitespace_cnt": MAX_WHITESPACE}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _schema(tool: Tool) -> dict[str, Any] | None:
    """Of the arguments; None where it cannot be kept and need not be."""
    schema = dict(parameters_of(tool))
    if not is_strict(tool) and unsupported_keyword(schema) is not None:
        return None  # it was a hint to the model, and stays one
    return {"properties": {}, **schema, "type": "object"}
