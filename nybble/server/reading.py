"""`Reading`: how the text of a job's answers is to be read; `Reader` reads one: reasoning, content and tool calls.

What comes out, joined, depends on the text alone, not on how it is cut into pushes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.server.responses import CalledFunction, CalledFunctionDelta, Delta, ToolCall, ToolCallDelta
from nybble.text import tool_calls
from nybble.text.reasoning import ReasoningSplitter
from nybble.text.tool_calls import Arguments, CallBegin, Content, Tool, ToolCallParser, parser_for


@dataclass(frozen=True, kw_only=True)
class Reading:
    """
    Args:
        tool_calls: the format in which calls of `tools` are looked for; None looks for none.
        parallel: False ends an answer after its first call.
        may_think: an answer may begin with reasoning.
        is_thinking: the prompt ends inside of it.
        stop_token_ids: end an answer, though the client did not ask for them.
        names_call: the client named the function, so that it is called is no reason to end.
    """

    tool_calls: str | None = None
    tools: tuple[Tool, ...] = ()
    parallel: bool = True
    may_think: bool = False
    is_thinking: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    names_call: bool = False

    @property
    def is_plain(self) -> bool:
        """All of the text is content."""
        return self.tool_calls is None and not self.may_think


class Reader:
    """Reads one answer."""

    def __init__(self, reading: Reading) -> None:
        self._splitter = ReasoningSplitter(opened=reading.is_thinking) if reading.may_think else None
        self._parser: ToolCallParser | None = None
        if reading.tool_calls is not None:
            self._parser = parser_for(reading.tool_calls)(reading.tools, parallel=reading.parallel)

    @property
    def is_done(self) -> bool:
        """The first call is complete, and no more may come."""
        return self._parser is not None and self._parser.done

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def push(self, text: str) -> Iterator[Delta]:
        """Take more of the answer. Each delta says one thing, for there are clients that read no second."""
        content = text
        if self._splitter is not None:
            reasoning, content = self._splitter.push(text)
            if reasoning:
                yield Delta(reasoning_content=reasoning)
        yield from self._parse(content)

    def finish(self) -> Iterator[Delta]:
        """The answer has ended: what was held back."""
        if self._splitter is not None:
            reasoning, content = self._splitter.finish()
            if reasoning:
                yield Delta(reasoning_content=reasoning)
            yield from self._parse(content)
        if self._parser is not None:
            yield from _deltas(self._parser.finish())

    def _parse(self, content: str) -> Iterator[Delta]:
        if self._parser is not None:
            yield from _deltas(self._parser.push(content))
        elif content:
            yield Delta(content=content)


def _deltas(found: list[tool_calls.Delta]) -> Iterator[Delta]:
    begun: ToolCallDelta | None = None  # waits for its first arguments
    for item in found:
        if isinstance(item, Arguments) and begun is not None:
            begun.function.arguments += item.text
        elif isinstance(item, Arguments):
            yield Delta(tool_calls=[ToolCallDelta(item.index, CalledFunctionDelta(item.text))])
            continue
        if begun is not None:
            yield Delta(tool_calls=[begun])
            begun = None
        if isinstance(item, Content):
            yield Delta(content=item.text)
        elif isinstance(item, CallBegin):
            begun = ToolCallDelta(item.index, CalledFunctionDelta("", item.name), item.id, "function")
    if begun is not None:
        yield Delta(tool_calls=[begun])


def add_call(calls: list[ToolCall], delta: ToolCallDelta) -> None:
    """Take what a delta says into a whole message's calls."""
    if isinstance(delta.id, str) and isinstance(delta.function.name, str):
        calls.append(ToolCall(delta.id, CalledFunction(delta.function.name, delta.function.arguments)))
    else:
        calls[delta.index].function.arguments += delta.function.arguments
