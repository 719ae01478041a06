"""`GrammarCompiler`: forms are compiled once; what is unsound, endless or huge is refused, and the next one works."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.grammars import compiling, form, walk

from nybble.core.errors import RequestError
from nybble.grammar.compiler import GrammarCompiler

ENDLESS = "(.{1,1000}){1,1000}"


def refusal(compiler: GrammarCompiler, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        compiler.compile(form(**fields)).result(timeout=60)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def pids(compiler: GrammarCompiler) -> list[int]:
    return [lane._process._process.pid for lane in compiler._lanes if lane._process is not None]


def test_a_form_is_compiled_once() -> None:
    with compiling() as compiler:
        first = compiler.compile(form(regex="ab|cd"))
        again = compiler.compile(form(regex="ab|cd", source="response_format", reasoning="is_open"))
        assert first is again
        assert walk(first.result(timeout=60), 1) in ("ab", "cd")
        assert compiler.compile(form(regex="ab|cd")) is first
        assert compiler.num_compiled == 1
        assert compiler.compile(form(grammar='root ::= "ab"')).result(timeout=60) is not first.result()
        assert refusal(compiler, regex="[") == refusal(compiler, regex="[")
        assert compiler.num_compiled == 3
    with pytest.raises(RequestError, match="too many"):
        compiler.compile(form(regex="new")).result(timeout=1)


UNSOUND: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "not closed"),
    ({"regex": "(?=a)b"}, "Lookahead"),
    ({"regex": "(" * 50_000 + ")" * 50_000}, "Nest"),
    ({"regex": f"({'.*' * 40})*x"}, "ambiguous"),
    ({"grammar": "root ::= nothing"}, "not defined"),
    ({"grammar": 'rule ::= "a"'}, "root"),
    ({"grammar": "root ::= root"}, "no text has this form"),
    ({"grammar": "what is this?"}, ""),
    ({"json": {"type": "frob"}}, "frob"),
    ({"json": {"$ref": "#"}}, "no text has this form"),
    ({"json": {"$ref": "#/$defs/missing"}}, "$defs"),
    ({"json": {"$ref": "http://example.com/schema"}}, "URI"),
    ({"json": {"enum": []}}, "enum"),
    ({"json": {"type": "string", "pattern": "a+", "minLength": 3}}, "minLength"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
    ({"json": {"type": 5}}, ""),
    ({"json": {"properties": []}}, ""),
    ({"structural_tag": {"type": "structural_tag", "format": {"type": "nothing"}}}, ""),
]


def test_unsound_forms_are_refused_with_a_reason() -> None:
    with compiling() as compiler:
        for fields, words in UNSOUND:
            message = refusal(compiler, **fields)
            assert words in message, (fields, message)
            assert "cannot be used" in message
            assert ".cc" not in message
        assert walk(compiler.compile(form(choice=["x", 'y "z" \\ \n'])).result(timeout=60), 3)


@pytest.mark.slow
def test_an_endless_form_is_killed_and_keeps_no_one_waiting() -> None:
    with compiling(lane_seconds=(0.2, 0.6)) as compiler:
        assert walk(compiler.compile(form(choice=["a"])).result(timeout=60), 0) == "a"
        endless = compiler.compile(form(regex=ENDLESS))
        behind = compiler.compile(form(choice=["b"]))
        assert walk(behind.result(timeout=60), 0) == "b"
        with pytest.raises(RequestError, match=r"took more than 0.6 s or too much memory"):
            endless.result(timeout=60)
        assert compiler.compile(form(regex=ENDLESS)) is endless
        assert walk(compiler.compile(form(choice=["c"])).result(timeout=60), 0) == "c"
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids(compiler)):
        assert time.monotonic() < deadline


def test_a_process_that_dies_is_replaced() -> None:
    with compiling() as compiler:
        compiler.compile(form(choice=["a"])).result(timeout=60)
        (pid,) = pids(compiler)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert walk(compiler.compile(form(choice=["b"])).result(timeout=60), 0) == "b"


def test_a_process_that_does_not_start() -> None:
    with compiling(command=(sys.executable, "-c", "print('no')")) as compiler:
        assert "try again" in refusal(compiler, choice=["a"])
        assert "try again" in refusal(compiler, choice=["a"])
        assert compiler.num_cached_bytes == 0


def test_the_grammars_kept_have_a_bound() -> None:
    with compiling(cache_bytes=40_000) as compiler:
        kept = compiler.compile(form(choice=["kept"]))
        kept.result(timeout=60)
        for index in range(60):
            compiler.compile(form(choice=[f"word {index}"])).result(timeout=60)
            assert compiler.num_cached_bytes <= 40_000
            assert compiler.compile(form(choice=["kept"])) is kept, "it was used last"
        assert compiler.num_compiled == 61
        refusals = [refusal(compiler, regex="[" + "a" * count) for count in range(100)]
        assert len(refusals) == 100
        assert compiler.num_cached_bytes <= 40_000
        assert len(compiler._grammars) == len(compiler._sizes) < 60


def test_closing_refuses_what_waits() -> None:
    with compiling() as compiler:
        compiler.compile(form(choice=["a"])).result(timeout=60)
        waiting = [compiler.compile(form(regex=ENDLESS + str(index))) for index in range(3)]
    for future in waiting:
        with pytest.raises(RequestError):
            future.result(timeout=5)


def test_the_process_ends_with_its_parent() -> None:
    with compiling() as compiler:
        compiler.compile(form(choice=["a"])).result(timeout=60)
        process = compiler._lanes[0]._process
        assert process is not None
        assert process._process.stdin is not None
        process._process.stdin.close()
        assert process._process.wait(timeout=5) == 0
