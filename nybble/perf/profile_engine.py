"""`profile_engine`: the settings of an engine that the steps of a profile fit in, decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.core.config import ResolvedConfig
from nybble.core.errors import ConfigError
from nybble.perf.step_profile import tokens_needed

PREFILL_TOKENS = {"cuda": 2048, "cpu": 256}
"""Of a prefill step, where nobody says."""


def measurable(engine: Mapping[str, Any], batches: Sequence[int]) -> tuple[list[int], list[str]]:
    """The batch sizes that a step may have by the settings that were given, and a warning of each other.

    Raises:
        ConfigError: there is none.
    """
    kept, warnings = list(batches), []
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        most = engine.get(name)
        for batch in [batch for batch in kept if most is not None and batch > most]:
            kept.remove(batch)
            warnings.append(f"--batch-sizes {batch}: more than --{name.replace('_', '-')} {most} lets into a step")
    if not kept:
        raise ConfigError(warnings[0])
    return kept, [f"{warning}: not measured" for warning in warnings]


def profile_engine(
    engine: Mapping[str, Any],
    resolved: ResolvedConfig,
    batches: Sequence[int],
    context_lens: Sequence[int],
    prefill_len: int | None,
    total_steps: int,
) -> tuple[dict[str, Any], int]:
    """The engine's settings, and the tokens of the prefill step.

    Args:
        engine: settings that were given; `resolved`: what they come to for the model.
        batches: `measurable` ones.
        prefill_len: 0: no prefill step; None: PREFILL_TOKENS, or as many as the model and a step take.
        total_steps: that each batch decodes.

    Raises:
        ConfigError: what is to be measured contradicts the settings, or is more than the model takes.
    """
    largest, positions = max(batches), resolved.max_model_len
    most_tokens = engine.get("max_num_batched_tokens")
    if prefill_len is None:
        prefill_len = min(PREFILL_TOKENS[resolved.device], resolved.max_num_batched_tokens, positions - 1)
    if most_tokens is not None and most_tokens < prefill_len:
        raise ConfigError(
            f"--prefill-len {prefill_len}: more than --max-num-batched-tokens {most_tokens} lets into a step"
        )
    budget = most_tokens or max(resolved.max_num_batched_tokens, largest, prefill_len)
    longest = max(tokens_needed(batch, max(context_lens), total_steps, budget) for batch in batches)
    if longest > positions:
        raise ConfigError(
            f"--context-len {max(context_lens)}: sequences grow to {longest} tokens while they are measured, and "
            f"max_model_len is {positions}; lower it, or --batch-sizes, --steps or --repeats"
        )
    if prefill_len >= positions:
        raise ConfigError(
            f"--prefill-len {prefill_len}: with the token that follows it is longer than max_model_len = {positions}"
        )
    options = {
        "max_num_seqs": largest,
        "max_model_len": max(longest, prefill_len + 1),
        "max_num_batched_tokens": budget,
        **engine,
    }
    return options, prefill_len
