"""`Record`: what the client saw of one request. Times are `time.perf_counter()` seconds, one clock for all clients."""

from __future__ import annotations

from typing import Literal

import msgspec

FailureKind = Literal["connect", "disconnected", "timeout", "http", "error", "malformed", "empty"]
FAILURES: dict[str, str] = {
    "connect": "no connection",
    "disconnected": "the connection ended before the answer did",
    "timeout": "no answer in time",
    "http": "the server refused the request",
    "error": "the server reported an error in the stream",
    "malformed": "the answer is no stream of OpenAI events",
    "empty": "an answer without a token",
}
"""Kinds of failures and what they mean."""


class Record(msgspec.Struct, kw_only=True, array_like=True):
    """One request; `failure` is None if it succeeded."""

    index: int
    turn: int = 0
    start: float = 0.0  # when it was sent
    late: float = 0.0  # seconds after it was due (open loop)
    first_token: float = 0.0
    last_token: float = 0.0
    end: float = 0.0
    gaps: list[float] = []  # seconds between events that brought tokens, by token where the server counts them
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    num_asked_tokens: int = 0
    is_counted: bool = False  # by the server; else an event is taken for a token
    finish_reason: str | None = None
    failure: FailureKind | None = None
    detail: str = ""
    text: str = ""
    token_ids: list[int] = []

    def fail(self, kind: FailureKind, detail: str) -> None:
        if self.failure is None:
            self.failure = kind
            self.detail = detail[:500]
