"""`nybble serve` as a process: what it says, what it serves, and how it ends."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pytest
from openai import APIError, BadRequestError, OpenAI
from pydantic import BaseModel, Field

from nybble.cli import main

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "nybble", "serve", "tiny", "--port", "0", "--kv-cache-memory-bytes", str(16 << 20)]
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            if found := re.search(r"Serving (\S+) on (https?://[\d.]+:\d+[/\w]*): [\d,]+ KV tokens, ready after", line):
                self.model, self.url = found.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reading = threading.Thread(target=self._read_on, daemon=True)
        self._reading.start()
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0)

    def _read_on(self) -> None:
        with suppress(ValueError):  # a test that wants no more closes it
            self.lines.extend(self.process.stderr or ())

    def has_said_all(self) -> bool:
        self._reading.join(timeout=5)
        return not self._reading.is_alive()

    def engine_pid(self) -> int:
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def stream(self, num_tokens: int) -> Any:
        return self.client.chat.completions.create(
            model=self.model,
            messages=QUESTION,
            max_tokens=num_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@contextmanager
def serving(*flags: str, **options: Any) -> Iterator[Served]:
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*COMMAND, *flags], stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield Served(process)
        finally:
            process.kill()


def test_it_serves_the_embedded_model() -> None:
    with serving("--served-model-name", "little", "--api-key", "secret", "--max-n", "2") as served:
        assert served.model == "little"
        answer = served.client.chat.completions.create(model="little", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == "12 + 30 = 42"
        chunks = list(served.stream(30))
        assert chunks[-1].choices[0].finish_reason == "length"
        keyed = {"Authorization": "Bearer secret"}
        metrics = httpx.get(f"{served.url}/metrics", headers=keyed).text
        assert re.search(r'nybble:request_success_total\{finished_reason="stop",model_name="little"\} 1\.0', metrics)
        assert re.search(r'nybble:generation_tokens_total\{model_name="little"\} \d\d', metrics)
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        refused = httpx.post(
            f"{served.url}/v1/completions", json={"model": "little", "prompt": "a", "n": 3}, headers=keyed
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        page = httpx.get(served.url)
        assert page.status_code == 200
        assert "script-src 'sha256-" in page.headers["content-security-policy"]


def test_sigterm_lets_running_requests_finish() -> None:
    with serving() as served:
        stream = served.stream(900)
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert served.process.wait(timeout=20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    assert not any("Traceback" in line for line in served.lines)


def test_a_second_signal_does_not_wait() -> None:
    with serving() as served:
        streams = [served.stream(2000) for _ in range(4)]
        for stream in streams:
            next(stream)
        engine = served.engine_pid()
        begin = time.monotonic()
        for _ in range(2):
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert served.process.wait(timeout=15) == 0
        assert time.monotonic() - begin < 10
        assert not Path(f"/proc/{engine}").exists()


def test_what_outlasts_the_shutdown_timeout_is_told() -> None:
    with serving("--shutdown-timeout", "0.3") as served:
        streams = [served.stream(2000) for _ in range(8)]
        for stream in streams:
            next(stream)
        served.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        for stream in streams:
            with pytest.raises(APIError, match="the server is shutting down"):
                list(stream)
        assert served.process.wait(timeout=20) == 0
        assert time.monotonic() - begin < 8
        assert served.has_said_all()
    assert not [line for line in served.lines if "Traceback" in line or "CancelledError" in line]


def test_sigterm_under_load() -> None:
    """Every request is answered, refused or told; none hangs, and nothing is a surprise to the log."""
    with serving("--shutdown-timeout", "20", "--max-num-seqs", "4") as served:
        outcomes: list[str] = []

        def ask() -> None:
            body = {"model": "tiny", "messages": QUESTION, "max_tokens": 30, "ignore_eos": True}
            for _ in range(20):
                try:
                    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
                except httpx.TransportError as error:
                    outcomes.append(type(error).__name__)
                    return
                outcomes.append(str(answer.status_code))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        served.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(timeout=40)
        assert served.process.wait(timeout=20) == 0
        assert served.has_said_all()
    assert outcomes.count("200") >= 12
    assert set(outcomes) <= {"200", "503", "ConnectError", "ReadError", "RemoteProtocolError"}
    assert not any("Traceback" in line for line in served.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_them_as_one_to_the_first(number: int) -> None:
    """A terminal's Ctrl-C reaches the process group; systemd's SIGTERM each process of a service."""
    with serving("--shutdown-timeout", "20", start_new_session=True) as served:
        form = {"structured_outputs": {"choice": ["yes", "no"]}}  # a process that compiles runs from now on
        answer = served.client.chat.completions.create(model="tiny", messages=QUESTION, extra_body=form)
        assert answer.choices[0].message.content in ("yes", "no")
        streams = [served.stream(700) for _ in range(4)]
        for stream in streams:
            next(stream)
        engine = served.engine_pid()
        os.killpg(served.process.pid, number)
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert served.process.wait(timeout=20) == 0
        assert served.has_said_all()
        assert not Path(f"/proc/{engine}").exists()
    heard = [
        line for line in served.lines if " INFO request " not in line and not line.startswith(("Loading", "Serving"))
    ]
    assert not heard, "nothing alarms"


def test_logs_in_json_tls_and_control(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--log-format", "json")
    with serving(*flags, "--admin-key", "root", "--root-path", "/llm/") as served:
        assert served.url.startswith("https://")
        assert served.url.endswith("/llm")
        with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as client:
            url = served.url.removesuffix("/llm")  # as a proxy sends it, that has taken the prefix off
            body = {"messages": QUESTION, "temperature": 0}
            answer = client.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
            assert answer.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"
            admin = {"authorization": "Bearer root"}
            cached = []
            for may_reset in (False, True, True):
                answer = client.post(f"{url}/v1/completions", json={"prompt": [5] * 64, "max_tokens": 1})
                cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
                headers = admin if may_reset else {}
                reset = client.post(f"{url}/reset_prefix_cache", headers=headers)
                assert reset.status_code == (200 if may_reset else 403)
            assert (cached[0], cached[2]) == (0, 0)
            assert cached[1] > 0
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=20) == 0
        assert served.has_said_all()
    lines = [json.loads(line) for line in served.lines]
    assert lines[0]["message"] == "Loading tiny …"
    access = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in access] == [200, 200, 403, 200, 200, 200, 200]
    assert (access[0]["request_id"], access[0]["finish_reasons"]) == ("mine", "stop")
    assert access[0]["completion_tokens"] > 5
    assert access[0]["queue_seconds"] >= 0


def test_a_full_disk_for_the_log_does_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with open("/dev/full", "wb") as full, subprocess.Popen([*COMMAND, "--uds", str(path)], stderr=full) as process:
        try:
            end = time.monotonic() + 30
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://local") as client:
                while True:
                    with suppress(httpx.TransportError):
                        if client.get("/health").status_code == 200:
                            break
                    assert process.poll() is None, "the server has ended"
                    assert time.monotonic() < end
                    time.sleep(0.05)
                for _ in range(50):
                    body = {"messages": QUESTION, "temperature": 0}
                    answer = client.post("/v1/chat/completions", json=body)
                    assert answer.json()["choices"][0]["message"]["content"] == "12 + 30 = 42"
                    assert client.get("/nowhere").status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0
        finally:
            process.kill()


def test_traces_without_their_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "tiny", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces"])
    assert exit_.value.code == 2
    assert "pip install 'nybble[otel]'" in capsys.readouterr().err


def test_an_engine_that_is_killed_is_told_and_replaced() -> None:
    with serving() as served:
        stream = served.stream(2000)
        next(stream)
        os.kill(served.engine_pid(), signal.SIGKILL)
        with pytest.raises(Exception, match="engine"):
            list(stream)
        statuses = set()
        end = time.monotonic() + 20
        while 200 not in statuses or len(statuses) < 2:
            statuses.add(httpx.get(f"{served.url}/health").status_code)
            assert time.monotonic() < end, statuses
        assert statuses == {200, 503}
        answer = served.client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == "12 + 30 = 42"


def test_the_request_of_a_killed_client_ends_within_a_step() -> None:
    with serving() as served:
        program = f"""
