"""What a parser hands on: `Content`, `CallBegin`, `Arguments`; and `DeltaWriter`, which collects them.

Owns: the number of calls, their ids, and which whitespace belongs to the content. Does not know: any format.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec


class Content(msgspec.Struct, frozen=True):
    """More text for the user."""

    text: str


class CallBegin(msgspec.Struct, frozen=True):
    """A call of the tool `name` begins. Its first `Arguments` come with it, in the same list."""

    index: int
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """More of a call's arguments: JSON text, cut anywhere."""

    index: int
    text: str


Delta = Content | CallBegin | Arguments

SPACE = " \t\r\n"


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class DeltaWriter:
    """Collects what one answer becomes, in order; neighbours of a kind are joined.

    Whitespace before and after calls is layout: it reaches the content only between two pieces of text. An answer
    without calls keeps all of its whitespace.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._deltas: list[Delta] = []
        self._text: list[str] = []  # of the content, or of the last call's arguments, as `_is_content` says
        self._is_content = True
        self._space: list[str] = []  # whitespace that may turn out to be layout
        self._beside_call = False
        self._has_content = False

    def content(self, text: str) -> None:
        shown = text.rstrip(SPACE)
        space = text[len(shown) :]
        if shown:
            if self._beside_call and not self._has_content:  # nothing stands before this whitespace
                shown = shown.lstrip(SPACE)
                self._space.clear()
            self._switch(is_content=True)
            self._text += self._space
            self._text.append(shown)
            self._space.clear()
            self._beside_call = False
            self._has_content = True
        if space:
            self._space.append(space)

    def begin(self, name: str) -> None:
        self._join()
        self._is_content = False
        self._deltas.append(CallBegin(self.num_calls, self._new_id(), name))
        self.num_calls += 1
        self._beside_call = True

    def arguments(self, text: str) -> None:
        """More arguments of the call that began last."""
        if text:
            self._switch(is_content=False)
            self._text.append(text)

    def take(self) -> list[Delta]:
        """What was written since the last time."""
        self._join()
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[Delta]:
        """The last deltas of the answer."""
        if self._space and not self._beside_call:
            self._switch(is_content=True)
            self._text += self._space
        self._space.clear()
        return self.take()

    def _switch(self, *, is_content: bool) -> None:
        if is_content != self._is_content:
            self._join()
            self._is_content = is_content

    def _join(self) -> None:
        if self._text:
            text = "".join(self._text)
            self._deltas.append(Content(text) if self._is_content else Arguments(self.num_calls - 1, text))
            self._text.clear()
