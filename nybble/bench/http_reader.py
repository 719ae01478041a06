"""`HttpReader`: the bytes of HTTP/1.1 responses, one after another on a connection, into heads and body pieces.

Owns: where a message ends (Content-Length, chunks, or the connection's end). Does not know: sockets, events, JSON. A
streamed token is a chunk of its own, so this is the client's hottest code: it copies a piece once and keeps no tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

HEAD_LIMIT_BYTES = 1 << 16


class MalformedResponse(Exception):
    """The server's bytes are no HTTP/1.1 response."""


class HttpReader:
    """Reads responses.

    Args:
        on_head: called with the status and the headers, whose names are in lower case.
        on_body: called with each piece of a body as it comes.
        on_end: called when a body is complete; True if the connection can take another request.
    """

    def __init__(
        self,
        on_head: Callable[[int, Mapping[str, str]], None],
        on_body: Callable[[bytes], None],
        on_end: Callable[[bool], None],
    ) -> None:
        self._on_head = on_head
        self._on_body = on_body
        self._on_end = on_end
        self._rest = b""  # received, not yet understood
        self._read: Callable[[bytes, int], int] = self._read_head
        self._num_left = 0  # bytes of the body, or of the chunk
        self._is_persistent = True

    def feed(self, data: bytes) -> None:
        """Take what the connection received.

        Raises:
            MalformedResponse: the connection is of no use any more.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position, end = 0, len(data)
        while position < end:
            next_position = self._read(data, position)
            if next_position < 0:
                self._rest = data[position:]
                return
            position = next_position

    def feed_end(self) -> bool:
        """The connection has ended. Returns whether that was the end of a body, not in the middle of a response."""
        if self._read == self._read_to_end:
            self._finish()
            return True
        return self._read == self._read_head and not self._rest

    # Each reads one thing at a position and returns the position after it, or -1 if more bytes are needed.

    def _read_head(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            if len(data) - position > HEAD_LIMIT_BYTES:
                raise MalformedResponse("a head of over 64 KiB")
            return -1
        first, *lines = data[position:end].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or len(rest) < 3 or not rest[:3].isdecimal():
            raise MalformedResponse(f"no HTTP/1.1 response: {first[:80]!r}")
        status = int(rest[:3])
        if 100 <= status < 200:
            return end + 4
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        kept = "keep-alive" if version == "HTTP/1.0" else "close"
        told = headers.get("connection", "").lower()
        self._is_persistent = told == "keep-alive" if version == "HTTP/1.0" else told != kept
        self._on_head(status, headers)
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._read = self._read_chunk_size
        elif "content-length" in headers:
            if not headers["content-length"].isdecimal():
                raise MalformedResponse(f"Content-Length: {headers['content-length'][:80]!r}")
            self._num_left = int(headers["content-length"])
            self._read = self._read_counted
        elif status in (204, 304):
            self._num_left = 0
            self._read = self._read_counted
        else:
            self._is_persistent = False
            self._read = self._read_to_end
        if self._read == self._read_counted and not self._num_left:
            self._finish()
        return end + 4

    def _read_counted(self, data: bytes, position: int) -> int:
        piece = data[position : position + self._num_left]
        self._num_left -= len(piece)
        self._on_body(piece)
        if not self._num_left:
            self._finish()
        return position + len(piece)

    def _read_to_end(self, data: bytes, position: int) -> int:
        self._on_body(data[position:])
        return len(data)

    def _read_chunk_size(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n", position)
        if end < 0:
            return -1
        try:
            self._num_left = int(data[position:end].split(b";", 1)[0], 16)
        except ValueError:
            raise MalformedResponse(f"a chunk's size is {data[position:end][:40]!r}") from None
        self._read = self._read_chunk if self._num_left else self._read_trailer
        return end + 2

    def _read_chunk(self, data: bytes, position: int) -> int:
        piece = data[position : position + self._num_left]
        self._num_left -= len(piece)
        self._on_body(piece)
        if not self._num_left:
            self._read = self._read_chunk_end
        return position + len(piece)

    def _read_chunk_end(self, data: bytes, position: int) -> int:
        if len(data) - position < 2:
            return -1
        if data[position : position + 2] != b"\r\n":
            raise MalformedResponse("a chunk is longer than it says")
        self._read = self._read_chunk_size
        return position + 2

    def _read_trailer(self, data: bytes, position: int) -> int:
        end = data.find(b"\r\n", position)
        if end < 0:
            return -1
        if end == position:
            self._finish()
        return end + 2

    def _finish(self) -> None:
        self._read = self._read_head
        self._on_end(self._is_persistent)
