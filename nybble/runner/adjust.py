"""Changes to logits before anything is chosen: masks, biases and penalties, for all rows of a slice at once, in place.

Lists of any length (logit_bias, bad_words) go to the device in pieces of bounded size: what one request brings must not
decide how much memory a step takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from nybble.runner.sampling_state import BadWords

_PIECE = 2**16


def _pieces(count: int, size: int = _PIECE) -> Iterator[slice]:
    return (slice(begin, begin + size) for begin in range(0, count, size))


def _upload(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    # From pageable memory: CUDA has taken the data when the call returns, so nothing needs to be kept alive.
    return torch.from_numpy(array).to(like.device, non_blocking=True)


def allow_only(logits: torch.Tensor, masks: torch.Tensor) -> None:
    """−inf for tokens whose bit is 0. masks: [R, ⌈V / 32⌉] int32, token v at bit v % 32 of word v // 32."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(~allowed, -torch.inf)


def allow_rows(logits: torch.Tensor, rows: np.ndarray, words: np.ndarray) -> None:
    """`allow_only` for some rows. rows: [M] int64; words: [M, ⌈V / 32⌉] int32, as `allow_only`'s masks."""
    masks = _upload(words, logits)
    if len(rows) == len(logits):
        allow_only(logits, masks)
        return
    positions = _upload(rows, logits)
    some = logits[positions]
    allow_only(some, masks)
    logits.index_copy_(0, positions, some)


def add_bias(logits: torch.Tensor, rows: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    """Add a value to single logits. No (row, id) may occur twice: the sum's order would show."""
    positions = rows * logits.shape[1] + ids
    for piece in _pieces(len(positions)):
        logits.view(-1).scatter_add_(0, _upload(positions[piece], logits), _upload(values[piece], logits))


def ban(logits: torch.Tensor, rows: np.ndarray, ids: np.ndarray) -> None:
    """−inf for single logits."""
    positions = rows * logits.shape[1] + ids
    for piece in _pieces(len(positions)):
        logits.view(-1).index_fill_(0, _upload(positions[piece], logits), -torch.inf)


def ban_words(
    logits: torch.Tensor,
    words: BadWords,
    history: torch.Tensor,
    slots: torch.Tensor,
    prompt_lengths: torch.Tensor,
    history_lengths: torch.Tensor,
) -> None:
    """−inf for the last id of each word whose other ids are the tail of the row's output.

    Args:
        history: [slots, max_len] int32, prompt then output.
        slots, prompt_lengths, history_lengths: [R] int64 of the rows of `logits`.
    """
    width = words.prefixes.shape[1]
    for piece in _pieces(len(words.rows), max(1, _PIECE // max(1, width))):
        rows = _upload(words.rows[piece], logits)
        prefixes = _upload(words.prefixes[piece], logits)
        last_ids = _upload(words.last_ids[piece], logits)
        positions = history_lengths[rows][:, None] + torch.arange(-width, 0, device=logits.device)
        is_output = positions >= prompt_lengths[rows][:, None]
        tail = history[slots[rows][:, None], positions.clamp_(min=0)]
        matches = ((prefixes < 0) | (is_output & (tail == prefixes))).all(-1)
        # Adding −inf or 0, because two words may end in the same token and only one of them match.
        penalty = torch.zeros_like(matches, dtype=logits.dtype).masked_fill_(matches, -torch.inf)
        logits.view(-1).scatter_add_(0, rows * logits.shape[1] + last_ids, penalty)


def penalize(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    prompt_lengths: torch.Tensor,
    history_lengths: torch.Tensor,
    *,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Repetition (of prompt and output), then frequency and presence (of output) penalties.

    Args:
        tokens: [R, L] int32, the rows' histories; arbitrary ids in range past a row's history length.
        prompt_lengths, history_lengths: [R] int64.
        repetition, frequency, presence: [R] float32; 1, 0, 0 leave a row as it is.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    is_past = positions < history_lengths[:, None]
    is_output = is_past & (positions >= prompt_lengths[:, None])
    ids = tokens.long()
    occurrences = torch.zeros_like(logits, dtype=torch.int32)
    occurrences.scatter_add_(1, ids, is_past.int())
    scale = torch.where(logits > 0, 1 / repetition[:, None], repetition[:, None])
    logits.mul_(scale.masked_fill_(occurrences == 0, 1.0))
    occurrences.zero_().scatter_add_(1, ids, is_output.int())
    logits.sub_(frequency[:, None] * occurrences)
    logits.sub_(presence[:, None] * (occurrences > 0))
