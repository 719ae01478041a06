"""Log-probabilities under the model's unmodified distribution: computed on the device, made into dicts on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.core.outputs import Logprob, TokenLogprobs


@dataclass(frozen=True)
class LogprobTensors:
    """N tokens, each with the n likeliest ones of its position. Column 0 is the token itself."""

    ids: torch.Tensor  # [N, 1 + n] int64
    logprobs: torch.Tensor  # [N, 1 + n] float32
    ranks: torch.Tensor  # [N] int64, of column 0

    def to_dicts(self, counts: list[int]) -> list[TokenLogprobs]:
        """One dict a token, cut to its own number of likeliest ones. For tensors on the host."""
        rows = zip(self.ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), counts, strict=True)
        return [_to_dict(ids[: n + 1], logprobs[: n + 1], rank) for ids, logprobs, rank, n in rows]


def _to_dict(ids: list[int], logprobs: list[float], rank: int) -> TokenLogprobs:
    found = {ids[0]: Logprob(logprob=logprobs[0], rank=rank)}
    for place, (token_id, logprob) in enumerate(zip(ids[1:], logprobs[1:], strict=True), start=1):
        found.setdefault(token_id, Logprob(logprob=logprob, rank=place))
    return found


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_likeliest: int) -> LogprobTensors:
    """Log-softmax at the given tokens [N] (negative ids, of failed rows, count as 0) and at the likeliest ones.

    logits: [N, V] float32; takes a temporary of the same size, so callers hand over slices of a large batch.
    """
    ids = token_ids.clamp(min=0)[:, None]
    chosen = logits.gather(1, ids)
    ranks = (logits > chosen).sum(-1) + 1
    if num_likeliest:
        top = logits.topk(min(num_likeliest, logits.shape[1]))
        ids, chosen = torch.cat([ids, top.indices], 1), torch.cat([chosen, top.values], 1)
    return LogprobTensors(ids, chosen - logits.logsumexp(-1, keepdim=True), ranks)


def concatenate(parts: list[LogprobTensors]) -> LogprobTensors:
    """The parts' tokens one after the other."""
    return LogprobTensors(*(torch.cat([getattr(p, f) for p in parts]) for f in ("ids", "logprobs", "ranks")))
