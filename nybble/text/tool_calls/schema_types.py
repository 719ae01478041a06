"""Values written as plain text, without quotes, become JSON: which type is meant, the tool's JSON schema says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nybble.text.tool_calls.json_scanner import read_whole

STRING = frozenset({"string"})
ANY = frozenset[str]()
_PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}
_KIND_OF = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null", list: "array"}


def parameter_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The JSON Schema types that a parameter may have, or `ANY`. A parameter that nobody declared is a string."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or name not in properties:
        return STRING
    found: set[str] = set()
    pending: list[object] = [properties[name]]
    seen: set[int] = set()  # schemas come from clients, and may refer to themselves
    while pending:
        place = pending.pop()
        if id(place) in seen:
            continue
        seen.add(id(place))
        here, further = _look(place, schema)
        if not here and not further:
            return ANY
        found |= here
        pending += further
    return frozenset(found)


def to_json(text: str, types: frozenset[str]) -> str:
    """The value as JSON: of one of the types if it can be read so, else as a string."""
    trimmed = text.strip()
    whole = read_whole(_PYTHON_LITERALS.get(trimmed, trimmed)) if types != STRING else None
    if whole is not None:
        kind, value = whole
        # Quotes are part of a string, unless nothing was declared and so a model has to write them.
        if not types or (kind in types and kind != "string") or (kind == "number" and "integer" in types):
            return value
    return json.dumps(text, ensure_ascii=False)


def _look(schema: object, root: Mapping[str, Any]) -> tuple[set[str], list[object]]:
    """The types a schema names itself, and the schemas that name more."""
    if not isinstance(schema, Mapping):
        return set(), []
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}, []
    if isinstance(declared, list):
        return {kind for kind in declared if isinstance(kind, str)}, []
    if "const" in schema:
        return {_kind_of(schema["const"])}, []
    if isinstance(values := schema.get("enum"), list):
        return {_kind_of(value) for value in values}, []
    if isinstance(reference := schema.get("$ref"), str):
        return set(), [_resolve(reference, root)]
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(word), list):
            return set(), parts
    return set(), []


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    """A place inside the schema itself, such as #/$defs/Colour; None for any other."""
    first, *path = reference.split("/")
    place: object = root if first == "#" else None
    for step in path:
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place


def _kind_of(value: object) -> str:
    return _KIND_OF.get(type(value), "object")