import httpx
body = {{"prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": 2000}}
with httpx.stream("POST", "{served.url}/v1/completions", json=body, timeout=60) as response:
    for line in response.iter_lines():
        print(line, flush=True)
"""
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline()
            client.kill()

        def metric(name: str) -> float:
            text = httpx.get(f"{served.url}/metrics").text
            return float(re.findall(rf"^nybble:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0])

        begin = time.monotonic()
        while metric("num_requests_running"):
            assert time.monotonic() - begin < 5
        num_generated = metric("generation_tokens_total")
        assert 0 < num_generated < 1500
        time.sleep(0.1)
        assert metric("generation_tokens_total") == num_generated


def test_a_busy_port_shows_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit_:
        main(["serve", "tiny", "--port", str(taken.getsockname()[1])])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "choose another port" in shown
    assert "Loading" not in shown


def test_a_unix_socket_is_this_users_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with subprocess.Popen([*COMMAND, "--uds", str(path)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "Serving" not in (line := process.stderr.readline()):
            assert line
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://local/health").json() == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
    assert not path.exists()


def test_a_hanging_engine_keeps_neither_requests_nor_the_end_waiting() -> None:
    """More messages than a socket's default queue holds are on their way to a process that reads none."""
    with serving("--shutdown-timeout", "2") as served:
        engine = served.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        statuses: list[int] = []

        def post(num_prompts: int) -> None:
            body = {"model": "tiny", "prompt": ["a"] * num_prompts, "max_tokens": 1}
            statuses.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code)

        threads = [threading.Thread(target=post, args=(count,)) for count in (1000, 3, 1)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        os.kill(engine, signal.SIGKILL)
        for thread in threads:
            thread.join(timeout=20)
        assert statuses == [503] * 3
        engine = 0
        end = time.monotonic() + 20
        while not engine:
            assert time.monotonic() < end
            if httpx.get(f"{served.url}/health").status_code == 200:
                engine = served.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=30) == 0
        assert not Path(f"/proc/{engine}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.03, 0.1, 0.3])
def test_a_signal_to_all_processes_while_it_loads(seconds: float, number: int) -> None:
    """The engine's may have begun just now, and not yet know that signals are not its own."""
    with subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Loading tiny")
        time.sleep(seconds)
        os.killpg(process.pid, number)
        assert process.stderr.read() == ""
        assert process.wait(timeout=15) == 130


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-model-len", "1"], "max_model_len must be an integer"),
        (["--max-n", "0"], "max_n must be a positive number, got 0"),
        (["--ssl-certfile", "a.pem"], "--ssl-certfile and --ssl-keyfile go together"),
        (["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"], "--ssl-certfile a.pem --ssl-keyfile b.pem: "),
        (["--api-key-file", "missing"], "--api-key-file missing: "),
        (["--api-key", ""], "api_key must not be empty"),
        (["--admin-key", ""], "admin_key must not be empty"),
        (["--admin-key", "a", "--api-key", "a"], "admin_key must be another than every api_key"),
        (["--allow-origin", "example.org"], "allow_origin must be * or like https://example.org"),
        (["--root-path", "llm"], "--root-path must begin with /"),
        (["--max-queue-seconds", "0"], "max_queue_seconds must be a positive number"),
        (["--port", "99999"], "--host 127.0.0.1 --port 99999: "),
        (["--uds", "/no/such/folder/socket"], "--uds /no/such/folder/socket: "),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "tiny", *flags])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("error: ")
    assert message in shown[-1]


