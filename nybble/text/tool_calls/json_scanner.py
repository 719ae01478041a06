"""`JsonScanner`: checks one JSON value that arrives piece by piece, each character looked at once.

It builds nothing: the value's text passes through, so what is read can be sent on at once. In one thing it is milder
than JSON's grammar, for models often do this: line breaks and other control characters inside strings pass, escaped.
"""

from __future__ import annotations

import re
from enum import Enum, auto

# Explicit ASCII sets: Python's \d and str.isdigit accept digits of every script.
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE_RUN = re.compile(r"[ \t\r\n]*")
_ATOM_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_ATOM = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class _Mode(Enum):
    VALUE = auto()
    FIRST_ITEM = auto()  # of an array: a value or the end
    FIRST_KEY = auto()  # of an object: a key or the end
    KEY = auto()
    COLON = auto()
    NEXT = auto()  # a comma or the end
    STRING = auto()
    ESCAPE = auto()  # after a backslash
    HEX = auto()  # inside \uXXXX
    ATOM = auto()  # number, true, false, null


class JsonScanner:
    """Reads one value. `kind` is its JSON Schema type ("object", "string", …), known from its first character on."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.kind = ""
        self._mode = _Mode.VALUE
        self._open: list[str] = []  # "{" and "[" that are not closed yet
        self._in_key = False
        self._num_hex = 0
        self._atom: list[str] = []

    def read(self, text: str, start: int, out: list[str]) -> int:
        """Read from `start` until the value ends, fails, or the text does.

        Args:
            out: receives the value's text, as valid JSON as it is so far.

        Returns: where it ended. The character that failed, or that ended a number, was not read.
        """
        position = copied = start
        while position < len(text) and not self.done and not self.failed:
            mode = self._mode
            character = text[position]
            if mode is _Mode.STRING:
                position = _end(_STRING_RUN, text, position)
                if position == len(text):
                    break
                character = text[position]
                if character < " ":
                    out += (text[copied:position], _escaped(character))
                    copied = position + 1
                elif character == "\\":
                    self._mode = _Mode.ESCAPE
                else:
                    self._end_string()
                position += 1
            elif mode is _Mode.ATOM:
                end = _end(_ATOM_RUN, text, position)
                self._atom.append(text[position:end])
                position = end
                if position < len(text):
                    self._end_atom()
            elif mode is _Mode.ESCAPE or mode is _Mode.HEX:
                if self._escape(character):
                    position += 1
            elif character in " \t\r\n":
                position = _end(_SPACE_RUN, text, position)
            elif self._structure(character) and self._mode is not _Mode.ATOM:
                position += 1
        out.append(text[copied:position])
        return position

    def finish(self) -> None:
        """Nothing follows: what is not complete now has failed. Only so a number is known to be complete."""
        if self._mode is _Mode.ATOM:
            self._end_atom()
        if not self.done:
            self.failed = True

    def _end_atom(self) -> None:
        atom = "".join(self._atom)
        self._atom.clear()
        if _ATOM.fullmatch(atom):
            self._begin_kind({"t": "boolean", "f": "boolean", "n": "null"}.get(atom[0], "number"))
            self._end_value()
        else:
            self.failed = True

    def _structure(self, character: str) -> bool:
        """Take a character outside of strings and atoms; False if none such may stand here."""
        mode = self._mode
        if mode is _Mode.COLON:
            if character == ":":
                self._mode = _Mode.VALUE
                return True
        elif mode is _Mode.NEXT:
            if character == ",":
                self._mode = _Mode.KEY if self._open[-1] == "{" else _Mode.VALUE
                return True
            if character in "}]":
                return self._close(character)
        elif mode in (_Mode.KEY, _Mode.FIRST_KEY):
            if character == '"':
                self._in_key = True
                self._mode = _Mode.STRING
                return True
            if character == "}" and mode is _Mode.FIRST_KEY:
                return self._close(character)
        elif character == "]" and mode is _Mode.FIRST_ITEM:
            return self._close(character)
        elif self._open_value(character):
            return True
        self.failed = True
        return False

    def _open_value(self, character: str) -> bool:
        if character == '"':
            self._begin_kind("string")
            self._mode = _Mode.STRING
        elif character in "{[":
            self._begin_kind("object" if character == "{" else "array")
            self._open.append(character)
            self._mode = _Mode.FIRST_KEY if character == "{" else _Mode.FIRST_ITEM
        elif character in "-0123456789tfn":
            self._mode = _Mode.ATOM
        else:
            return False
        return True

    def _close(self, character: str) -> bool:
        if (self._open[-1] == "{") != (character == "}"):
            self.failed = True
            return False
        self._open.pop()
        self._end_value()
        return True

    def _escape(self, character: str) -> bool:
        if self._mode is _Mode.HEX:
            if character in "0123456789abcdefABCDEF":
                self._num_hex -= 1
                if not self._num_hex:
                    self._mode = _Mode.STRING
                return True
        elif character == "u":
            self._num_hex = 4
            self._mode = _Mode.HEX
            return True
        elif character in '"\\/bfnrt':
            self._mode = _Mode.STRING
            return True
        self.failed = True
        return False

    def _begin_kind(self, kind: str) -> None:
        if not self._open:
            self.kind = kind

    def _end_string(self) -> None:
        if self._in_key:
            self._in_key = False
            self._mode = _Mode.COLON
        else:
            self._end_value()

    def _end_value(self) -> None:
        self._mode = _Mode.NEXT
        self.done = not self._open


def read_whole(text: str) -> tuple[str, str] | None:
    """A text that is one JSON value: its kind, and the text as valid JSON. None if it is anything else."""
    scanner, out = JsonScanner(), list[str]()
    end = scanner.read(text, 0, out)
    if not scanner.done:
        scanner.finish()
    if scanner.failed or text[end:].strip(" \t\r\n"):
        return None
    return scanner.kind, "".join(out)


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    assert match is not None  # these patterns match the empty text too
    return match.end()


def _escaped(control: str) -> str:
    return _SHORT_ESCAPES.get(control) or f"\\u{ord(control):04x}"
