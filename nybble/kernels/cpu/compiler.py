"""C sources of this folder become shared libraries, once a machine: built by its own compiler for its own CPU.

Owns: finding the compiler, flags, the cache of built libraries. Does not know: what the functions compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from nybble.core import env
from nybble.core.log import logger

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


class BuildError(Exception):
    """Why a library cannot be built here, in one sentence."""


def find_compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


@functools.cache
def cpu_identity() -> str:
    """Whatever -march=native depends on: a home directory may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


@functools.cache
def library(source_name: str) -> ctypes.CDLL:
    """The library made from `source_name` in this folder, built now if the cache does not have it.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("there is no C compiler (install gcc, or set CC)")
    source = Path(__file__).parent / source_name
    command = [*compiler.split(), *FLAGS]
    key = hashlib.sha256("\n".join([source.read_text(), *command, cpu_identity()]).encode()).hexdigest()[:16]
    built = env.cache_dir() / "cpu" / f"{source.stem}-{key}.so"
    if not built.exists():
        logger.info("building %s with %s", source_name, compiler)
        build(command, source, built)
    return ctypes.CDLL(str(built))


def build(command: list[str], source: Path, built: Path) -> None:
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            target = Path(scratch) / built.name
            done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
            if done.returncode:
                reason = next(iter(done.stderr.splitlines()), f"exit status {done.returncode}")
                raise BuildError(f"{command[0]} cannot build {source.name}: {reason}")
            target.replace(built)  # atomic: another process may be building the same file
    except OSError as error:
        raise BuildError(f"{source.name} cannot be built: {error}") from error