def test_an_empty_key_file_does_not_open_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n\n")
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "tiny", "--api-key-file", str(tmp_path / "keys")])
    assert exit_.value.code == 2
    assert "holds no key" in capsys.readouterr().err


def test_a_model_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "./nowhere"])
    assert exit_.value.code == 2
    assert "error: ./nowhere: no such directory" in capsys.readouterr().err


def test_structured_outputs_and_forced_tools() -> None:
    class Person(BaseModel):
        name: Literal["Ann", "Bob"]
        children: Annotated[list[Literal["x", "y"]], Field(max_length=3)]

    weather = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Łódź"]}}}}
    weather["parameters"]["required"] = ["city"]  # type: ignore[index]
    tools: Any = [{"type": "function", "function": weather}]
    with serving("--tool-call-parser", "hermes") as served:
        ask = {"model": served.model, "messages": QUESTION, "max_tokens": 300, "temperature": 1.0}
        parsed = served.client.chat.completions.parse(**ask, response_format=Person)  # type: ignore[call-overload]
        assert isinstance(parsed.choices[0].message.parsed, Person)
        running = served.stream(1500)
        next(running)
        for refused in ({"regex": "["}, {"regex": "(.{1,1000}){1,1000}"}, {"grammar": "root ::= root"}):
            with pytest.raises(BadRequestError) as caught:
                served.client.chat.completions.create(**ask, stream=True, extra_body={"structured_outputs": refused})
            assert caught.value.param == "structured_outputs"
        assert list(running)[-1].choices[0].finish_reason == "length"
        for choice, reason in (
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "weather"}}, "stop"),
        ):
            body = {**ask, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "seed": 3}
            answer = served.client.chat.completions.create(**body).choices[0]
            (call,) = answer.message.tool_calls
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Łódź")
            assert (call.function.name, answer.message.content, answer.finish_reason) == ("weather", None, reason)
            with served.client.chat.completions.stream(**body) as stream:
                streamed = stream.get_final_completion().choices[0]
            assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
        metrics = httpx.get(f"{served.url}/metrics").text
        assert re.search(r'request_success_total\{finished_reason="abort",\S+ 0\.0', metrics), "forced calls end well"
        text = served.client.completions.create(
            model=served.model, prompt="A", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
        )
        assert text.choices[0].text in ("yes", "no")
    assert not any("Traceback" in line for line in served.lines)
