"""`ToolCallParser`: what every format's parser is, and the parts they share.

A parser is a machine over characters: what it hands on depends on the text alone, never on how it is cut into pushes.
Each character of an answer becomes content, part of a call, or known syntax; nothing is ever taken back, and the work
for a character does not grow with the text.

A call that does not hold what its format asks for, before its name and the beginning of its arguments are known, is
content, exactly as it was written. Later it stays a call, and its arguments are what the model wrote: callers must
expect arguments that are no valid JSON, as with any model. An answer cut off inside of a call leaves its arguments
unfinished, so that nobody runs half of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nybble.text.tool_calls.deltas import Delta, DeltaWriter, new_call_id

Tool = Mapping[str, Any]
"""A tool as OpenAI's clients describe it: `{"type": "function", "function": {"name": …, "parameters": …}}`."""


class ToolCallParser(ABC):
    """Splits one answer into content and tool calls.

    Args:
        tools: what the request offered.
        parallel: False ends the answer after its first call: what follows is dropped, and `done` says so.
        new_id: makes the calls' ids.
    """

    def __init__(
        self, tools: Sequence[Tool] = (), *, parallel: bool = True, new_id: Callable[[], str] = new_call_id
    ) -> None:
        self.done = False
        self._schemas = {tool_name(tool): parameters_of(tool) for tool in tools}
        self._parallel = parallel
        self._writer = DeltaWriter(new_id)

    @property
    def num_calls(self) -> int:
        """Calls that have begun; the answer's finish reason is "tool_calls" if there are any."""
        return self._writer.num_calls

    def push(self, text: str) -> list[Delta]:
        """Take more of the answer. Returns what is certain now."""
        position = 0
        while position < len(text) and not self.done:
            position = self._read(text, position)
        return self._writer.take()

    def finish(self) -> list[Delta]:
        """The answer has ended. Returns what was held back."""
        if not self.done:
            self._end()
        return self._writer.finish()

    @abstractmethod
    def _read(self, text: str, start: int) -> int:
        """Read from `start` as far as the present state goes. Returns where it ended."""

    @abstractmethod
    def _end(self) -> None:
        """Write what is held back, as far as it is not syntax."""

    def _end_call(self) -> None:
        self.done = not self._parallel


def tool_name(tool: Tool) -> str:
    return str(tool["function"]["name"])


def parameters_of(tool: Tool) -> Mapping[str, Any]:
    """The JSON schema of a tool's arguments; empty where there is none."""
    parameters = tool["function"].get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}
