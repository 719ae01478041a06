"""`Admission`: the queue has an end, in places and in time. Counts completions from their arrival to their first token;
beyond a limit, 429; after too long a wait, 503.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nybble.core.request import Request
from nybble.server.errors import ApiError
from nybble.server.settings import Limits

NUM_REMEMBERED = 32
"""First tokens from whose times the rate is taken that Retry-After promises."""


class Load(NamedTuple):
    """What a request weighs in the queue: each of its n completions has a place, and reads the prompt."""

    num_completions: int
    num_tokens: int

    @classmethod
    def of(cls, request: Request) -> Load:
        n = request.params.n
        return cls(n, n * len(request.prompt_token_ids))


class Admission:
    """
    Args:
        on_enter: called with the number of prompt tokens of each request that is let in.
        clock: that of the event loop.
    """

    def __init__(
        self, limits: Limits, on_enter: Callable[[int], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._on_enter = on_enter
        self._clock = clock
        self._first_tokens: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.num_completions = 0
        self.num_tokens = 0

    def enter(self, requests: Sequence[Request]) -> Ticket:
        """Count requests in, all or none.

        Raises:
            ApiError: 429, the queue is full.
        """
        loads = [Load.of(request) for request in requests]
        most, most_tokens = self._limits.max_queued_requests, self._limits.max_queued_tokens
        num_completions = self.num_completions + sum(load.num_completions for load in loads)
        num_tokens = self.num_tokens + sum(load.num_tokens for load in loads)
        # With an empty queue any request may enter: else one that is larger than the limit could never be served.
        if self.num_completions and (num_completions > most or (most_tokens is not None and num_tokens > most_tokens)):
            raise self._refusal(
                429,
                f"the queue is full: {self.num_completions} completions of {self.num_tokens} prompt tokens are waiting",
                "queue_full",
            )
        self.num_completions, self.num_tokens = num_completions, num_tokens
        if self._on_enter is not None:
            for request in requests:
                self._on_enter(len(request.prompt_token_ids))
        return Ticket(self, loads, self._clock() + self._limits.max_queue_seconds)

    def leave(self, load: Load, *, has_begun: bool) -> None:
        self.num_completions -= load.num_completions
        self.num_tokens -= load.num_tokens
        if has_begun:
            self._first_tokens.extend([self._clock()] * load.num_completions)

    def too_late(self) -> ApiError:
        seconds = self._limits.max_queue_seconds
        return self._refusal(503, f"the request waited for more than {seconds:g} s in the queue", "queue_timeout")

    def _refusal(self, status: int, message: str, code: str) -> ApiError:
        return ApiError(status, message, code=code, headers={"Retry-After": str(self._seconds_to_wait())})

    def _seconds_to_wait(self) -> int:
        """About how long the queue's first quarter takes, going by the last first tokens; from 1 to 60."""
        times = self._first_tokens
        if len(times) < 2:
            return 1
        seconds_each = (self._clock() - times[0]) / len(times)
        return min(60, max(1, math.ceil(seconds_each * self.num_completions / 4)))


class Ticket:
    """The place of some requests in the queue.

    Args:
        expires: when none of them may be waiting any more, of the clock of `Admission`.
    """

    def __init__(self, admission: Admission, loads: Sequence[Load], expires: float) -> None:
        self._admission = admission
        self._waiting = dict(enumerate(loads))
        self.expires = expires

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def begun(self, index: int) -> None:
        """Something came of request `index`."""
        load = self._waiting.pop(index, None)
        if load is not None:
            self._admission.leave(load, has_begun=True)

    def too_late(self) -> ApiError:
        """What to raise when it has expired."""
        return self._admission.too_late()

    def close(self) -> None:
        """None of them waits any more."""
        for load in self._waiting.values():
            self._admission.leave(load, has_begun=False)
        self._waiting.clear()
