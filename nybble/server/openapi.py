"""The description at /openapi.json. Routes read their bodies themselves, so the bodies' models are put in by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from nybble.server.protocol import (
    AbortRequest,
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def body_of(model: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    errors = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"4XX": errors, "5XX": errors},
    }


def describe(app: FastAPI) -> None:
    """Make `app.openapi` know the models."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            models = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest, AbortRequest)
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            schemas["Error"] = _ERROR
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
