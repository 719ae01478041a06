"""An OpenAI-compatible server of known timing: it streams tokens at given intervals and remembers when it really did.

As a process of its own: `with TimedServer(...) as server`. Lean enough for 512 streams beside a client on two cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, ClassVar, Self

FAULTS = ("", "malformed", "dies", "empty", "short", "refuses", "error", "cut", "no_usage", "hangs", "html")


class TimedServer:
    """The server's process. `fault` makes it misbehave, from request number `after` on.

    Args:
        ttft, itl: seconds from a request to its first token, and between tokens.
        tokens_per_event: how many come at once.
    """

    def __init__(
        self,
        ttft: float = 0.0,
        itl: float = 0.0,
        *,
        fault: str = "",
        after: int = 3,
        tokens_per_event: int = 1,
        model: str = "timed",
    ) -> None:
        assert fault in FAULTS
        options = {"ttft": ttft, "itl": itl, "fault": fault, "after": after, "tokens_per_event": tokens_per_event}
        options["model"] = model
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def truth(self, num_last: int | None = None) -> list[dict[str, Any]]:
        """Of each request, in the order they came: when it came, its tokens were sent and it ended; what it asked."""
        with urllib.request.urlopen(f"{self.url}/truth") as answer:
            requests: list[dict[str, Any]] = json.load(answer)
        return requests if num_last is None else requests[-num_last:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class _Connection(asyncio.Protocol):
    options: ClassVar[dict[str, Any]] = {}
    requests: ClassVar[list[dict[str, Any]]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""
        self.is_open = True

    def connection_lost(self, exception: Exception | None) -> None:
        self.is_open = False

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            self.answer(head, rest[:length], now)

    def answer(self, head: bytes, body: bytes, now: float) -> None:
        path = head.split()[1]
        if path == b"/v1/models":
            self.whole({"object": "list", "data": [{"id": self.options["model"]}]})
        elif path == b"/truth":
            self.whole(self.requests)
        elif path in (b"/v1/completions", b"/v1/chat/completions"):
            self.generate(json.loads(body), now)
        else:
            self.whole({"error": {"message": "no such route"}}, "404 Not Found")

    def generate(self, body: dict[str, Any], now: float) -> None:
        fault = self.options["fault"] if len(self.requests) >= self.options["after"] else ""
        if fault == "dies":
            os._exit(1)
        if fault == "refuses":
            self.whole({"error": {"message": "too long", "code": 400}}, "400 Bad Request")
            return
        if fault == "html":
            self.whole("<html>proxy</html>")
            return
        request = {"came": now, "sent": [], "end": 0.0, "body": body, "fault": fault}
        self.requests.append(request)
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.loop = asyncio.get_running_loop()
        if fault == "empty":
            self.end(request, 0)
        elif fault != "hangs":
            self.loop.call_at(self.loop.time() + self.options["ttft"], self.token, request)

    def token(self, request: dict[str, Any]) -> None:
        if not self.is_open:
            return
        sent, body, fault = request["sent"], request["body"], request["fault"]
        number = len(sent)
        due = request["came"] + self.options["ttft"] + number * self.options["itl"]
        if number == 2 and fault == "malformed":
            self.chunk(b"data: {broken\n\n")
        if number == 2 and fault == "cut":
            self.transport.abort()
            return
        if number == 2 and fault == "error":
            self.chunk(b'data: {"error":{"message":"engine died","code":500}}\n\n')
            self.chunk(b"data: [DONE]\n\n")
            self.transport.write(b"0\r\n\r\n")
            return
        text = b" tok" * self.options["tokens_per_event"]
        is_chat = "messages" in body
        piece = b'"delta":{"content":"%s"}' % text if is_chat else b'"text":"%s"' % text
        sent.append(time.perf_counter())
        self.chunk(b'data: {"id":"x","object":"chunk","choices":[{"index":0,%s,"finish_reason":null}]}\n\n' % piece)
        num_tokens = len(sent) * self.options["tokens_per_event"]
        if num_tokens >= body["max_tokens"] or (fault == "short" and number == 2):
            self.end(request, num_tokens)
        else:
            # perf_counter and the loop's time are the same clock
            self.loop.call_at(due + self.options["itl"], self.token, request)

    def end(self, request: dict[str, Any], num_tokens: int) -> None:
        body, fault = request["body"], request["fault"]
        reason = b"stop" if fault == "short" else b"length"
        self.chunk(b'data: {"choices":[{"index":0,"text":"","finish_reason":"%s"}]}\n\n' % reason)
        if fault != "no_usage" and self.options["fault"] != "no_usage":
            said = body.get("prompt") or body["messages"][-1]["content"]
            num_prompt = len(said.split()) if isinstance(said, str) else len(said)
            usage = b'{"prompt_tokens":%d,"completion_tokens":%d}' % (num_prompt, num_tokens)
            self.chunk(b'data: {"choices":[],"usage":%s}\n\n' % usage)
        self.chunk(b"data: [DONE]\n\n")
        request["end"] = time.perf_counter()
        self.transport.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def whole(self, value: Any, status: str = "200 OK") -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.transport.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


async def _main(options: dict[str, Any]) -> None:
    import gc

    gc.freeze()
    gc.disable()
    _Connection.options = options
    server = await asyncio.get_running_loop().create_server(
        _Connection, "127.0.0.1", options.get("port", 0), backlog=2048
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
