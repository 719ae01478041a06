"""The tasks `tiny` learns: each draws a problem, knows its one right answer, and can be asked in several ways.

A task is a function from a random generator to `(key, fields)`. The key names the *problem*, whatever its wording: the
split into training and held-out text goes by it. A key of None marks what must simply be known by heart (the times
table), which is never held out. The fields fill the phrasings below: pairs of a question and the answer to exactly
that wording, so that a correct answer is one exact string.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from training.tiny.vocabulary import DAYS, MONTHS, NAMES, ORDINALS, UNITS, WORDS

Fields = dict[str, Any]
Draw = Callable[[Random], tuple[str | None, Fields]]


@dataclass(frozen=True)
class Problem:
    task: str
    key: str | None
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    draw: Draw
    phrasings: list[tuple[str, str]]  # question, answer; both are format strings over the drawn fields
    weight: float  # share of the training text, relative to the other tasks


TASKS: dict[str, Task] = {}


def task(weight: float, *phrasings: tuple[str, str]) -> Callable[[Draw], Draw]:
    """Enter the decorated function into `TASKS` under its own name."""

    def register(draw: Draw) -> Draw:
        TASKS[draw.__name__] = Task(draw, list(phrasings), weight)
        return draw

    return register


def draw_problem(name: str, rng: Random) -> Problem:
    """A random problem of task `name`, in a random wording."""
    chosen = TASKS[name]
    key, fields = chosen.draw(rng)
    question, answer = rng.choice(chosen.phrasings)
    return Problem(
        name, None if key is None else f"{name}:{key}", question.format(**fields), str(answer).format(**fields)
    )


def number(rng: Random, most_digits: int) -> int:
    """A number whose length, not value, is uniform: small numbers must not be rare."""
    return rng.randrange(10 ** rng.randint(1, most_digits))


def numbers(rng: Random, shortest: int, longest: int) -> list[int]:
    most_digits = rng.choice([1, 2, 2, 3])
    return [number(rng, most_digits) for _ in range(rng.randint(shortest, longest))]


def items(rng: Random, shortest: int, longest: int) -> list[str]:
    """Distinct words, or numbers, or letters."""
    count = rng.randint(shortest, longest)
    kind = rng.randrange(3)
    if kind == 0:
        return rng.sample(WORDS, count)
    if kind == 1:
        return [str(n) for n in rng.sample(range(100), count)]
    return rng.sample("abcdefghijklmnopqrstuvwxyz", count)


def joined(values: list[Any], separator: str = ", ") -> str:
    return separator.join(map(str, values))


@task(
    3.0,
    ("What is {a} + {b}?", "{a} + {b} = {c}"),
    ("{a} + {b}", "{c}"),
    ("{a}+{b}", "{c}"),
    ("{a} + {b} =", "{c}"),
    ("How much is {a} + {b}?", "{c}"),
    ("What is {a} plus {b}?", "{a} + {b} = {c}"),
    ("Add {a} and {b}.", "{a} + {b} = {c}"),
    ("Calculate {a} + {b}.", "{a} + {b} = {c}"),
    ("What is the sum of {a} and {b}?", "The sum is {c}."),
    ("{name} has {a} {thing}s and gets {b} more. How many {thing}s does {name} have now?", "{name} has {c} {thing}s."),
)
def add(rng: Random) -> tuple[str | None, Fields]:
    a, b = number(rng, 3), number(rng, 3)
    fields = {"name": rng.choice(NAMES), "thing": rng.choice(["apple", "book", "cookie", "flower", "stone", "egg"])}
    return f"{min(a, b)}+{max(a, b)}", {"a": a, "b": b, "c": a + b, **fields}


@task(
    2.5,
    ("What is {a} - {b}?", "{a} - {b} = {c}"),
    ("{a} - {b}", "{c}"),
    ("{a}-{b}", "{c}"),
    ("{a} - {b} =", "{c}"),
    ("How much is {a} - {b}?", "{c}"),
    ("What is {a} minus {b}?", "{a} - {b} = {c}"),
    ("Subtract {b} from {a}.", "{a} - {b} = {c}"),
    ("What is the difference between {a} and {b}?", "The difference is {c}."),
    ("{name} has {a} coins and gives away {b}. How many coins are left?", "{c} coins are left."),
)
def subtract(rng: Random) -> tuple[str | None, Fields]:
    b, a = sorted((number(rng, 3), number(rng, 3)))
    return f"{a}-{b}", {"a": a, "b": b, "c": a - b, "name": rng.choice(NAMES)}


@task(
    2.0,
    ("What is {a} × {b}?", "{steps}"),
    ("What is {a} * {b}?", "{steps}"),
    ("{a} * {b}", "{steps}"),
    ("{a} x {b}", "{steps}"),
    ("What is {a} times {b}?", "{steps}"),
    ("Multiply {a} by {b}.", "{steps}"),
    ("How much is {a} times {b}?", "{steps}"),
)
def multiply(rng: Random) -> tuple[str | None, Fields]:
    """One digit times up to three; beyond the times table, digit by digit as one does on paper."""
    b = rng.randint(2, 9)
    a = rng.choice([rng.randint(0, 12), rng.randint(11, 99), rng.randint(100, 999)])
    products = [part * b for part in (a // 100 * 100, a % 100 // 10 * 10, a % 10) if part]
    sides = [f"{a} × {b}", joined(products, " + "), str(a * b)]
    if a <= 12 or len(products) == 1:
        return None, {"a": a, "b": b, "steps": joined(sides[::2], " = ")}
    return f"{a}*{b}", {"a": a, "b": b, "steps": joined(sides, " = ")}


@task(
    1.0,
    ("What is double {a}?", "{twice}"),
    ("Double {a}.", "Double {a} is {twice}."),
    ("What is twice {a}?", "Twice {a} is {twice}."),
    ("What is half of {twice}?", "Half of {twice} is {a}."),
    ("Half of {twice}", "{a}"),
)
def double_half(rng: Random) -> tuple[str | None, Fields]:
    a = number(rng, 3)
    return str(a), {"a": a, "twice": 2 * a}


@task(
    1.0,
    ("What number comes after {a}?", "{b}"),
    ("Which number comes right after {a}?", "After {a} comes {b}."),
    ("What is the next number after {a}?", "{b}"),
    ("What number comes before {b}?", "{a}"),
    ("Which number comes right before {b}?", "Before {b} comes {a}."),
)
def neighbours(rng: Random) -> tuple[str | None, Fields]:
    a = number(rng, 4)
    return str(a), {"a": a, "b": a + 1}


@task(
    2.0,
    ("Sort these numbers: {values}", "{up}"),
    ("Sort {values}", "{up}"),
    ("Sort {values} in ascending order.", "{up}"),
    ("Sort {values} from small to large.", "{up}"),
    ("Put these numbers in order: {values}", "{up}"),
    ("Sort {values} in descending order.", "{down}"),
    ("Sort {values} from large to small.", "{down}"),
)
def sort_numbers(rng: Random) -> tuple[str | None, Fields]:
    values = numbers(rng, 3, 7)
    up = sorted(values)
    return str(up), {"values": joined(values), "up": joined(up), "down": joined(up[::-1])}


@task(
    2.0,
    ("Sort these words: {words}", "{up}"),
    ("Sort these words alphabetically: {words}", "{up}"),
    ("Put these words in alphabetical order: {words}", "{up}"),
    ("Sort {words}", "{up}"),
    ("Sort {words} from A to Z.", "{up}"),
)
def sort_words(rng: Random) -> tuple[str | None, Fields]:
    words = rng.sample(WORDS, rng.randint(3, 6))
    return joined(sorted(words)), {"words": joined(words), "up": joined(sorted(words))}


@task(
    2.5,
    ("Count from {a} to {b}.", "{list}"),
    ("Count from {a} to {b}", "{list}"),
    ("Please count from {a} to {b}.", "{list}"),
    ("Can you count from {a} to {b}?", "Sure: {list}"),
    ("List the numbers from {a} to {b}.", "{list}"),
    ("Write the numbers from {a} to {b}.", "{list}"),
)
def count(rng: Random) -> tuple[str | None, Fields]:
    """Up or down, by ones, at most 30 numbers."""
    a, length = number(rng, 3), rng.randint(2, 30)
    values = list(range(a, a + length))
    if rng.random() < 0.3:
        values.reverse()
    return f"{values[0]}..{values[-1]}", {"a": values[0], "b": values[-1], "list": joined(values)}


@task(
    1.5,
    ("Count from {a} to {b} by {s}s.", "{list}"),
    ("Count from {a} to {b} in steps of {s}.", "{list}"),
    ("Count by {s}s from {a} to {b}.", "{list}"),
    ("Count from {a} to {b} in steps of {s}", "{list}"),
)
def count_steps(rng: Random) -> tuple[str | None, Fields]:
    a, s, length = number(rng, 2), rng.choice([2, 3, 4, 5, 10]), rng.randint(3, 15)
    values = list(range(a, a + s * length, s))
    if rng.random() < 0.2:
        values.reverse()
    return f"{values[0]}..{values[-1]}/{s}", {"a": values[0], "b": values[-1], "s": s, "list": joined(values)}


@task(
    1.5,
    ("Reverse this list: {values}", "{back}"),
    ("Reverse {values}", "{back}"),
    ("Reverse the order of {values}.", "{back}"),
    ("Write {values} backwards.", "{back}"),
)
def reverse(rng: Random) -> tuple[str | None, Fields]:
    values = items(rng, 3, 8)
    separator = rng.choice([", ", ", ", " "])
    fields = {"values": joined(values, separator), "back": joined(values[::-1], separator)}
    return min(joined(values), joined(values[::-1])), fields


@task(
    1.5,
    ("Repeat after me: {text}", "{text}"),
    ("Say: {text}", "{text}"),
    ("Copy this: {text}", "{text}"),
    ("Repeat this: {text}", "{text}"),
)
def copy(rng: Random) -> tuple[str | None, Fields]:
    text = joined(items(rng, 2, 8), rng.choice([", ", " "]))
    return text, {"text": text}


@task(
    1.0,
    ("Say {text} {n} times.", "{many}"),
    ("Repeat {text} {n} times.", "{many}"),
    ("Write {text} {n} times.", "{many}"),
)
def repeat(rng: Random) -> tuple[str | None, Fields]:
    text = joined(rng.sample(WORDS, rng.randint(1, 2)), " ")
    n = rng.randint(2, 9)
    return f"{n}:{text}", {"text": text, "n": n, "many": joined([text] * n, " ")}


@task(
    1.5,
    ("What day is {n} days after {a}?", "{b}"),
    ("Which day comes {n} days after {a}?", "{n} days after {a} is {b}."),
    ("Today is {a}. What day is it in {n} days?", "In {n} days it is {b}."),
    ("What day is {n} days before {b}?", "{a}"),
    ("Today is {b}. What day was it {n} days ago?", "{n} days ago it was {a}."),
)
def weekday(rng: Random) -> tuple[str | None, Fields]:
    day, n = rng.randrange(7), rng.randint(2, 40)
    return f"{day}+{n}", {"n": n, "a": DAYS[day], "b": DAYS[(day + n) % 7]}


@task(
    1.5,
    ("What month is {n} months after {a}?", "{b}"),
    ("Which month comes {n} months after {a}?", "{n} months after {a} comes {b}."),
    ("It is {a}. What month will it be in {n} months?", "In {n} months it will be {b}."),
    ("What month is {n} months before {b}?", "{a}"),
)
def month(rng: Random) -> tuple[str | None, Fields]:
    start, n = rng.randrange(12), rng.randint(2, 30)
    return f"{start}+{n}", {"n": n, "a": MONTHS[start], "b": MONTHS[(start + n) % 12]}


@task(
    0.5,
    ("What day comes after {day}?", "{next_day}"),
    ("What day is tomorrow if today is {day}?", "{next_day}"),
    ("What day comes before {next_day}?", "{day}"),
    ("What month comes after {month}?", "{next_month}"),
    ("What month comes before {next_month}?", "{month}"),
    ("Name the days of the week.", "{days}"),
    ("List the months of the year.", "{months}"),
    ("How many days are in a week?", "A week has 7 days."),
    ("How many months are in a year?", "A year has 12 months."),
)
def calendar(rng: Random) -> tuple[str | None, Fields]:
    day, month = rng.randrange(7), rng.randrange(12)
    following = {"next_day": DAYS[(day + 1) % 7], "next_month": MONTHS[(month + 1) % 12]}
    return None, {"day": DAYS[day], "month": MONTHS[month], "days": joined(DAYS), "months": joined(MONTHS), **following}


@task(
    1.0,
    ("It is {a} o'clock. What time will it be in {n} hours?", "In {n} hours it will be {b} o'clock."),
    ("What time is it {n} hours after {a} o'clock?", "{b} o'clock"),
    ("It is {b} o'clock. What time was it {n} hours ago?", "{n} hours ago it was {a} o'clock."),
)
def clock(rng: Random) -> tuple[str | None, Fields]:
    a, n = rng.randint(1, 12), rng.randint(2, 30)
    return f"{a}+{n}", {"a": a, "n": n, "b": (a + n - 1) % 12 + 1}


@task(
    2.0,
    ("How many {small} are in {n} {large}?", "{n} {large} are {m} {small}."),
    ("Convert {n} {large} to {small}.", "{n} {large} = {m} {small}"),
    ("{n} {large} in {small}", "{m} {small}"),
    ("How many {small} are {n} {large}?", "{m} {small}"),
    ("How many {large} are {m} {small}?", "{n} {large}"),
    ("Convert {m} {small} to {large}.", "{m} {small} = {n} {large}"),
)
def units(rng: Random) -> tuple[str | None, Fields]:
    large, small, factor, most = rng.choice(UNITS)
    n = rng.randint(2, most)
    return f"{n} {large}-{small}", {"large": large, "small": small, "n": n, "m": n * factor}


@task(
    2.0,
    ("What is the largest number in {values}?", "The largest number is {high}."),
    ("What is the maximum of {values}?", "{high}"),
    ("Which of these numbers is the largest: {values}", "{high}"),
    ("max of {values}", "{high}"),
    ("What is the smallest number in {values}?", "The smallest number is {low}."),
    ("What is the minimum of {values}?", "{low}"),
    ("Which of these numbers is the smallest: {values}", "{low}"),
)
def extreme(rng: Random) -> tuple[str | None, Fields]:
    values = numbers(rng, 2, 7)
    return str(sorted(values)), {"values": joined(values), "high": max(values), "low": min(values)}


@task(
    1.0,
    ("Which is larger, {a} or {b}?", "{high}"),
    ("Which number is bigger: {a} or {b}?", "{high} is bigger."),
    ("Which is smaller, {a} or {b}?", "{low}"),
    ("Is {a} larger than {b}?", "{larger}"),
)
def compare(rng: Random) -> tuple[str | None, Fields]:
    a = number(rng, 4)
    b = number(rng, 4) if rng.random() < 0.5 else a + rng.choice([1, 10, 100, rng.randint(1, 99)])
    if a == b:
        b += 1
    if rng.random() < 0.5:
        a, b = b, a
    larger = f"Yes, {a} is larger than {b}." if a > b else f"No, {a} is smaller than {b}."
    return f"{min(a, b)}<{max(a, b)}", {"a": a, "b": b, "high": max(a, b), "low": min(a, b), "larger": larger}


@task(
    1.0,
    ("Is {n} even or odd?", "{n} is {parity}."),
    ("Is {n} an even number?", "{even}"),
    ("Is {n} an odd number?", "{odd}"),
    ("Even or odd: {n}", "{parity}"),
)
def parity(rng: Random) -> tuple[str | None, Fields]:
    n = number(rng, 4)
    word = "odd" if n % 2 else "even"
    yes, no = f"Yes, {n} is {word}.", f"No, {n} is {word}."
    return str(n), {"n": n, "parity": word, "even": no if n % 2 else yes, "odd": yes if n % 2 else no}


@task(
    1.5,
    ("Write {low} in capital letters.", "{high}"),
    ("Write in uppercase: {low}", "{high}"),
    ("Uppercase: {low}", "{high}"),
    ("Write in lowercase: {high}", "{low}"),
    ("Lowercase: {high}", "{low}"),
    ("Write {low} with a capital first letter in each word.", "{title}"),
)
def letter_case(rng: Random) -> tuple[str | None, Fields]:
    text = joined(rng.sample(WORDS, rng.randint(2, 4)), " ")
    return text, {"low": text, "high": text.upper(), "title": text.title()}


@task(
    1.5,
    ("How many items are in this list: {values}", "There are {n} items."),
    ("How many things are in {values}?", "{n}"),
    ("How long is the list {values}?", "The list has {n} items."),
    ("Count the items: {values}", "{n} items"),
)
def length(rng: Random) -> tuple[str | None, Fields]:
    values = items(rng, 2, 9)
    return joined(values), {"values": joined(values), "n": len(values)}


@task(
    1.5,
    ("What is the {nth} item in {values}?", "{value}"),
    ("What is the {nth} item in this list: {values}", "The {nth} item is {value}."),
    ("Which item comes {nth} in {values}?", "{value}"),
    ("What is the last item in {values}?", "The last item is {last}."),
)
def pick(rng: Random) -> tuple[str | None, Fields]:
    values = items(rng, 3, 7)
    n = rng.randrange(len(values))
    return joined(values), {"values": joined(values), "nth": ORDINALS[n], "value": values[n], "last": values[-1]}


@task(
    1.0,
    ("Is {value} in the list {values}?", "{found}"),
    ("Does the list {values} contain {value}?", "{found}"),
    ("Is {value} one of {values}?", "{found}"),
)
def contains(rng: Random) -> tuple[str | None, Fields]:
    *values, other = items(rng, 4, 8)
    value = rng.choice(values) if rng.random() < 0.5 else other
    found = f"Yes, {value} is in the list." if value in values else f"No, {value} is not in the list."
    return joined(values), {"values": joined(values), "value": value, "found": found}
