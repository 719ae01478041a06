"""One logger for the package. Libraries stay quiet unless asked: the level comes from NYBBLE_LOG."""

from __future__ import annotations

import logging

from nybble.core import env

logger = logging.getLogger("nybble")


def configure() -> None:
    """Send nybble's log to standard error. Called by commands only: an importing program keeps its own set-up."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(env.log_level().upper())
    logger.propagate = False
