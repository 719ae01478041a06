"""Searching a growing text for strings, each character looked at once.

An Aho–Corasick automaton: its state is the longest end of the text so far that begins some stop string. So one number
tells both whether a stop string is complete and how many characters must be held back because it might become one.
The cost does not depend on how many stop strings there are or how long they are.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache


class StopAutomaton:
    """Finds `stops` in a text that arrives piece by piece. Immutable: shared by all requests with the same stops."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]  # length of the beginning of a stop string that this state stands for
        self._match: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._insert(stop)
        self._fallback = self._link()

    def advance(self, state: int, text: str, *, ignore_matches: bool = False) -> tuple[int, int, str | None]:
        """Read `text`.

        Returns: the new state, how many characters were read, and the stop string that ends there; None if all were
        read and none was found.
        """
        following, fallback, match = self._next, self._fallback, self._match
        for position, character in enumerate(text):
            while state and character not in following[state]:
                state = fallback[state]
            state = following[state].get(character, 0)
            if match[state] is not None:
                if not ignore_matches:
                    return state, position + 1, match[state]
                if not following[state]:  # complete and ignored: only its end can still begin another stop string
                    state = fallback[state]
        return state, len(text), None

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self._match.append(None)
            state = self._next[state][character]
        self._match[state] = stop

    def _link(self) -> list[int]:
        """For each state, the longest shorter one that the same text also stands for; breadth first."""
        fallback = [0] * len(self._next)
        pending = deque(self._next[0].values())
        while pending:
            state = pending.popleft()
            if self._match[state] is None:
                self._match[state] = self._match[fallback[state]]
            for character, child in self._next[state].items():
                pending.append(child)
                shorter = fallback[state]
                while shorter and character not in self._next[shorter]:
                    shorter = fallback[shorter]
                fallback[child] = self._next[shorter].get(character, 0)
        return fallback


@lru_cache(maxsize=256)
def stop_automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """The automaton for these stop strings; servers see the same ones again and again."""
    return StopAutomaton(stops)
