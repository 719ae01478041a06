"""`JsonCall`: one call written as a JSON object with `name` and `arguments` (or `parameters`), read as it arrives.

Once the name is known and the arguments' "{" is there, the call begins, and the arguments pass on as they come.
Arguments that come before the name are held back. An object that turns out to be no call before anything was sent
leaves its exact text in `held`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto
from typing import cast

from nybble.text.tool_calls.deltas import SPACE, DeltaWriter
from nybble.text.tool_calls.json_scanner import JsonScanner

_ARGUMENTS = frozenset({"arguments", "parameters"})
_KNOWN_KEYS = _ARGUMENTS | {"name", "type", "id"}


class CallStatus(Enum):
    """REFUSED: no call, nothing was sent. BROKEN: the arguments stop being JSON after they began to be sent."""

    OPEN = auto()
    COMPLETE = auto()
    REFUSED = auto()
    BROKEN = auto()


class _Mode(Enum):
    START = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()


class JsonCall:
    """Reads one object, whose "{" is still to come.

    Args:
        names: where nothing but its contents tells a call from another JSON object, the tools there are: an object
            that names none of them, or has a key that calls do not have, is refused as soon as that is seen.
    """

    def __init__(self, writer: DeltaWriter, names: Collection[str] | None = None) -> None:
        self.status = CallStatus.OPEN
        self._writer = writer
        self._names = names
        self._mode = _Mode.START
        self._scanner: JsonScanner | None = None
        self._out: list[str] = []  # of the scanner
        self._raw: list[str] = []  # all that was read, until the call begins
        self._begun = False
        self._streaming = False  # the scanner reads arguments that pass on at once
        self._key = ""
        self._name: str | None = None
        self._early_arguments: str | None = None

    @property
    def held(self) -> str | None:
        """All that was read of an object whose call has not begun; None once it has."""
        return None if self._begun else "".join(self._raw)

    def read(self, text: str, start: int) -> int:
        """Read until the status changes. Returns where it ended; a character that does not fit was not read."""
        position = start
        while position < len(text) and self.status is CallStatus.OPEN:
            if self._scanner is not None:
                position = self._scan(self._scanner, text, position)
            elif text[position] in SPACE or self._structure(text[position]):
                position += 1
        if self._begun:
            self._raw.clear()
        else:
            self._raw.append(text[start:position])
        return position

    def _scan(self, scanner: JsonScanner, text: str, start: int) -> int:
        position = scanner.read(text, start, self._out)
        if self._streaming:
            self._writer.arguments("".join(self._out))
            self._out.clear()
        elif self._begun:
            self._out.clear()  # a member that nobody wants
        if scanner.failed:
            self._fail()
        elif scanner.done:
            self._scanner = None
            self._end_part(scanner.kind)
        return position

    def _structure(self, character: str) -> bool:
        """Take a character of the object itself. Returns: whether it was read."""
        mode = self._mode
        if mode is _Mode.START and character == "{":
            self._mode = _Mode.FIRST_KEY
        elif mode in (_Mode.FIRST_KEY, _Mode.KEY) and character == '"':
            self._scanner = JsonScanner()
            return False
        elif mode is _Mode.COLON and character == ":":
            self._mode = _Mode.VALUE
        elif mode is _Mode.VALUE:
            self._scanner = JsonScanner()
            if character == "{" and self._name is not None and self._wants_arguments():
                self._begin(self._name)
                self._streaming = True
            return False
        elif mode is _Mode.NEXT and character == ",":
            self._mode = _Mode.KEY
        elif mode in (_Mode.FIRST_KEY, _Mode.NEXT) and character == "}":
            self._end_object()
        else:
            self._fail()
            return False
        return True

    def _wants_arguments(self) -> bool:
        return self._key in _ARGUMENTS and not self._begun and self._early_arguments is None

    def _end_part(self, kind: str) -> None:
        """A key or a value is complete."""
        text = "".join(self._out)
        self._out.clear()
        is_key = self._mode is not _Mode.VALUE
        self._mode = _Mode.COLON if is_key else _Mode.NEXT
        self._streaming = False
        if self._begun:
            return
        if is_key:
            self._key = cast(str, json.loads(text))
            if self._names is not None and self._key not in _KNOWN_KEYS:
                self.status = CallStatus.REFUSED
        elif self._key == "name" and self._name is None:
            self._take_name(text, kind)
        elif self._wants_arguments():
            if kind not in ("object", "null"):
                self.status = CallStatus.REFUSED
                return
            self._early_arguments = text if kind == "object" else "{}"
        if self._name is not None and self._early_arguments is not None:
            self._begin(self._name)
            self._writer.arguments(self._early_arguments)

    def _take_name(self, text: str, kind: str) -> None:
        name = cast(str, json.loads(text)) if kind == "string" else ""
        # Half of a surrogate pair, written as an escape, could not be sent to anyone.
        if is_usable_name(name) and (self._names is None or name in self._names):
            self._name = name
        else:
            self.status = CallStatus.REFUSED

    def _begin(self, name: str) -> None:
        self._writer.begin(name)
        self._begun = True

    def _end_object(self) -> None:
        if not self._begun:
            if self._name is None:
                self.status = CallStatus.REFUSED
                return
            self._begin(self._name)  # a tool without arguments
            self._writer.arguments("{}")
        self.status = CallStatus.COMPLETE

    def _fail(self) -> None:
        if self._streaming:
            self.status = CallStatus.BROKEN
        else:
            # After the arguments only brackets are missing or too many; the call itself is sound.
            self.status = CallStatus.COMPLETE if self._begun else CallStatus.REFUSED


def is_usable_name(name: str) -> bool:
    """Whether a tool may be called so: some text, without halves of surrogate pairs."""
    return bool(name) and not any("\ud800" <= character <= "\udfff" for character in name)
