"""`ParameterValue`: one value that is written as plain text becomes JSON in a call's arguments.

A value that can only be a string passes on as it comes; others wait for their end, when it shows what they are.
"""

from __future__ import annotations

import json

from nybble.text.tool_calls.deltas import DeltaWriter
from nybble.text.tool_calls.schema_types import STRING, to_json


class ParameterValue:
    """Takes the text between a parameter's tags; the line break that the format puts at each end is taken off."""

    def __init__(self, writer: DeltaWriter, types: frozenset[str]) -> None:
        self.at_line_start = True
        self._writer = writer
        self._types = types
        self._is_string = types == STRING
        self._waiting: list[str] = []  # of a value that may be something else than a string
        self._is_first = True
        self._holds_break = False
        if self._is_string:
            writer.arguments('"')

    def push(self, text: str) -> None:
        if self._is_first and text:
            self._is_first = False
            text = text.removeprefix("\n")
        if not text:
            return
        if self._holds_break:
            text = "\n" + text
        self.at_line_start = self._holds_break = text.endswith("\n")
        text = text.removesuffix("\n")
        if self._is_string:
            self._writer.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._waiting.append(text)

    def end(self) -> None:
        self._writer.arguments('"' if self._is_string else to_json("".join(self._waiting), self._types))
