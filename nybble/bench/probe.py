"""The first requests to a server: does it answer as it should, and what does it make of a prompt."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from nybble.bench.prompt_text import WORDS, WordCost
from nybble.bench.record import FAILURES, Record
from nybble.bench.target import Target, TargetSettings
from nybble.core.errors import ConfigError, MeasurementError

NUM_TOKENS = 8


class Probe(NamedTuple):
    """`word_cost`: of the words that prompts are made of. `has_usage`: the server counts tokens. `notes`: what the
    user should know."""

    word_cost: WordCost
    has_usage: bool
    notes: list[str]


async def probe(settings: TargetSettings, num_words: int = 100, count: Callable[[str], int] | None = None) -> Probe:
    """Ask twice, with a short and a longer prompt. The texts are the same each time, and so is what comes out.

    Args:
        num_words: of the longer prompt; about as long as the workload's, which the server can take.
        count: tokens of a text without what the server puts around it, where the tokenizer is known.

    Raises:
        MeasurementError: an answer failed; says how.
        ConfigError: it was refused.
    """
    target = Target(settings)
    draw = random.Random("probe")
    notes = []
    costs = []
    try:
        for length in (2, max(8, min(num_words, 200))):
            text = " ".join(draw.choices(WORDS, k=length))
            prompt = [{"role": "user", "content": text}] if settings.route == "chat" else text
            record = Record(index=0)
            await target.ask(prompt, NUM_TOKENS, record, keeps_text=False)
            if record.failure == "http":
                hint = "; try the other --route" if record.detail.startswith("404") else ""
                raise ConfigError(f"{settings.base_url} refused a first request with {record.detail}{hint}")
            if record.failure:
                raise MeasurementError(f"{settings.base_url}: {FAILURES[record.failure]}: {record.detail}")
            costs.append((length, record.num_input_tokens))
    finally:
        target.close()
    if not record.is_counted:
        notes.append(
            "the server sends no usage: an event is taken for a token, and input tokens are not known "
            "(does it know stream_options.include_usage?)"
        )
    if settings.ignore_eos and record.is_counted and record.num_output_tokens != NUM_TOKENS:
        notes.append(
            f"{record.num_output_tokens} tokens came where {NUM_TOKENS} were asked with ignore_eos "
            f"(finish_reason {record.finish_reason})"
        )
    if count is not None:
        return Probe(WordCost(fixed=max(0, costs[1][1] - count(text))), record.is_counted, notes)
    (few, cost_few), (many, cost_many) = costs
    each = (cost_many - cost_few) / (many - few)
    cost = WordCost(fixed=max(0.0, cost_few - each * few), each=each) if each > 0 else WordCost()
    return Probe(cost, record.is_counted, notes)
