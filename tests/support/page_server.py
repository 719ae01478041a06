"""A small stand-in for nybble's server, for tests of its page: serves the file under the policy that it names and
speaks just enough of the API. What it answers is set by plain attributes; what it was asked is kept in lists.

Run it alone to look at the page: `python tests/support/page_server.py 8000`.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nybble.server.page import security_policy

PAGE = Path(__file__).parents[2] / "nybble" / "server" / "web" / "index.html"
MODEL = "tiny-awq"
METRICS = """\
# HELP nybble:num_requests_running Requests in the batch.
# TYPE nybble:num_requests_running gauge
nybble:num_requests_running{{model_name="{model}"}} {running}
nybble:num_requests_waiting{{model_name="{model}"}} 2.0
nybble:kv_cache_usage_perc{{model_name="{model}"}} 0.314
nybble:generation_tokens_total{{model_name="{model}"}} {tokens}
nybble:time_to_first_token_seconds_bucket{{le="+Inf",model_name="{model}"}} 4.0
nybble:time_to_first_token_seconds_count{{model_name="{model}"}} 4.0
nybble:time_to_first_token_seconds_sum{{model_name="{model}"}} 0.5
"""


class PageServer:
    """Serves on a free port of 127.0.0.1 until `close`. Every path also works below `/some/root`."""

    def __init__(self, port: int = 0) -> None:
        self.answer = "Hello **there**."
        self.reasoning = ""
        self.finish = "stop"
        self.delay = 0.0  # seconds between tokens
        self.event_error: dict | None = None  # sent as an SSE event after the answer
        self.cut = False  # ends the stream without finish and [DONE]
        self.refusal: tuple[int, dict[str, str], object] | None = None  # status, headers, body of chat requests
        self.key = ""
        self.tokens = 1000.0
        self.asked: list[dict] = []  # bodies of chat requests
        self.authorizations: list[str | None] = []  # their Authorization headers
        self.hung_up = threading.Event()  # a client left before its answer was complete
        server = self

        class Handler(_Handler):
            page_server = server

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def events(self) -> Iterator[dict]:
        """The chunks of one streamed answer; a token is a word or a run of blanks."""
        done = 0
        for field, text in (("reasoning_content", self.reasoning), ("content", self.answer)):
            for token in re.findall(r"\s+|\S+", text):
                done += 1
                yield self._chunk([{"index": 0, "delta": {field: token}, "finish_reason": None}], done)
        if self.event_error:
            yield {"error": self.event_error}
        elif not self.cut:
            yield self._chunk([{"index": 0, "delta": {}, "finish_reason": self.finish}], done)
            yield self._chunk([], done)

    @staticmethod
    def _chunk(choices: list[dict], tokens: int) -> dict:
        usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
        return {"object": "chat.completion.chunk", "model": MODEL, "choices": choices, "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    page_server: PageServer

    def do_GET(self) -> None:
        path = self.path.removeprefix("/some/root")
        if path == "/":
            html = PAGE.read_text()
            self._send(200, "text/html; charset=utf-8", html, {"Content-Security-Policy": security_policy(html)})
        elif not self._is_allowed():
            self._refuse_key()
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]})
        elif path == "/metrics":
            server = self.page_server
            server.tokens += 400
            self._send(200, "text/plain", METRICS.format(model=MODEL, running=3.0, tokens=server.tokens))
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.page_server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            self._refuse_key()
            return
        server.asked.append(body)
        server.authorizations.append(self.headers.get("Authorization"))
        if server.refusal:
            status, headers, answer = server.refusal
            self._json(status, answer, headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in server.events():
                self._stream(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
                time.sleep(server.delay)
            if not server.cut:
                self._stream("data: [DONE]\n\n")
            self._write_piece(b"")
        except (BrokenPipeError, ConnectionResetError):
            server.hung_up.set()

    def _stream(self, text: str) -> None:
        """Cuts in the middle of the bytes: also in the middle of a character or of a line."""
        data = text.encode()
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._write_piece(piece)

    def _write_piece(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()

    def _is_allowed(self) -> bool:
        key = self.page_server.key
        return not key or self.headers.get("Authorization") == f"Bearer {key}"

    def _refuse_key(self) -> None:
        error = {"message": "Invalid API key.", "type": "authentication_error", "param": None, "code": None}
        self._json(401, {"error": error})

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(body), headers)

    def _send(self, status: int, kind: str, body: str, headers: dict[str, str] | None = None) -> None:
        data = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    playground = PageServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    playground.delay = 0.02
    print(playground.origin)
    threading.Event().wait()
