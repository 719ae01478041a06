"""Python's garbage collector, so that it stops the streams for no longer than a few milliseconds.

Thousands of open requests are some hundred thousand objects; a full collection walks through all of them, for 100 ms,
and comes the more often the more requests arrive. Nearly everything here is freed by its reference count, so full
collections are put off until few requests are open.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG_OBJECTS, YOUNG_ROUNDS = 2000, 5
"""A collection of what is young looks at no more than their product."""

NEVER = 1 << 30
QUIET = 32
"""Open requests whose objects take a millisecond or two."""


async def collect_when_quiet(
    num_open: Callable[[], int], *, period_seconds: float = 20.0, most_seconds: float = 900.0
) -> None:
    """Runs as long as the server does.

    Args:
        num_open: requests that have not ended.
        most_seconds: after so long it is done however many are open.
    """
    gc.collect()
    gc.freeze()  # what the server is made of stays
    before = gc.get_threshold()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_ROUNDS, NEVER)
    last = time.monotonic()
    try:
        while True:
            await asyncio.sleep(period_seconds)
            if num_open() <= QUIET or time.monotonic() - last > most_seconds:
                gc.collect()
                last = time.monotonic()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
