"""`AnswerReader`: the body of a streamed answer (server-sent events with OpenAI's chunks) into a `Record`."""

from __future__ import annotations

from typing import Any

import msgspec

from nybble.bench.record import Record


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


_decode = msgspec.json.Decoder(_Chunk).decode
_FIELDS = (b"event", b"id", b"retry")


class AnswerReader:
    """Reads one answer.

    Args:
        record: gets the times, counts and failures.
        keeps_text: keep the answer's text too, for the next turn of a conversation or to compare answers.
    """

    def __init__(self, record: Record, keeps_text: bool = False) -> None:
        self._record = record
        self._keeps_text = keeps_text
        self._rest = b""
        self._num_events = 0  # that brought a token
        self._num_tokens = 0  # as far as events tell
        self._texts: list[str] = []
        self.is_done = False

    def feed(self, data: bytes, now: float) -> None:
        """Take a piece of the body that came at `now`."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            self._take(event, now)

    def finish(self, now: float) -> None:
        """The body is complete."""
        record = self._record
        record.end = now
        if self._rest.strip():
            self._take(self._rest, now)
        if self._keeps_text:
            record.text = "".join(self._texts)
        if not record.is_counted:
            record.num_output_tokens = self._num_tokens or self._num_events
        if record.failure is not None:
            return
        if not self.is_done and record.finish_reason is None:
            record.fail("malformed", "the stream ended without finish_reason and without [DONE]")
        elif not self._num_events and not record.num_output_tokens:
            record.fail("empty", "the answer has no token")

    def _take(self, event: bytes, now: float) -> None:
        lines = [event] if b"\n" not in event else event.split(b"\n")
        data = b""
        for line in lines:
            if line.startswith(b"data:"):
                data += line[5:]
            elif line and line[:1] != b":" and line.split(b":", 1)[0] not in _FIELDS:
                self._record.fail("malformed", f"no server-sent event: {_shown(line)}")
                return
        data = data.strip()
        if data == b"[DONE]":
            self.is_done = True
        elif data:
            try:
                chunk = _decode(data)
            except msgspec.DecodeError as error:
                self._record.fail("malformed", f"{error}: {_shown(data)}")
                return
            self._take_chunk(chunk, now)

    def _take_chunk(self, chunk: _Chunk, now: float) -> None:
        record = self._record
        if chunk.error is not None or chunk.object == "error":
            error = chunk.error if chunk.error is not None else chunk.message
            record.fail("error", str(error.get("message", error) if isinstance(error, dict) else error))
            return
        num_before = self._num_tokens
        if chunk.usage is not None:
            if chunk.usage.completion_tokens is not None:
                self._num_tokens = max(self._num_tokens, chunk.usage.completion_tokens)
                record.num_output_tokens = chunk.usage.completion_tokens
                record.is_counted = True
            record.num_input_tokens = chunk.usage.prompt_tokens or record.num_input_tokens
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            record.finish_reason = choice.finish_reason
        if choice.token_ids:
            self._num_tokens = max(self._num_tokens, num_before + len(choice.token_ids))
            if self._keeps_text:
                record.token_ids.extend(choice.token_ids)
        text = choice.text
        delta = choice.delta
        is_token = bool(text or choice.token_ids)
        if delta is not None:
            text = delta.content or delta.reasoning_content or delta.reasoning
            is_token = bool(text or choice.token_ids or delta.tool_calls)
        # A token may have no text yet (half a character). But an event that only tells the role or the end has none.
        is_token = is_token or (choice.finish_reason is None and (delta is None or delta.role is None))
        if self._keeps_text and text:
            self._texts.append(text)
        if is_token:
            self._token(self._num_tokens - num_before, now)

    def _token(self, num_tokens: int, now: float) -> None:
        """An event brought tokens; 0 if it does not say how many."""
        record = self._record
        if self._num_events:
            gap = now - record.last_token
            record.gaps.extend([gap / num_tokens] * num_tokens if num_tokens > 1 else (gap,))
        else:
            record.first_token = now
        record.last_token = now
        self._num_events += 1


def _shown(data: bytes) -> str:
    return repr(data[:100].decode("utf-8", "replace"))
