"""`checked_messages`: messages as clients send them → as templates read them."""

from __future__ import annotations

from typing import Any

import msgspec

from nybble.core.checks import shown
from nybble.server.errors import ApiError, bad_request
from nybble.server.limits import shape_complaint
from nybble.server.settings import Limits

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
"""What clients call a speaker → what templates do. OpenAI renamed system, models did not."""


def checked_messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """
    Raises:
        ApiError: they are not sound; says which.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages must be a list of at least one message", messages)
    arguments: list[bytes] = []
    checked = [_checked_message(message, f"messages[{index}]", arguments) for index, message in enumerate(messages)]
    # Inside of strings the body's layer has not looked. All at once, for the limits are the body's.
    complaint = shape_complaint(b",".join(arguments), limits) if arguments else None
    if complaint is not None:
        raise bad_request(f"in the arguments of tool_calls, {complaint}", "messages", "limit_exceeded")
    for index, message in enumerate(checked):
        for number, call in enumerate(message.get("tool_calls", ())):
            call["function"]["arguments"] = _decoded(
                call["function"].get("arguments"), f"messages[{index}].tool_calls[{number}].function.arguments"
            )
    return checked


def _checked_message(message: Any, place: str, arguments: list[bytes]) -> dict[str, Any]:
    """Texts of calls' arguments are left as they are, and put into `arguments` too."""
    if not isinstance(message, dict):
        raise _wrong(f"{place} must be an object", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{place}.role must be one of {', '.join(ROLES)}", role)
    for name in ("function_call", "audio"):
        if message.get(name):
            remedy = "; send it as tool_calls" if name == "function_call" else ""
            raise _wrong(f"{place}.{name} is not supported by this server{remedy}", message[name])
    content = message.get("content")
    # Templates ask whether there are calls by whether the key is there.
    checked = {name: value for name, value in message.items() if name != "tool_calls"} | {"role": ROLES[role]}
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise _wrong(f"{place}.tool_calls must be a list, in a message of the assistant", calls)
        checked["tool_calls"] = [
            _checked_call(call, f"{place}.tool_calls[{number}]", arguments) for number, call in enumerate(calls)
        ]
        if content is None:
            content = checked["content"] = ""  # templates add it to texts
    if not isinstance(message.get("tool_call_id"), str | None):
        raise _wrong(f"{place}.tool_call_id must be a string", message["tool_call_id"])
    if isinstance(content, list):
        if not content:
            raise _wrong(f"{place}.content must have at least one part", content)
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _wrong(f'{place}.content may hold parts {{"type": "text", "text": …}} only', part)
    elif not isinstance(content, str):
        raise _wrong(f"{place}.content must be text or a list of text parts", content)
    return checked


def _checked_call(call: Any, place: str, arguments: list[bytes]) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise _wrong(f"{place} must be an object", call)
    if call.get("type") not in ("function", None):
        raise _wrong(f'{place}.type must be "function"', call["type"])
    if not isinstance(call.get("id"), str | None):
        raise _wrong(f"{place}.id must be a string", call["id"])
    function = call.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{place}.function must be an object", function)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{place}.function.name must be a string that is not empty", name)
    given = function.get("arguments")
    if isinstance(given, str):
        arguments.append(given.encode("utf-8", "replace"))
    plain = {key: value for key, value in call.items() if value is not None}
    return {**plain, "type": "function", "function": dict(function)}


def _decoded(arguments: Any, place: str) -> dict[str, Any]:
    """The object that templates ask for. Clients that call without arguments may leave them out."""
    value = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            value = msgspec.json.decode(arguments)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise _wrong(f"{place} must be the JSON text of an object ({error})", arguments) from None
    elif arguments is None or isinstance(arguments, str):
        return {}
    if not isinstance(value, dict):
        raise _wrong(f"{place} must be the JSON text of an object", arguments)
    return value


def _wrong(rule: str, value: object) -> ApiError:
    return bad_request(f"{rule}, got {shown(value)}", "messages", "invalid_value")
