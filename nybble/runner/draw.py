"""Logits → one random token a row: temperature, min_p, top_k, top_p, and the draw itself.

Three choices make a seeded request repeat bit for bit in any batch, as long as its logits do: filters only compute a
*threshold* on the logit (so the order of equal logits does not matter), probabilities become integers before they are
summed (so the order of summation does not matter), and the draw walks the vocabulary in id order. All logits equal to a
threshold are kept.
"""

from __future__ import annotations

import torch

_WEIGHT_ONE = 2**30
"""Weight of the likeliest token. Sums over 10⁶ tokens stay below 2⁵³: exact as int64 and as float64. Tokens less likely
than 2⁻³⁰ of the likeliest weigh nothing."""

_CHUNK = 256
"""The draw first searches the sums of chunks of this many tokens, then one chunk: scanning a whole row is slow."""

MAX_SELECTED = 1024
"""Up to here the k likeliest are selected; beyond, rows are sorted."""


def weights(logits: torch.Tensor) -> torch.Tensor:
    """Integers proportional to softmax(logits), as float32 [R, V] whose values are whole; 0 for −inf."""
    return (logits - logits.amax(-1, keepdim=True)).exp_().mul_(_WEIGHT_ONE).floor_()


def keep_likeliest(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, num_sorted: int) -> torch.Tensor:
    """Set to −inf what top_k, then top_p (of what top_k left) drop.

    Args:
        logits: [R, V], overwritten.
        top_k: [R] int64, V keeps all.
        top_p: [R] float32; the smallest set of at least this probability stays, so never nothing.
        num_sorted: how many of a row's likeliest tokens can decide; V, or the largest top_k below MAX_SELECTED.
    """
    if num_sorted <= MAX_SELECTED:
        values = logits.topk(min(num_sorted, logits.shape[1])).values
    else:
        values = logits.sort(descending=True).values
    rank = torch.arange(values.shape[1], device=logits.device)
    values.masked_fill_(rank >= top_k[:, None], -torch.inf)
    weight = weights(values).long()
    likelier = weight.cumsum(-1) - weight
    kept = likelier < top_p[:, None].double() * weight.sum(-1, keepdim=True)
    threshold = values.gather(1, kept.sum(-1, keepdim=True).clamp_(min=1) - 1)
    unfiltered = (top_k >= logits.shape[1]) & (top_p >= 1)
    threshold.masked_fill_(unfiltered[:, None], -torch.inf)  # such a row may have more tokens than were sorted
    return logits.masked_fill_(logits < threshold, -torch.inf)


def keep_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set to −inf tokens less likely than min_p [R] times the likeliest one; p ∝ exp(logit), so this is a threshold."""
    threshold = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
    return logits.masked_fill_(logits < threshold, -torch.inf)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability first exceeds the row's uniform number.

    Args:
        logits: [R, V] float32.
        uniforms: [R] float64 in [0, 1).

    Returns:
        [R] int64. A token of weight 0 is never returned, unless the row has NaN (then any id in range is).
    """
    num_rows, vocab_size = logits.shape
    padded = -(-vocab_size // _CHUNK) * _CHUNK
    weight = torch.zeros(num_rows, padded, dtype=torch.int32, device=logits.device)
    weight[:, :vocab_size].copy_(weights(logits))
    chunks = weight.view(num_rows, -1, _CHUNK)

    sums = chunks.sum(-1, dtype=torch.int64)
    total = sums.sum(-1)
    # A whole number of weight units below the total, which rounding could otherwise reach.
    target = torch.minimum((uniforms * total).long(), total - 1)[:, None]
    chunk, target = _search(sums, target)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK)).squeeze(1).long()
    offset, _ = _search(inside, target)
    return (chunk * _CHUNK + offset).squeeze(1).clamp_(max=vocab_size - 1)


def _search(weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, 1] first index whose cumulative weight exceeds the target, and what of the target remains inside it."""
    cumulative = weight.cumsum(-1)
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weight.shape[1] - 1)
    return index, target - (cumulative - weight).gather(1, index)
