"""`HttpReader` on whole, split and damaged responses."""

import random

import pytest

from nybble.bench.http_reader import HttpReader, MalformedResponse

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\nTrailer: t\r\n\r\n"
)
COUNTED = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end"


class Seen:
    def __init__(self) -> None:
        self.reader = HttpReader(lambda status, _: self.start(status), self.add, self.end)
        self.responses: list[list[object]] = []

    def start(self, status: int) -> None:
        self.responses.append([status, b"", None])

    def add(self, piece: bytes) -> None:
        self.responses[-1][1] += piece  # type: ignore[operator]

    def end(self, is_persistent: bool) -> None:
        self.responses[-1][2] = is_persistent


@pytest.mark.parametrize("seed", range(20))
def test_responses_on_one_connection_however_they_are_cut(seed: int) -> None:
    draw = random.Random(seed)
    data = CHUNKED + COUNTED + CONTINUED + CHUNKED + CLOSING
    seen = Seen()
    while data:
        size = draw.choice([1, 2, 7, 50, 1000])
        seen.reader.feed(data[:size])
        data = data[size:]
    assert seen.reader.feed_end()
    hello = [200, b"hello, world", True]
    assert seen.responses == [hello, [404, b"gone", True], [204, b"", True], hello, [200, b"to the end", False]]


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_response_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedResponse):
        Seen().reader.feed(data)


@pytest.mark.parametrize("length", range(60, len(CHUNKED) - 1, 7))
def test_an_end_amid_a_body_is_told(length: int) -> None:
    seen = Seen()
    seen.reader.feed(CHUNKED[:length])
    assert not seen.reader.feed_end()
