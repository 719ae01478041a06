"""Llama 3's JSON format: the whole answer is `{"name": …, "parameters": {…}}`, or several with ";" between them.

`<|python_tag|>` may stand before a call; where special tokens are left out of the text, it does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from nybble.text.tool_calls.deltas import SPACE, new_call_id
from nybble.text.tool_calls.json_call import CallStatus, JsonCall
from nybble.text.tool_calls.parser import Tool, ToolCallParser
from nybble.text.tool_calls.tags import TagExpected

_PYTHON_TAG = "<|python_tag|>"


class _Mode(Enum):
    BETWEEN = auto()  # before a call
    CALL = auto()
    BROKEN = auto()  # in arguments that are no JSON: the rest of the answer belongs to them
    TEXT = auto()  # no call comes any more


class Llama3JsonParser(ToolCallParser):
    """Nothing marks a call, so only JSON that names one of the tools is one; any other answer is content."""

    def __init__(
        self, tools: Sequence[Tool] = (), *, parallel: bool = True, new_id: Callable[[], str] = new_call_id
    ) -> None:
        super().__init__(tools, parallel=parallel, new_id=new_id)
        self._mode = _Mode.BETWEEN
        self._expected = TagExpected(_PYTHON_TAG, "{")
        self._lead: list[str] = []  # what stands before the next call, as far as it was read
        self._call = self._new_call()

    def _new_call(self) -> JsonCall:
        return JsonCall(self._writer, self._schemas.keys())

    def _read(self, text: str, start: int) -> int:
        if self._mode is _Mode.BETWEEN:
            return self._read_between(text, start)
        if self._mode is _Mode.CALL:
            return self._read_call(text, start)
        if self._mode is _Mode.BROKEN:
            self._writer.arguments(text[start:])
        else:
            self._writer.content(text[start:])
        return len(text)

    def _read_between(self, text: str, start: int) -> int:
        expected = self._expected
        position = expected.read(text, start)
        if expected.tag is None and not expected.refused:
            return position
        self._lead.append(expected.held)
        if expected.refused:
            self._give_up("")
        elif expected.tag == "{":
            self._mode = _Mode.CALL
            self._call = self._new_call()
            return position - 1
        else:
            self._lead.append(expected.tag or "")
            self._expected = TagExpected("{") if expected.tag == _PYTHON_TAG else TagExpected(_PYTHON_TAG, "{")
        return position

    def _read_call(self, text: str, start: int) -> int:
        position = self._call.read(text, start)
        if self._call.status is CallStatus.COMPLETE:
            self._mode = _Mode.BETWEEN
            self._lead.clear()
            self._expected = TagExpected(";", _PYTHON_TAG, "{", skip=SPACE + "}")
            self._end_call()
        elif self._call.status is CallStatus.BROKEN:
            self._mode = _Mode.BROKEN
        elif self._call.status is CallStatus.REFUSED:
            self._give_up(self._call.held)
        return position

    def _give_up(self, held: str | None) -> None:
        """What was read is no call (None: it has begun, and stays one)."""
        self._mode = _Mode.TEXT
        if held is not None:
            self._writer.content("".join(self._lead) + held)

    def _end(self) -> None:
        if self._mode is _Mode.CALL:
            self._give_up(self._call.held)
        elif self._mode is _Mode.BETWEEN and not self.num_calls:  # after a call it is a separator
            self._give_up(self._expected.held)
