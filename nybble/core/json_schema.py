"""Which of a JSON schema's keywords generation would not heed: a schema that uses one is refused, not half kept."""

from __future__ import annotations

from typing import Any

_IGNORED = frozenset(
    {"multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}
)
_FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"}
    | {"uri-template", "json-pointer", "relative-json-pointer"}
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")


def unsupported_keyword(schema: object) -> str | None:
    """The first part of a schema, decoded from JSON, that the compiler would ignore silently."""
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        if not isinstance(part, dict):
            continue
        for name, value in part.items():
            if name in _IGNORED and value not in (False, None):
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
