"""Tool calls in a model's answer: found as the text arrives, for each format that checkpoints were trained on."""

from __future__ import annotations

from nybble.text.tool_calls.choice import ToolPlan, plan_tools
from nybble.text.tool_calls.deltas import Arguments, CallBegin, Content, Delta, new_call_id
from nybble.text.tool_calls.detect import detect
from nybble.text.tool_calls.hermes import HermesParser
from nybble.text.tool_calls.llama3_json import Llama3JsonParser
from nybble.text.tool_calls.parser import Tool, ToolCallParser
from nybble.text.tool_calls.qwen3_coder import Qwen3CoderParser

__all__ = [
    "FORMATS",
    "Arguments",
    "CallBegin",
    "Content",
    "Delta",
    "Tool",
    "ToolCallParser",
    "ToolPlan",
    "detect",
    "new_call_id",
    "parser_for",
    "plan_tools",
]

FORMATS: dict[str, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "qwen3_coder": Qwen3CoderParser,
}


def parser_for(name: str) -> type[ToolCallParser]:
    """The format's parser; call it with the request's tools, once for each answer.

    Raises:
        ValueError: no format has this name.
    """
    if name not in FORMATS:
        raise ValueError(f"no tool call format is named {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
