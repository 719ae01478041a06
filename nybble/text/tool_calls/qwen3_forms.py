"""The form of a Qwen3-Coder call's parameters: plain text between tags, as `qwen3_coder` reads it.

Which values are written as they are and which as JSON, the schema's types say, here as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nybble.text.tool_calls.schema_types import parameter_types

Format = dict[str, Any]

_END = "\n</parameter>\n"
_TEXT: Format = {"type": "any_text"}
_ANY_PARAMETERS: Format = {
    "type": "star",
    "content": {
        "type": "sequence",
        "elements": [
            {"type": "regex", "pattern": r"<parameter=[A-Za-z0-9_.-]{1,64}>\n"},
            {"type": "tag", "begin": "", "content": _TEXT, "end": _END},
        ],
    },
}


def parameters_form(schema: Mapping[str, Any] | None) -> Format:
    """The parameters in the schema's order, those it requires at least. None: any parameters."""
    if schema is None:
        return _ANY_PARAMETERS
    properties, required = schema.get("properties"), schema.get("required")
    elements: list[Format] = []
    for name, value in (properties if isinstance(properties, Mapping) else {}).items():
        tag = {"type": "tag", "begin": f"<parameter={name}>\n", "content": _value(name, value, schema), "end": _END}
        is_required = isinstance(required, list) and name in required
        elements.append(tag if is_required else {"type": "optional", "content": tag})
    return {"type": "sequence", "elements": elements} if elements else {"type": "const_string", "value": ""}


def _value(name: str, value: object, root: Mapping[str, Any]) -> Format:
    types = parameter_types(root, name)
    own: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
    if "string" not in types:
        shared = {place: root[place] for place in ("$defs", "definitions") if place in root}
        return {"type": "json_schema", "json_schema": {**shared, **own}}
    choices = [own["const"]] if "const" in own else own.get("enum")
    if isinstance(choices, list) and choices:
        texts = [choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False) for choice in choices]
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}
    if isinstance(pattern := own.get("pattern"), str):
        return {"type": "regex", "pattern": pattern}
    shortest, longest = own.get("minLength"), own.get("maxLength")
    if not isinstance(shortest, int) and not isinstance(longest, int):
        return _TEXT
    # Without "<" no text can be taken for the end, so its characters can be counted.
    bounds = f"{shortest if isinstance(shortest, int) else 0},{longest if isinstance(longest, int) else ''}"
    return {"type": "regex", "pattern": f"[^<]{{{bounds}}}"}
