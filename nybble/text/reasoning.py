"""`ReasoningSplitter`: an answer `<think>…</think>…` becomes reasoning and content, as its text arrives.

Owns: what is held back (tags that are not complete, line breaks that may be layout). Does not know: tool calls; these
are looked for in the content.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from nybble.text.tool_calls.tags import TagExpected, TagSearch

_BEGIN = "<think>"
_END = "</think>"


class Thought(NamedTuple):
    """What more text added; each part may be empty."""

    reasoning: str
    content: str


class _Mode(Enum):
    START = auto()  # before anything but whitespace
    REASONING = auto()
    BREAKS = auto()  # the line breaks between reasoning and content
    CONTENT = auto()


class ReasoningSplitter:
    """Splits one answer. Only what it begins with is reasoning: tags further on are text about tags.

    Line breaks around the reasoning are left out, as chat templates put them there again. An answer without reasoning
    is content, exactly. What comes out depends on the text alone, not on how it is cut into pushes.

    Args:
        opened: the prompt ended with the tag already (`opens_thinking`), so the answer begins inside. Models that
            repeat the tag are understood.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._opened = opened
        self._mode = _Mode.START
        self._begin = TagExpected(_BEGIN)
        self._search = TagSearch(_END)
        self._breaks: list[str] = []  # of the reasoning, which more reasoning may follow
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the answer is inside of its reasoning, as far as it was read."""
        return self._mode is _Mode.REASONING or (self._opened and self._mode is _Mode.START)

    def push(self, text: str) -> Thought:
        """Take more of the answer. Returns what is certain now."""
        reasoning: list[str] = []
        content: list[str] = []
        position = 0
        while position < len(text):
            if self._mode is _Mode.START:
                position = self._start(text, position, reasoning, content)
            elif self._mode is _Mode.REASONING:
                position = self._reason(text, position, reasoning)
            else:
                rest = text[position:]
                if self._mode is _Mode.BREAKS:
                    rest = rest.lstrip("\r\n")
                    if rest:
                        self._mode = _Mode.CONTENT
                content.append(rest)
                break
        return Thought("".join(reasoning), "".join(content))

    def finish(self) -> Thought:
        """The answer has ended. Returns what was held back."""
        reasoning: list[str] = []
        if self._mode is _Mode.START:
            if not self._opened:
                return Thought("", self._begin.held)
            self._reason(self._begin.held, 0, reasoning)
        if self._mode in (_Mode.START, _Mode.REASONING):
            self._add(self._search.flush(), reasoning)
        return Thought("".join(reasoning), "")

    def _start(self, text: str, start: int, reasoning: list[str], content: list[str]) -> int:
        position = self._begin.read(text, start)
        if self._begin.tag:
            self._mode = _Mode.REASONING
        elif self._begin.refused and self._opened:
            self._mode = _Mode.REASONING
            self._reason(self._begin.held, 0, reasoning)  # may be the beginning of the other tag
        elif self._begin.refused:
            self._mode = _Mode.CONTENT
            content.append(self._begin.held)
        return position

    def _reason(self, text: str, start: int, reasoning: list[str]) -> int:
        clear, position, tag = self._search.read(text, start)
        self._add(clear, reasoning)
        if tag:
            self._mode = _Mode.BREAKS
            self._breaks.clear()
        return position

    def _add(self, text: str, reasoning: list[str]) -> None:
        """Reasoning, less the line breaks at its beginning; those at its end are held back."""
        if not self._has_reasoning:
            text = text.lstrip("\r\n")
        shown = text.rstrip("\r\n")
        if shown:
            self._has_reasoning = True
            reasoning += (*self._breaks, shown)
            self._breaks.clear()
        if len(shown) < len(text):
            self._breaks.append(text[len(shown) :])


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside of the tag, as the templates of models that always think write it."""
    return prompt.rstrip().endswith(_BEGIN)


def may_think(chat_template: str) -> bool:
    """A guess from a chat template's text: whether answers may begin with reasoning."""
    return _END in chat_template
