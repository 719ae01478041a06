"""The README's examples run as they stand."""

import asyncio
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.server import make_app, on_port, tiny_tokenizer

from nybble.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PROGRAMS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for _, code in BLOCKS for line in code.splitlines() if line.startswith("nybble ")]


def run(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def test_the_readme_has_examples() -> None:
    assert len(PROGRAMS) == 5
    assert len(COMMANDS) >= 5


def test_chat() -> None:
    assert run(PROGRAMS[0]) == "17 + 25 = 42\n4, 6, 15, 31, 92\n"


def test_generate() -> None:
    assert re.fullmatch(r"\[('(length|stop)'(, )?){8}\]\n", run(PROGRAMS[1]))


def test_streams() -> None:
    lines = run(PROGRAMS[2]).splitlines()
    assert len(lines) > 10
    assert lines[-1] == "3, 4, 5, 6, 7, 8, 9, 10, 11, 12"


@pytest.mark.slow
def test_a_client_of_the_server() -> None:
    """The same lines but for the port: the server here is a fake that gives one answer."""
    shown = []

    async def main() -> None:
        app = make_app(FakeEngine(tiny_tokenizer(), "3, 4, 5"), served_model_name="tiny")
        async with on_port(app) as url:
            assert "http://127.0.0.1:8000" in PROGRAMS[3]
            shown.append(await asyncio.to_thread(run, PROGRAMS[3].replace("http://127.0.0.1:8000", url)))

    asyncio.run(main())
    assert shown == ["3, 4, 5"]


def test_structured_outputs() -> None:
    assert run(PROGRAMS[4]) == "12 + 30 = 42\n"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if re.search(" bench | profile tiny|--measure", command) else ())
        for command in COMMANDS
        if "Qwen" not in command and "serve" not in command
    ],
)
def test_commands(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n"))
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(command)[1:])
    assert not exit_.value.code
    shown = capsys.readouterr().out
    if "17 + 25" in command:
        assert shown == "17 + 25 = 42\ne, q, b, y\n"
    assert shown.strip()
