"""The quality gate: do targets say the same when decoding greedily, and how far apart are their log-probabilities?

Speed with other answers is no speed. Numbers that differ in their last bits part two good engines at close calls, so a
gate looks at how long answers agree, not at whether all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nybble.bench.connection import Disconnected
from nybble.bench.http_reader import MalformedResponse
from nybble.bench.target import Target, TargetSettings

NUM_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "Count from 3 to 12.",
    "What is 17 + 25?",
    "Once upon a time there was a",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The three primary colours are",
    "Reverse this list: y, b, q, e",
)
MIN_AGREEMENT = 0.5
MAX_DISTANCE = 0.3
"""Of log-probabilities of the same token after the same text, in nats; engines of one model differ by hundredths."""


class Answer(msgspec.Struct):
    """Tokens as text, and the log-probability of each."""

    tokens: list[str]
    logprobs: list[float]


class Agreement(msgspec.Struct, kw_only=True):
    """How a target's answers compare with the baseline's. `share`: of the tokens, those before the first difference;
    `distance`: mean difference of log-probabilities there, None if there are none."""

    num_prompts: int
    num_identical: int
    share: float
    distance: float | None
    is_passed: bool


async def answers_of(settings: TargetSettings) -> list[Answer] | str:
    """The greedy answers of a server, or why there are none."""
    target = Target(settings)
    answers = []
    try:
        for prompt in PROMPTS:
            body: dict[str, Any] = {
                **settings.body,
                "model": settings.model,
                "prompt": prompt,
                "max_tokens": NUM_TOKENS,
                "temperature": 0.0,
                "logprobs": 1,
            }
            status, content = await target.fetch("/v1/completions", body)
            if status != 200:
                return f"the server answered {status} to a completion with log-probabilities"
            told = msgspec.json.decode(content)["choices"][0].get("logprobs")
            if not told:
                return "the server gives no log-probabilities"
            answers.append(Answer(list(told["tokens"]), [value or 0.0 for value in told["token_logprobs"]]))
    except (OSError, Disconnected, MalformedResponse, TimeoutError, msgspec.DecodeError, KeyError, TypeError) as error:
        return f"no usable answer ({type(error).__name__}: {error})"
    finally:
        target.close()
    return answers


def agreement(ours: Sequence[Answer], baseline: Sequence[Answer]) -> Agreement:
    """Compare answers to the same prompts."""
    num_tokens = num_agreed = num_identical = 0
    differences: list[float] = []
    for answer, other in zip(ours, baseline, strict=True):
        length = max(len(answer.tokens), len(other.tokens))
        same = 0
        while same < min(len(answer.tokens), len(other.tokens)) and answer.tokens[same] == other.tokens[same]:
            differences.append(abs(answer.logprobs[same] - other.logprobs[same]))
            same += 1
        num_tokens += length
        num_agreed += same
        num_identical += same == length
    share = num_agreed / num_tokens if num_tokens else 0.0
    distance = sum(differences) / len(differences) if differences else None
    return Agreement(
        num_prompts=len(ours),
        num_identical=num_identical,
        share=share,
        distance=distance,
        is_passed=share >= MIN_AGREEMENT and distance is not None and distance <= MAX_DISTANCE,
    )


def judge(answers: dict[str, list[Answer] | str], baseline: str) -> dict[str, Any]:
    """Each target's agreement with the baseline, or a sentence why it is not known."""
    base = answers.get(baseline, "it did not run")
    found: dict[str, Any] = {}
    for name, own in answers.items():
        if isinstance(own, str):
            found[name] = own
        elif isinstance(base, str):
            found[name] = f"the baseline has no answers: {base}"
        else:
            found[name] = msgspec.to_builtins(agreement(own, base))
    return found
