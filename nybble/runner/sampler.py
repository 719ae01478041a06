"""Logits → token ids, for all rows of a batch at once.

Order, as vLLM's: masks and biases, penalties, then for random rows temperature, min_p, top_k, top_p and the draw. What
no row of the batch asks for is skipped; plain greedy rows cost an argmax and a check. Does not know: text, stopping.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nybble.core.batch import BAD_LOGITS, NO_TOKEN
from nybble.runner import adjust
from nybble.runner.draw import draw, keep_likeliest, keep_min_p
from nybble.runner.logprobs import LogprobTensors, gather_logprobs
from nybble.runner.sampling_state import NO_LOGPROBS, PARAMETERS, SamplingPlan, SamplingState

PLAN_ARRAYS = ("uniforms", "top_k", "prompt_lengths", "history_lengths", "slots", "parameters", "greedy")
"""What of a `SamplingPlan` is wanted on the device."""

_SLICE_ELEMENTS = 2**23
"""Rows are sampled in slices of this many logits (55 rows of a 152k vocabulary): bounds the temporaries to ~0.4 GB."""


def slice_rows(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows whose fp32 logits stay within 32 MiB."""
    size = max(1, _SLICE_ELEMENTS // vocab_size)
    return (slice(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size))


def plan_arrays(plan: SamplingPlan) -> dict[str, np.ndarray]:
    return {name: getattr(plan, name) for name in PLAN_ARRAYS}


def sample_greedy(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] → [R] int64 likeliest ids; BAD_LOGITS for rows with NaN or infinities."""
    # One reduction tells: a sum of finite logits cannot overflow, and anything else stays in it.
    return logits.argmax(-1).masked_fill_(~logits.sum(-1).isfinite(), BAD_LOGITS)


def sample(
    logits: torch.Tensor, plan: SamplingPlan, device: dict[str, torch.Tensor], state: SamplingState
) -> torch.Tensor:
    """Sample one slice.

    Args:
        logits: [R, V] float32, left as they are.
        device: `plan_arrays(plan)`, on the device.

    Returns:
        [R] int64; BAD_LOGITS for rows with NaN or infinities, NO_TOKEN for rows whose masks left none.
    """
    if plan.is_argmax:
        return sample_greedy(logits)
    parameters = dict(zip(PARAMETERS, device["parameters"], strict=True))
    adjusted = _adjust(logits.clone(), plan, device, parameters, state)
    likeliest = adjusted.argmax(-1)
    is_masked = adjusted.gather(1, likeliest[:, None])[:, 0] == -torch.inf
    ids = likeliest
    if not plan.greedy.all():
        ids = torch.where(device["greedy"], likeliest, _draw_random(adjusted, plan, device, parameters))
    return ids.masked_fill(is_masked, NO_TOKEN).masked_fill_(~logits.sum(-1).isfinite(), BAD_LOGITS)


def _adjust(
    logits: torch.Tensor,
    plan: SamplingPlan,
    device: dict[str, torch.Tensor],
    parameters: dict[str, torch.Tensor],
    state: SamplingState,
) -> torch.Tensor:
    lengths = device["prompt_lengths"], device["history_lengths"]
    if plan.has_allowed:
        adjust.allow_only(logits, state.allowed[device["slots"]])
    if plan.masks is not None:
        adjust.allow_rows(logits, *plan.masks)
    if plan.bad_words is not None:
        adjust.ban_words(logits, plan.bad_words, state.history, device["slots"], *lengths)
    if plan.banned is not None:
        adjust.ban(logits, *plan.banned)
    if plan.bias is not None:
        adjust.add_bias(logits, *plan.bias)
    if plan.has_penalties:
        longest = int(plan.history_lengths.max())
        adjust.penalize(
            logits,
            state.history[:, :longest][device["slots"]],
            *lengths,
            repetition=parameters["repetition_penalty"],
            frequency=parameters["frequency_penalty"],
            presence=parameters["presence_penalty"],
        )
    return logits


def _draw_random(
    logits: torch.Tensor, plan: SamplingPlan, device: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]
) -> torch.Tensor:
    logits.div_(parameters["temperature"][:, None])
    if plan.has_min_p:
        keep_min_p(logits, parameters["min_p"])
    if plan.num_sorted:
        keep_likeliest(logits, device["top_k"], parameters["top_p"], plan.num_sorted)
    return draw(logits, device["uniforms"])


def sampled_logprobs(logits: torch.Tensor, ids: torch.Tensor, plan: SamplingPlan) -> tuple[np.ndarray, LogprobTensors]:
    """Log-probabilities of the rows of a slice that want them; returns which rows these are, too."""
    rows = np.flatnonzero(plan.num_logprobs > NO_LOGPROBS)
    if len(rows) == len(ids):
        return rows, gather_logprobs(logits, ids, int(plan.num_logprobs.max()))
    wanted = torch.from_numpy(rows).to(logits.device, non_blocking=True)
    return rows, gather_logprobs(logits[wanted], ids[wanted], int(plan.num_logprobs.max()))
