"""The first requests to a server: does it answer as it should, and what does it make of a prompt."""

from __future__ import annotations

import random
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


async def probe(settings: TargetSettings) -> Probe:
    """Ask twice, with a short and a longer prompt.

    Raises:
        MeasurementError: an answer failed; says how.
        ConfigError: it was refused.
    """
    target = Target(settings)
    draw = random.Random()  # others each time, so that no cache has them
    notes = []
    costs = []
    try:
        for num_words in (20, 80):
            text = " ".join(draw.choices(WORDS, k=num_words))
            prompt = [{"role": "user", "content": text}] if settings.route == "chat" else text
            record = Record(index=0)
            await target.ask(prompt, NUM_TOKENS, record, keeps_text=False)  # type: ignore[arg-type]
            if record.failure == "http":
                raise ConfigError(f"{settings.base_url} refused a first request with {record.detail}")
            if record.failure:
                raise MeasurementError(f"{settings.base_url}: {FAILURES[record.failure]}: {record.detail}")
            costs.append((num_words, record.num_input_tokens))
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
    (few, cost_few), (many, cost_many) = costs
    each = (cost_many - cost_few) / (many - few)
    cost = WordCost(fixed=max(0.0, cost_few - each * few), each=each) if each > 0 else WordCost()
    return Probe(cost, record.is_counted, notes)
