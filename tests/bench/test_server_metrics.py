"""`MetricsWatch` on a server's /metrics, in nybble's and in vLLM's names."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from nybble.bench import server_metrics
from nybble.bench.server_metrics import MetricsWatch
from nybble.bench.target import TargetSettings

TEXT = """# HELP {p}num_requests_running x
{p}num_requests_running{{model_name="m"}} {running}
{p}kv_cache_usage_perc{{engine="0",model_name="m"}} {usage}
{p}prefix_cache_queries_total{{model_name="m"}} {queries}
{p}prefix_cache_hits_total{{model_name="m"}} {hits}
process_resident_memory_bytes 1.5e+09
"""


class Handler(http.server.BaseHTTPRequestHandler):
    prefix = "nybble:"
    looks = 0

    def do_GET(self) -> None:
        Handler.looks += 1
        step = Handler.looks
        body = TEXT.format(
            p=self.prefix, running=step % 3, usage=step / 10, queries=100 * step, hits=25.0 * step
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("prefix", ["nybble:", "vllm:", ""])
def test_peaks_and_gains(url: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_metrics, "INTERVAL", 0.02)
    Handler.prefix, Handler.looks = prefix, 0
    with MetricsWatch(TargetSettings(base_url=url, model="m"), is_local=True) as watch:
        deadline = time.monotonic() + 10
        while Handler.looks < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    found, looks = watch.found, Handler.looks
    assert found["peak_running"] == 2
    assert found["peak_kv_cache_usage"] == pytest.approx(looks / 10)
    assert found["peak_resident_bytes"] == 1.5e9
    assert found["prefix_cache_query_tokens"] == 100 * (looks - 1)
    assert found["prefix_cache_hit_rate"] == pytest.approx(0.25)


def test_a_load_that_ends_before_the_first_look_has_no_peaks_but_of_memory(url: str) -> None:
    with MetricsWatch(TargetSettings(base_url=url, model="m"), is_local=False) as watch:
        time.sleep(0.1)
    assert "peak_running" not in watch.found
    assert watch.found["peak_resident_bytes"] == 1.5e9
    assert watch.found["prefix_cache_query_tokens"] > 0


def test_a_server_without_metrics_has_none() -> None:
    with MetricsWatch(TargetSettings(base_url="http://127.0.0.1:9", model="m"), is_local=False) as watch:
        pass
    assert watch.found == {}
