"""`read_body`: the bytes of a request become one of `protocol`'s models, or an `ApiError` that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import Request

from nybble.core.checks import shown
from nybble.server.errors import ApiError, bad_request
from nybble.server.fields import refuse_unsupported
from nybble.server.protocol import Body

Model = TypeVar("Model", bound=Body)


def check_content_type(request: Request) -> None:
    """JSON must be called JSON: browsers ask before they let a foreign page send that, unlike forms and plain text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"the body must be sent as Content-Type: application/json, not {shown(kind)}")


def read_body(content: bytes, model: type[Model], unsupported: Mapping[str, tuple[Any, ...]]) -> Model:
    """Computes only, so it may run in a thread."""
    try:
        fields = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    refuse_unsupported(fields, unsupported)
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise _describe(error) from None


def _describe(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    name = place[0] if place else None
    if first["type"] == "missing":
        return bad_request(f"{'.'.join(place)} is required", name, "missing_field")
    reason = first["msg"].removeprefix("Input ")
    return bad_request(f"{'.'.join(place)} {reason}, got {shown(first['input'])}", name, "invalid_value")
