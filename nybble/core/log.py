"""One logger for the package. Libraries stay quiet unless asked: the level comes from NYBBLE_LOG, the format from
NYBBLE_LOG_FORMAT. What a record carries as `extra={"fields": {…}}` is shown in both formats.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from typing import Any, TextIO

import msgspec

from nybble.core import env

logger = logging.getLogger("nybble")
MAX_WAITING_LINES = 10_000
WRITE_SECONDS = 1.0
"""How long an exit waits for lines that are not written yet."""


def configure(*, in_thread: bool = False) -> None:
    """Send nybble's log to standard error. Called by commands only: an importing program keeps its own set-up.

    Args:
        in_thread: for a process that serves; see `ThreadedHandler`.
    """
    handler = ThreadedHandler(sys.stderr) if in_thread else logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if env.log_format() == "json" else TextFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(env.log_level().upper())
    logger.propagate = False


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class ThreadedHandler(logging.Handler):
    """Lines are written by a thread: neither a full disk nor a pipe that nobody reads delays who logs. Lines that
    cannot be written, or find too many waiting, are lost, and counted in the next that can.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._num_lost = 0
        threading.Thread(target=self._write_all, name="nybble-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting.qsize() < MAX_WAITING_LINES:
            try:
                self._waiting.put(self.format(record))
            except Exception:
                self.handleError(record)
        else:
            self._num_lost += 1

    def flush(self) -> None:
        """Wait, for a short time, until all is written; `logging` calls it at the exit."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(WRITE_SECONDS)

    def _write_all(self) -> None:
        while True:
            item = self._waiting.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            lost = f"({self._num_lost} lines of this log were lost)\n" if self._num_lost else ""
            try:
                self._stream.write(f"{lost}{item}\n")
                self._stream.flush()
            except (OSError, ValueError):  # no room, nobody reads, or closed
                self._num_lost += 1
            else:
                self._num_lost = 0
