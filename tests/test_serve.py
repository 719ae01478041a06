"""`nybble serve` as a process: what it says, what it serves, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
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
            if found := re.search(r"Serving (\S+) on (http://[\d.]+:\d+\S*): [\d,]+ KV tokens, ready after", line):
                self.model, self.url = found.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(process.stderr or ()), daemon=True).start()
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0)

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
def serving(*flags: str) -> Iterator[Served]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*COMMAND, *flags], stderr=subprocess.PIPE, text=True, env=environment) as process:
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


def test_ctrl_c_while_it_loads() -> None:
    with subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Loading tiny")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(timeout=15) == 130


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-model-len", "1"], "max_model_len must be an integer"),
        (["--max-n", "0"], "max_n must be a positive number, got 0"),
        (["--ssl-certfile", "a.pem"], "--ssl-certfile and --ssl-keyfile go together"),
        (["--api-key-file", "missing"], "--api-key-file missing: "),
        (["--api-key", ""], "api_key must not be empty"),
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
        text = served.client.completions.create(
            model=served.model, prompt="A", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
        )
        assert text.choices[0].text in ("yes", "no")
    assert not any("Traceback" in line for line in served.lines)
