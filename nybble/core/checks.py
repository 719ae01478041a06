"""Does a value fit its field? Types come from the field's annotation, the range from an `Interval` beside it.

What the users give reaches nybble unchecked: from Python, JSON or a command line. `fits` decides, `wording` says in an
error what would have been accepted, `shown` what was given instead.
"""

from __future__ import annotations

import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

NOUNS = {int: "an integer", float: "a number", str: "a string", bool: "True or False", types.NoneType: "None"}
PLURALS = {int: "integers", float: "numbers", str: "strings"}
MIN_INT, MAX_INT = -(2**63), 2**63 - 1


class Interval(NamedTuple):
    """The numbers that a field takes. Integers go into int64 arrays, so no other bound lets them out of these."""

    low: float = MIN_INT
    high: float = MAX_INT
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:  # of Python's numbers, so of an integer too large for a float, and of NaN
        return (self.low < value if self.open_low else self.low <= value) and (
            value < self.high if self.open_high else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == MAX_INT:
            return f"≥ {'-2**63' if self.low == MIN_INT else self.low} and < 2**63"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def fits(kind: Any, value: object, interval: Interval | None = None) -> bool:
    """Whether `value` is of the annotated type `kind`, and its numbers (a dict's values) are in the interval.

    As in Python's type system an integer is a number; unlike there, True and False are neither.
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(member, value, interval) for member in members)
    if origin is Literal:
        return isinstance(value, str) and value in members
    if origin is list:
        return isinstance(value, list) and all(fits(members[0], item, interval) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(members[0], key) and fits(members[1], item, interval) for key, item in value.items()
        )
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        return is_number and (interval or Interval()).holds(value)  # type: ignore[arg-type]
    return isinstance(value, kind)


def wording(kind: Any, interval: Interval | None = None) -> str:
    """What `fits` accepts: "an integer in [1, 20] or None"."""
    origin, members = get_origin(kind), get_args(kind)
    bounds = f" {interval}" if interval else ""
    if origin in (Union, types.UnionType):
        return " or ".join(wording(member, interval) for member in members)
    if origin is Literal:
        return f"one of {', '.join(members)}"
    if origin is list:
        return f"a list of {PLURALS[members[0]]}{bounds if members[0] is not str else ''}"
    if origin is dict:
        return f"a dict of {PLURALS[members[0]]} to {PLURALS[members[1]]}{bounds}"
    if kind in (int, float):
        return NOUNS[kind] + bounds
    return NOUNS.get(kind) or f"a {kind.__name__}"


def shown(value: object) -> str:
    """`repr` for messages: on one line, short, and of any value at all."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, say
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}…{text[-19:]}"
