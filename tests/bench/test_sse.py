"""`AnswerReader`: events into times, counts and failures."""

import json
from typing import Any

import pytest

from nybble.bench.record import Record
from nybble.bench.sse import AnswerReader


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(value: str, finish_reason: str | None = None, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "text": value, "finish_reason": finish_reason}], **more)


def chat(finish_reason: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


DONE = b"data: [DONE]\n\n"
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 5})


def read(*pieces: bytes, keeps_text: bool = True) -> Record:
    """Piece i comes at second 10 + i."""
    record = Record(index=0)
    reader = AnswerReader(record, keeps_text)
    for number, piece in enumerate(pieces):
        reader.feed(piece, 10.0 + number)
    reader.finish(10.0 + len(pieces))
    return record


def test_times_and_counts_of_a_completion() -> None:
    record = read(text("a"), text(" b"), text(""), text("", "length"), USAGE, DONE)
    assert (record.first_token, record.last_token, record.end) == (10.0, 12.0, 16.0)
    assert record.gaps == [1.0, 1.0]  # a token without text is a token
    assert (record.num_input_tokens, record.num_output_tokens, record.is_counted) == (7, 5, True)
    assert (record.text, record.finish_reason, record.failure) == ("a b", "length", None)


def test_a_chats_first_event_tells_the_role_and_no_token() -> None:
    record = read(
        chat(role="assistant", content=""), chat(content="x"), chat(reasoning_content="y"), chat("stop"), DONE
    )
    assert (record.first_token, record.gaps, record.num_output_tokens) == (11.0, [1.0], 2)
    assert not record.is_counted


def test_a_role_that_comes_with_text_is_a_token() -> None:
    assert read(chat(role="assistant", content="x"), chat("stop"), DONE).first_token == 10.0


def test_token_ids_say_how_many_tokens_an_event_brought() -> None:
    def ids(*token_ids: int) -> bytes:
        return event(choices=[{"text": "x", "token_ids": token_ids, "finish_reason": None}])

    record = read(ids(1), ids(2, 3, 4, 5), text("", "length"), DONE)
    assert record.gaps == [0.25] * 4
    assert (record.num_output_tokens, record.token_ids) == (5, [1, 2, 3, 4, 5])


def test_continuous_usage_says_it_too() -> None:
    record = read(
        text("x", usage={"completion_tokens": 1}), text("y", usage={"completion_tokens": 3}), text("", "stop"), DONE
    )
    assert (record.gaps, record.num_output_tokens) == ([0.5, 0.5], 3)


def test_events_may_be_cut_anywhere_and_have_comments_and_other_line_ends() -> None:
    stream = b": ping\r\n\r\nevent: x\r\n" + (text("é") + text("b", "stop") + USAGE + DONE).replace(b"\n", b"\r\n")
    record = read(*(stream[i : i + 3] for i in range(0, len(stream), 3)))
    assert (record.text, record.num_output_tokens, record.failure) == ("éb", 5, None)


@pytest.mark.parametrize(
    ("pieces", "kind", "detail"),
    [
        ([text("a"), b"data: {broken\n\n", DONE], "malformed", "broken"),
        ([b"<html>\n\n"], "malformed", "<html>"),
        ([b'{"choices":[]}'], "malformed", "no server-sent event"),
        ([text("a")], "malformed", "without [DONE]"),
        ([DONE], "empty", "no token"),
        ([text("", "stop"), event(choices=[], usage={"completion_tokens": 0}), DONE], "empty", "no token"),
        ([text("a"), event(error={"message": "engine died"}), DONE], "error", "engine died"),
        ([event(object="error", message="too long"), DONE], "error", "too long"),
        ([b"data: 5\n\n"], "malformed", "5"),
    ],
)
def test_failures(pieces: list[bytes], kind: str, detail: str) -> None:
    record = read(*pieces)
    assert record.failure == kind
    assert detail in record.detail
