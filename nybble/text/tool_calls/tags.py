"""Finding tags in a text that arrives piece by piece, each character looked at once.

`TagSearch` finds a tag anywhere; `TagExpected` wants one right here, after whitespace at most.
"""

from __future__ import annotations

from nybble.text.tool_calls.deltas import SPACE


class TagSearch:
    """Finds the first of some tags. All begin with "<" and have no other one, so a failed match never hides a tag."""

    def __init__(self, *tags: str) -> None:
        assert all(tag.rfind("<") == 0 for tag in tags)
        self._tags = frozenset(tags)
        self._prefixes = proper_prefixes(tags)
        self._held = ""  # the beginning of a tag

    def read(self, text: str, start: int) -> tuple[str, int, str | None]:
        """Read from `start` on.

        Returns: the text that certainly is none of a tag, where reading ended, and the tag that ends there, if any.
        """
        clear: list[str] = []
        position = start
        while True:
            while self._held and position < len(text):
                candidate = self._held + text[position]
                if candidate in self._tags:
                    self._held = ""
                    return "".join(clear), position + 1, candidate
                if candidate in self._prefixes:
                    self._held = candidate
                    position += 1
                else:
                    clear.append(self._held)
                    self._held = ""
            if position == len(text):
                return "".join(clear), position, None
            begin = text.find("<", position)
            if begin < 0:
                clear.append(text[position:])
                return "".join(clear), len(text), None
            clear.append(text[position:begin])
            self._held = "<"
            position = begin + 1

    def flush(self) -> str:
        """The beginning of a tag that nothing follows."""
        held, self._held = self._held, ""
        return held


class TagExpected:
    """Wants one of some tags after any number of characters of `skip`."""

    def __init__(self, *tags: str, skip: str = SPACE) -> None:
        self._tags = frozenset(tags)
        self._prefixes = proper_prefixes(tags)
        self._skip = skip
        self._skipped: list[str] = []
        self._partial = ""
        self.tag: str | None = None
        self.refused = False

    def read(self, text: str, start: int) -> int:
        """Read until `tag` is found or the next character cannot belong to one (`refused`). Returns where it ended."""
        for position in range(start, len(text)):
            character = text[position]
            candidate = self._partial + character
            if candidate in self._tags:
                self.tag = candidate
                self._partial = ""
                return position + 1
            if candidate in self._prefixes:
                self._partial = candidate
            elif not self._partial and character in self._skip:
                self._skipped.append(character)
            else:
                self.refused = True
                return position
        return len(text)

    @property
    def held(self) -> str:
        """All that was read; the tag that was found is not part of it."""
        return "".join(self._skipped) + self._partial


def proper_prefixes(tags: tuple[str, ...]) -> frozenset[str]:
    prefixes = frozenset(tag[:size] for tag in tags for size in range(1, len(tag)))
    assert prefixes.isdisjoint(tags), "one tag begins another"
    return prefixes
