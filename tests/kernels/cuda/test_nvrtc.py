"""Compiling at run time: the cache, its keys, what is said where it cannot work. With a compiler that only records."""

import sys
from pathlib import Path

import pytest

from nybble.core.errors import NybbleError
from nybble.kernels.cuda import nvrtc
from nybble.kernels.cuda.nvrtc import KernelError, compile_cached, read_sources


class Recorder:
    """Gives each compilation another cubin."""

    def __init__(self, version: str = "recorder 1") -> None:
        self.version = version
        self.calls: list[tuple[str, str, dict[str, str], list[str]]] = []

    def compile(self, name: str, source: str, headers: dict[str, str], options: list[str]) -> bytes:
        self.calls.append((name, source, dict(headers), options))
        return f"{self.version} #{len(self.calls)}".encode()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NYBBLE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "k.cu").write_text('#include "a.cuh"\nkernel')
    (tmp_path / "a.cuh").write_text('  #  include "b.cuh"\n#include <system>\na')
    (tmp_path / "b.cuh").write_text('#include "a.cuh"\nb')
    return tmp_path / "k.cu"


def test_sources_are_the_file_and_its_own_headers(source: Path) -> None:
    assert list(read_sources(source)) == ["k.cu", "a.cuh", "b.cuh"]


def test_equal_compilations_happen_once(source: Path, tmp_path: Path) -> None:
    compiler = Recorder()
    defines = (("BF16", 1), ("GROUP", 64))
    first = compile_cached(source, defines, "sm_90a", compiler)
    assert compile_cached(source, defines, "sm_90a", compiler) == first == b"recorder 1 #1"
    ((name, text, headers, options),) = compiler.calls
    assert (name, text) == ("k.cu", source.read_text())
    assert set(headers) == {"a.cuh", "b.cuh"}
    assert {"-DBF16=1", "-DGROUP=64", "--gpu-architecture=sm_90a"} <= set(options)
    files = [file.name for file in (tmp_path / "cache" / "cubin").iterdir()]
    assert len(files) == 1, "no temporary file stays"
    assert files[0].endswith(".cubin")


def test_whatever_changes_the_code_changes_the_key(source: Path, tmp_path: Path) -> None:
    compiler = Recorder()
    compile_cached(source, (("A", 1),), "sm_90a", compiler)
    compile_cached(source, (("A", 2),), "sm_90a", compiler)
    compile_cached(source, (("A", 1),), "sm_80", compiler)
    (tmp_path / "b.cuh").write_text("changed")
    compile_cached(source, (("A", 1),), "sm_90a", compiler)
    assert len(compiler.calls) == 4
    newer = Recorder("recorder 2")
    compile_cached(source, (("A", 1),), "sm_90a", newer)
    assert len(newer.calls) == 1


def test_a_failed_compilation_leaves_nothing_in_the_cache(source: Path, tmp_path: Path) -> None:
    class Failing(Recorder):
        def compile(self, *_: object) -> bytes:
            raise KernelError("line 1: error\nline 2: error")

    with pytest.raises(NybbleError, match="line 2"):
        compile_cached(source, (), "sm_90a", Failing())
    assert not (tmp_path / "cache").exists()


def test_a_machine_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc.why_not.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    assert "cuda-bindings is not installed" in (nvrtc.why_not() or "")
    nvrtc.why_not.cache_clear()
