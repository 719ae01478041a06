"""The cache of built kernels: no compiler, a failing one, a changed one, and several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nybble.kernels.cpu import compiler, int4_linear
from nybble.kernels.op import Spec

needs_compiler = pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
SPEC = Spec(device=torch.device("cpu"), dtype=torch.float32, sizes={"group_size": 32})


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """An empty cache, and nothing remembered in this process, before and after."""
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "cache"))
    remembered = (compiler.library, compiler.why_not)
    for function in remembered:
        function.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_a_reason_not_an_error(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert int4_linear.c_why_not(SPEC) == "there is no C compiler (install gcc or clang, or set CC)"


def test_a_compiler_that_does_not_exist_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "/nowhere/cc" in int4_linear.c_why_not(SPEC)


def test_a_command_that_cannot_be_read_is_a_reason(fresh, monkeypatch):
    monkeypatch.setenv("CC", 'gcc "-O2')
    assert int4_linear.c_why_not(SPEC).startswith('CC=gcc "-O2 in the environment is no command (No closing quotation)')


def test_a_failing_compiler_is_quoted(fresh, monkeypatch):
    text = '[ "$1" = --version ] && exit 0\necho "note: one" >&2\necho "x.c:1: error: two" >&2\nexit 1'
    monkeypatch.setenv("CC", script(fresh / "failing", text))
    assert int4_linear.c_why_not(SPEC).endswith("failing cannot build the C kernels: x.c:1: error: two")
    assert list((fresh / "cache" / "cpu").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_reason(fresh, monkeypatch):
    (fresh / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("CC", script(fresh / "cc", "exit 0"))
    assert "cannot be built" in int4_linear.c_why_not(SPEC)


def test_a_library_that_does_not_load_is_a_reason(fresh, monkeypatch):
    text = '[ "$1" = --version ] && exit 0\nfor last; do :; done\necho rubbish > "$last"'
    monkeypatch.setenv("CC", script(fresh / "cc", text))
    assert "cannot be loaded" in int4_linear.c_why_not(SPEC)


def test_builds_once_and_again_for_another_compiler_version(fresh, monkeypatch):
    log = fresh / "log"
    text = f'[ "$1" = --version ] && echo $VERSION && exit 0\necho built >> {log}\nfor last; do :; done\necho > "$last"'
    monkeypatch.setenv("CC", script(fresh / "cc", text))
    monkeypatch.setenv("VERSION", "1")
    first = compiler.build(fresh / "cache")
    assert compiler.build(fresh / "cache") == first
    assert log.read_text().count("built") == 1
    monkeypatch.setenv("VERSION", "2")
    assert compiler.build(fresh / "cache") != first
    assert log.read_text().count("built") == 2


@needs_compiler
@pytest.mark.slow
def test_processes_may_build_at_once(tmp_path):
    code = (
        "from nybble.kernels.cpu import compiler; print(compiler.why_not(), compiler.library().int4_linear is not None)"
    )
    environment = {**os.environ, "NYBBLE_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["None True"] * 3
    assert len(list((tmp_path / "cpu").iterdir())) == 1


@needs_compiler
def test_threads_are_torchs_own():
    assert compiler.thread_pool() is not None
    if sys.platform == "linux":
        maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
        runtimes = {Path(path).name for path in maps if "libgomp" in path or "libomp" in path or "libiomp" in path}
        assert len(runtimes) == 1, runtimes
