"""`tools`, `tool_choice` and `parallel_tool_calls` of a body: checked, and what they ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

from nybble.core.checks import shown
from nybble.server.chat_format import ChatFormat
from nybble.server.errors import ApiError, bad_request
from nybble.server.protocol import ToolFields
from nybble.text.tool_calls import ToolPlan, plan_tools

MAX_NAME_CHARS = 256


class ToolWishes(NamedTuple):
    """
    tools: what the template shows the model; empty also with tool_choice "none", for it must not call them.
    names_call: the client says which function has to be called.
    """

    tools: list[dict[str, Any]]
    plan: ToolPlan
    names_call: bool = False


def tool_wishes(fields: ToolFields, chat_format: ChatFormat) -> ToolWishes:
    """
    Raises:
        ApiError, RequestError: a tool is not sound, or the choice asks for what this server cannot do.
    """
    tools = _checked(fields.tools)
    choice = fields.tool_choice
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) and len(name) > MAX_NAME_CHARS:  # no tool's, and too long for a message
        raise bad_request(f"tool_choice names none of the tools, got {shown(choice)}", "tool_choice", "invalid_value")
    plan = plan_tools(chat_format.tool_calls, tools, choice)
    return ToolWishes(tools if plan.parses else [], plan, bool(plan.must_call) and isinstance(choice, dict))


def _checked(tools: Any) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise _wrong("tools must be a list", tools)
    return [_checked_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _checked_tool(tool: Any, place: str) -> dict[str, Any]:
    """A copy without the fields that are null: templates would print them."""
    if not isinstance(tool, dict):
        raise _wrong(f"{place} must be an object", tool)
    if tool.get("type") != "function":
        raise _wrong(f'{place}.type must be "function"', tool.get("type"))
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{place}.function must be an object", function)
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise _wrong(f"{place}.function.name must be a string of 1 to {MAX_NAME_CHARS} characters", name)
    for field, kind, words in (
        ("description", str, "a string"),
        ("parameters", dict, "an object: a JSON schema"),
        ("strict", bool, "true or false"),
    ):
        value = function.get(field)
        if value is not None and not isinstance(value, kind):
            raise _wrong(f"{place}.function.{field} must be {words}", value)
    plain = {key: value for key, value in tool.items() if value is not None}
    return {**plain, "function": {key: value for key, value in function.items() if value is not None}}


def _wrong(rule: str, value: object) -> ApiError:
    return bad_request(f"{rule}, got {shown(value)}", "tools", "invalid_value")
