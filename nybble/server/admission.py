"""`Admission`: the queue has an end. Counts requests from their arrival to their first token; beyond a limit, 429."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from nybble.core.request import Request
from nybble.server.errors import ApiError
from nybble.server.settings import Limits

NUM_REMEMBERED = 32
"""First tokens from whose times the rate is taken that Retry-After promises."""


class Admission:
    """
    Args:
        on_enter: called with the number of prompt tokens of each request that is let in.
    """

    def __init__(
        self, limits: Limits, on_enter: Callable[[int], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._on_enter = on_enter
        self._clock = clock
        self._first_tokens: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.num_requests = 0
        self.num_tokens = 0

    def enter(self, requests: Sequence[Request]) -> Ticket:
        """Count requests in, all or none.

        Raises:
            ApiError: 429, the queue is full.
        """
        sizes = [len(request.prompt_token_ids) for request in requests]
        most_requests, most_tokens = self._limits.max_queued_requests, self._limits.max_queued_tokens
        num_tokens = self.num_tokens + sum(sizes)
        # With an empty queue any request may enter: else one that is larger than the limit could never be served.
        if self.num_requests and (
            self.num_requests + len(sizes) > most_requests or (most_tokens is not None and num_tokens > most_tokens)
        ):
            raise ApiError(
                429,
                f"the queue is full: {self.num_requests} requests with {self.num_tokens} tokens are waiting",
                code="queue_full",
                headers={"Retry-After": str(self._seconds_to_wait())},
            )
        self.num_requests += len(sizes)
        self.num_tokens = num_tokens
        if self._on_enter is not None:
            for size in sizes:
                self._on_enter(size)
        return Ticket(self, sizes)

    def leave(self, size: int, *, has_begun: bool) -> None:
        self.num_requests -= 1
        self.num_tokens -= size
        if has_begun:
            self._first_tokens.append(self._clock())

    def _seconds_to_wait(self) -> int:
        """About how long the queue's first quarter takes, going by the last first tokens; from 1 to 60."""
        times = self._first_tokens
        if len(times) < 2:
            return 1
        seconds_each = (self._clock() - times[0]) / len(times)
        return min(60, max(1, math.ceil(seconds_each * self.num_requests / 4)))


class Ticket:
    """The place of some requests in the queue."""

    def __init__(self, admission: Admission, sizes: list[int]) -> None:
        self._admission = admission
        self._waiting = dict(enumerate(sizes))

    def begun(self, index: int) -> None:
        """Something came of request `index`."""
        size = self._waiting.pop(index, None)
        if size is not None:
            self._admission.leave(size, has_begun=True)

    def close(self) -> None:
        """None of them waits any more."""
        for size in self._waiting.values():
            self._admission.leave(size, has_begun=False)
        self._waiting.clear()
