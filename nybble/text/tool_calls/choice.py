"""What a request's `tools` and `tool_choice` ask of the server: are calls looked for, and what else it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nybble.core.errors import RequestError
from nybble.text.tool_calls.parser import Tool, tool_name


class ToolPlan(NamedTuple):
    """How to serve a request.

    parses: the answer goes through the format's parser; else all of it is content.
    must_call: one of these tools has to be called, which takes structured output; empty where the model decides.
    stop_tokens: end an answer besides the checkpoint's own end tokens, where the vocabulary has them: a model that
        expects a tool's result ends its turn with another token.
    tags: must show in the answer's text: where the vocabulary has one as a special token, the detokenizer must not
        leave special tokens out.
    """

    parses: bool
    must_call: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


NO_TOOLS = ToolPlan(parses=False)


def plan_tools(format_name: str | None, tools: Sequence[Tool] | None, tool_choice: object = None) -> ToolPlan:
    """The plan for a request.

    Args:
        format_name: the model's; None if it is not known.
        tool_choice: as OpenAI's clients send it: None, "none", "auto", "required" or
            `{"type": "function", "function": {"name": …}}`.

    Raises:
        RequestError: the choice is none of these or names no tool, or this model's calls cannot be read.
    """
    names = tuple(tool_name(tool) for tool in tools or ())
    must_call = _must_call(tool_choice, names)
    if tool_choice == "none" or not names:
        return NO_TOOLS
    if format_name is None:
        raise RequestError(
            "this model's chat template shows no format of tool calls that nybble reads; send no tools, "
            'or tool_choice="none", or start the server with the format\'s name',
            parameter="tools",
        )
    is_llama = format_name == "llama3_json"
    return ToolPlan(
        parses=True,
        must_call=must_call,
        stop_tokens=("<|eom_id|>",) if is_llama else (),
        # <|python_tag|> is a special token too, but a call is read without it as well.
        tags=() if is_llama else ("<tool_call>", "</tool_call>"),
    )


def _must_call(tool_choice: object, names: tuple[str, ...]) -> tuple[str, ...]:
    if tool_choice is None or tool_choice in ("none", "auto"):
        return ()
    if tool_choice == "required":
        if not names:
            raise RequestError('tool_choice="required" needs tools', parameter="tool_choice")
        return names
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
            parameter="tool_choice",
        )
    if name not in names:
        raise RequestError(f"tool_choice names {name!r}, which is none of the tools", parameter="tool_choice")
    return (name,)
