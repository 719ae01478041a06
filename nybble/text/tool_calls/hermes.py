"""Hermes' format, also of Qwen2.5 and Qwen3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` amid text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from nybble.text.tool_calls.deltas import SPACE, new_call_id
from nybble.text.tool_calls.json_call import CallStatus, JsonCall
from nybble.text.tool_calls.parser import Tool, ToolCallParser
from nybble.text.tool_calls.tags import TagExpected, TagSearch

_BEGIN = "<tool_call>"
_END = "</tool_call>"


class _Mode(Enum):
    TEXT = auto()
    CALL = auto()
    BROKEN = auto()  # in arguments that are no JSON: what is left of them, to the end tag
    AFTER = auto()  # wants the end tag; brackets too many, and none at all, are forgiven


class HermesParser(ToolCallParser):
    """The tags say what is a call, so a name that no tool has is passed on: the caller can tell the model."""

    def __init__(
        self, tools: Sequence[Tool] = (), *, parallel: bool = True, new_id: Callable[[], str] = new_call_id
    ) -> None:
        super().__init__(tools, parallel=parallel, new_id=new_id)
        self._mode = _Mode.TEXT
        self._search = TagSearch(_BEGIN)
        self._end_search = TagSearch(_END)
        self._call = JsonCall(self._writer)
        self._end_tag = _expect_end()

    def _read(self, text: str, start: int) -> int:
        if self._mode is _Mode.TEXT:
            return self._read_text(text, start)
        if self._mode is _Mode.CALL:
            return self._read_call(text, start)
        if self._mode is _Mode.AFTER:
            position = self._end_tag.read(text, start)
            if self._end_tag.tag or self._end_tag.refused:
                self._mode = _Mode.TEXT
                if self._end_tag.refused:
                    self._read_text(self._end_tag.held, 0)
            return position
        clear, position, tag = self._end_search.read(text, start)
        self._writer.arguments(clear)
        if tag:
            self._mode = _Mode.TEXT
            self._end_call()
        return position

    def _read_text(self, text: str, start: int) -> int:
        clear, position, tag = self._search.read(text, start)
        self._writer.content(clear)
        if tag:
            self._mode = _Mode.CALL
            self._call = JsonCall(self._writer)
        return position

    def _read_call(self, text: str, start: int) -> int:
        position = self._call.read(text, start)
        if self._call.status is CallStatus.COMPLETE:
            self._mode = _Mode.AFTER
            self._end_tag = _expect_end()
            self._end_call()
        elif self._call.status is CallStatus.BROKEN:
            self._mode = _Mode.BROKEN
        elif self._call.status is CallStatus.REFUSED:
            self._mode = _Mode.TEXT
            self._give_up()
        return position

    def _give_up(self) -> None:
        """What was read is no call. Nothing is left to do for one that has begun."""
        if (held := self._call.held) is not None:
            self._writer.content(_BEGIN + held)

    def _end(self) -> None:
        if self._mode is _Mode.TEXT:
            self._writer.content(self._search.flush())
        elif self._mode is _Mode.CALL:
            self._give_up()
        elif self._mode is _Mode.BROKEN:
            self._writer.arguments(self._end_search.flush())


def _expect_end() -> TagExpected:
    return TagExpected(_END, skip=SPACE + "}")
