"""Which of a JSON schema's keywords would be ignored: a schema that uses one is refused, for it would not be kept."""

from __future__ import annotations

from typing import Any

import msgspec

IGNORED = frozenset(
    {
        "multipleOf",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "not",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "$dynamicRef",
        "$recursiveRef",
    }
)
_FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"}
    | {"uri-template", "json-pointer", "relative-json-pointer"}
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")


def unsupported_keyword(text: str) -> str | None:
    """The first keyword of a schema, given as JSON, that generation would not heed."""
    pending: list[Any] = [msgspec.json.decode(text)]
    while pending:
        schema = pending.pop()
        if not isinstance(schema, dict):
            continue
        for name, value in schema.items():
            if name in IGNORED and value not in (False, None):
                return f'"{name}"'
            if name == "format" and value not in _FORMATS:
                return f'the format "{str(value)[:40]}"'
            if name in _MAPS and isinstance(value, dict):
                pending.extend(value.values())
            elif name in _LISTS and isinstance(value, list):
                pending.extend(value)
            elif name in _SINGLE:
                pending.append(value)
    return None
