"""What a user asked: `Request`. Knows no blocks, no tensors, no HTTP."""

from __future__ import annotations

import time

import msgspec

from nybble.core.sampling import SamplingParams


class Request(msgspec.Struct, kw_only=True, frozen=True):
    """One prompt with its wishes.

    Args:
        request_id: unique among the requests in flight.
        prompt_token_ids: at least one id.
        prompt: the text, where there was one (only handed back in outputs).
        priority: lower is served earlier under the `priority` policy; ignored under `fcfs`.
        cache_salt: prefixes are shared only between requests with the same salt (tenant isolation).
        arrival_time: `time.monotonic()` seconds.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = SamplingParams()
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = msgspec.field(default_factory=time.monotonic)
