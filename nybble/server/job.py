"""`Job`: one HTTP request on its way through the engine: its engine requests, its names, its usage so far."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.server.errors import bad_request
from nybble.server.protocol import SamplingFields
from nybble.server.reading import Reading
from nybble.server.responses import CachedTokens, Usage

_numbers = itertools.count()


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as HTTP's headers say."""

    request_id: str
    key_salt: str = ""


@dataclass(kw_only=True)
class Job:
    response_id: str
    model: str
    requests: list[Request]
    streams: bool
    shows_usage: bool  # in a last chunk
    shows_usage_always: bool  # in each chunk
    shows_ids: bool
    names_ids: bool  # write tokens of log-probabilities as "token_id:17"
    echoes: bool = False  # the prompt is part of the text
    shows_prompt_logprobs: bool = False
    drops_generated: bool = False  # the client wants its prompt scored, and nothing generated
    reading: Reading = field(default_factory=Reading)  # of a chat
    created: int = field(default_factory=lambda: int(time.time()))
    num_generated: int = 0
    finish_reasons: set[str] = field(default_factory=set)
    queue_seconds: float | None = None  # the longest of its completions' waits
    first_token_seconds: float | None = None
    _num_cached: list[int] = field(init=False)  # of each request
    _total_cached: int = 0
    _num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_cached = [0] * len(self.requests)
        self._num_prompt = sum(len(request.prompt_token_ids) for request in self.requests)

    def hear(self, deltas: Sequence[SequenceDelta]) -> None:
        """Note what logs and traces tell."""
        if self.first_token_seconds is None and deltas:
            self.first_token_seconds = time.monotonic() - self.requests[0].arrival_time
        for delta in deltas:
            if delta.finish_reason is not None:
                self.finish_reasons.add(delta.finish_reason)
                timing = delta.timing
                if timing is not None and timing.first_scheduled_time is not None:
                    waited = timing.first_scheduled_time - timing.arrival_time
                    self.queue_seconds = max(self.queue_seconds or 0.0, waited)

    def count(self, index: int, delta: SequenceDelta) -> None:
        """Take a delta of request `index` into the usage."""
        self.num_generated += len(delta.token_ids)
        if (more := delta.num_cached_tokens - self._num_cached[index]) > 0:
            self._num_cached[index] += more
            self._total_cached += more

    def chunk_usage(self) -> Usage | UnsetType | None:
        """The usage of a chunk that is not the last."""
        if self.shows_usage_always:
            return self.usage()
        return None if self.shows_usage else UNSET

    def usage(self) -> Usage:
        num_prompt = self._num_prompt
        num_generated = 0 if self.drops_generated else self.num_generated
        return Usage(num_prompt, num_generated, num_prompt + num_generated, CachedTokens(self._total_cached))


def response_id(prefix: str, body: SamplingFields, caller: Caller) -> str:
    return f"{prefix}-{body.request_id or caller.request_id}"


def engine_id(name: str) -> str:
    """Unique in this process, whatever ids clients choose."""
    return f"{name}-{next(_numbers)}"


def usage_wishes(body: SamplingFields) -> tuple[bool, bool]:
    """`shows_usage` and `shows_usage_always`."""
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        raise bad_request("stream_options needs stream = true", "stream_options", "invalid_value")
    return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)
