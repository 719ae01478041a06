"""Qwen3-Coder's format: values as plain text between tags, typed by the tool's JSON schema.

<tool_call>
<function=NAME>
<parameter=KEY>
value
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from nybble.text.tool_calls.deltas import new_call_id
from nybble.text.tool_calls.json_call import is_usable_name
from nybble.text.tool_calls.parameter_value import ParameterValue
from nybble.text.tool_calls.parser import Tool, ToolCallParser
from nybble.text.tool_calls.schema_types import parameter_types
from nybble.text.tool_calls.tags import TagExpected, TagSearch

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_END_FUNCTION = "</function>"
_PARAMETER = "<parameter="
_END_PARAMETER = "</parameter>"
_NAME_RUN = re.compile(r"[^<>\r\n]*")


class _Mode(Enum):
    TEXT = auto()
    BETWEEN = auto()  # wants one of the tags in `_expected`
    NAME = auto()  # of the function, up to ">"
    KEY = auto()  # of a parameter, up to ">"
    VALUE = auto()
    NEXT_KEY = auto()  # in a value, where another parameter seems to begin


class Qwen3CoderParser(ToolCallParser):
    """`<tool_call>` may be missing before a known tool's `<function=…>`, and so may the tags that end a call.

    A value may itself be text about tags: only `</parameter>` ends it, or a line that begins with another parameter
    of the tool, for models forget the end tag. Where the last value has none, the arguments stay open.
    """

    def __init__(
        self, tools: Sequence[Tool] = (), *, parallel: bool = True, new_id: Callable[[], str] = new_call_id
    ) -> None:
        super().__init__(tools, parallel=parallel, new_id=new_id)
        self._mode = _Mode.TEXT
        self._search = TagSearch(_BEGIN, _FUNCTION)
        self._expected = TagExpected(_FUNCTION)
        self._value_tags = TagSearch(_END_PARAMETER, _PARAMETER)
        self._held: list[str] = []  # of a call or parameter that has not begun, as it was written
        self._label: list[str] = []  # the name of a function or parameter, as far as it was read
        self._is_bare = False  # no <tool_call> came before <function=
        self._in_call = False  # the call has begun, and its arguments are open
        self._schema: Mapping[str, Any] = {}
        self._open_parameters: set[str] = set()  # declared, and not written yet
        self._separator = ""
        self._value: ParameterValue

    def _read(self, text: str, start: int) -> int:
        if self._mode is _Mode.TEXT:
            return self._read_text(text, start)
        if self._mode is _Mode.BETWEEN:
            return self._read_between(text, start)
        if self._mode is _Mode.VALUE:
            return self._read_value(text, start)
        return self._read_label(text, start)

    def _read_text(self, text: str, start: int) -> int:
        clear, position, tag = self._search.read(text, start)
        self._writer.content(clear)
        if tag is not None:
            self._held = [tag]
            self._is_bare = tag == _FUNCTION
            if self._is_bare:
                self._mode = _Mode.NAME
            else:
                self._expect(_FUNCTION)
        return position

    def _expect(self, *tags: str) -> None:
        self._mode = _Mode.BETWEEN
        self._expected = TagExpected(*tags)

    def _read_between(self, text: str, start: int) -> int:
        expected = self._expected
        position = expected.read(text, start)
        if expected.refused:
            self._to_text("".join(self._held), expected.held)
        elif expected.tag is not None:
            self._held += (expected.held, expected.tag)
            self._take_tag(expected.tag)
        return position

    def _take_tag(self, tag: str) -> None:
        if tag == _FUNCTION:
            self._mode = _Mode.NAME
        elif tag == _PARAMETER:
            self._mode = _Mode.KEY
        else:
            if self._in_call:
                self._writer.arguments("}")
                self._in_call = False
                self._end_call()
            self._held.clear()
            if tag == _END:
                self._mode = _Mode.TEXT
            else:
                self._expect(_END, _FUNCTION)

    def _read_label(self, text: str, start: int) -> int:
        match = _NAME_RUN.match(text, start)
        assert match is not None
        self._label.append(match[0])
        position = match.end()
        if position == len(text):
            return position
        label = "".join(self._label)
        self._label.clear()
        if text[position] == ">" and is_usable_name(name := label.strip()):
            position += 1
            written, usable = label + ">", True
        else:
            written, usable = label, False
        if self._mode is _Mode.NEXT_KEY:
            if usable and name in self._open_parameters:  # </parameter> was forgotten
                self._value.end()
                self._begin_value(name)
            else:
                self._mode = _Mode.VALUE
                self._value.push(_PARAMETER + written)
        elif self._mode is _Mode.KEY and usable:
            self._begin_value(name)
        elif self._mode is _Mode.NAME and usable and (not self._is_bare or name in self._schemas):
            self._begin_call(name)
        else:
            self._to_text("".join(self._held) + written)
        return position

    def _begin_call(self, name: str) -> None:
        self._held.clear()
        self._in_call = True
        self._schema = self._schemas.get(name, {})
        properties = self._schema.get("properties")
        self._open_parameters = set(properties) if isinstance(properties, Mapping) else set()
        self._separator = ""
        self._writer.begin(name)
        self._writer.arguments("{")
        self._expect(_PARAMETER, _END_FUNCTION, _END)

    def _begin_value(self, key: str) -> None:
        self._held.clear()
        self._open_parameters.discard(key)
        self._writer.arguments(f"{self._separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._separator = ", "
        self._value = ParameterValue(self._writer, parameter_types(self._schema, key))
        self._mode = _Mode.VALUE

    def _read_value(self, text: str, start: int) -> int:
        clear, position, tag = self._value_tags.read(text, start)
        self._value.push(clear)
        if tag == _END_PARAMETER:
            self._value.end()
            self._expect(_PARAMETER, _END_FUNCTION, _END)
        elif tag is not None and self._value.at_line_start:
            self._mode = _Mode.NEXT_KEY
        elif tag is not None:
            self._value.push(tag)
        return position

    def _to_text(self, held: str, tail: str = "") -> None:
        """What was read is no call, or no part of the one that has begun: then its arguments stay open.

        Args:
            tail: may end with the beginning of another tag.
        """
        self._mode = _Mode.TEXT
        self._held.clear()
        if self._in_call:
            self._in_call = False
            self._end_call()
        if not self.done:
            self._writer.content(held)
            self._read_text(tail, 0)

    def _end(self) -> None:
        if self._mode is _Mode.TEXT:
            self._writer.content(self._search.flush())
        elif self._held and not self._in_call:
            label = "".join(self._label) if self._mode is _Mode.NAME else self._expected.held
            self._writer.content("".join(self._held) + label)
