"""`SubmittedStep`: what a step sampled, on its way to the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nybble.core.batch import StepResult
from nybble.core.outputs import TokenLogprobs
from nybble.runner.logprobs import LogprobTensors


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying to memory of its own, so that no later step can overwrite what was not read yet."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def logprobs_to_host(tensors: LogprobTensors) -> LogprobTensors:
    return LogprobTensors(to_host(tensors.ids), to_host(tensors.logprobs), to_host(tensors.ranks))


@dataclass
class SubmittedStep:
    """A `PendingStep`. Its tensors are on the host, and complete once `done` has happened."""

    num_rows: int
    sample_rows: list[int] = field(default_factory=list)
    token_ids: torch.Tensor | None = None  # [S] int64
    # Each: which rows, how many likeliest tokens each of them asked for, and theirs.
    logprobs: list[tuple[list[int], list[int], LogprobTensors]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, LogprobTensors]] = field(
        default_factory=list
    )  # row, likeliest tokens, theirs
    done: torch.cuda.Event | None = None  # None: the device is the host

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        token_ids: list[int | None] = [None] * self.num_rows
        if self.token_ids is not None:
            for row, token_id in zip(self.sample_rows, self.token_ids.tolist(), strict=True):
                token_ids[row] = token_id
        logprobs: list[TokenLogprobs | None] = [None] * self.num_rows
        for rows, counts, tensors in self.logprobs:
            for row, found in zip(rows, tensors.to_dicts(counts), strict=True):
                logprobs[row] = found
        prompt_logprobs: list[list[TokenLogprobs] | None] = [None] * self.num_rows
        for row, count, tensors in self.prompt_logprobs:
            prompt_logprobs[row] = tensors.to_dicts([count] * len(tensors.ranks))
        return StepResult(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
