"""What a user asked: `Request`. Knows no blocks, no tensors, no HTTP.

Types are checked here, in the thread of whoever makes the request; the engine's serves everyone. Token ids, of which
there may be many, are checked one by one by the engine, which knows the vocabulary.
"""

from __future__ import annotations

import time

import msgspec

from nybble.core.checks import Interval, fits, shown, wording
from nybble.core.errors import RequestError
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

    Raises:
        RequestError: a value is of a wrong type; names the field.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = SamplingParams()
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = msgspec.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            interval = Interval() if kind is int else None
            if not fits(kind, value, interval):
                raise RequestError(f"{name} must be {wording(kind, interval)}, got {shown(value)}", parameter=name)


_KINDS = {
    "request_id": str,
    "prompt_token_ids": list,
    "params": SamplingParams,
    "prompt": str | None,
    "priority": int,
    "cache_salt": str,
    "arrival_time": float,
}
