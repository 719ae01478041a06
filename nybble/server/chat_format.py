"""`ChatFormat`: how the served model writes tool calls and reasoning, as its checkpoint's chat template shows."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.text.chat_template import ChatTemplate
from nybble.text.reasoning import may_think
from nybble.text.tool_calls import detect

THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """
    Args:
        tool_calls: the name of a format of `nybble.text.tool_calls`; None if the model knows no tools.
        may_think: answers may begin with reasoning.
    """

    tool_calls: str | None = None
    may_think: bool = False

    @classmethod
    def of(cls, template: ChatTemplate | None, tool_call_parser: str | None = None) -> ChatFormat:
        """The format that a template shows.

        Args:
            tool_call_parser: the operator's word for it, taken in place of what the template shows.
        """
        sources = {} if template is None else template.sources
        with_tools = sources.get("tool_use", sources.get("default", ""))
        return cls(
            tool_calls=tool_call_parser or detect(with_tools),
            may_think=any(may_think(source) for source in sources.values()),
        )
