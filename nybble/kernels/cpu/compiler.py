"""The C sources of this folder as one shared library, built once a machine by its own compiler for its own CPU.

Owns: finding the compiler, flags, the cache of built libraries, the entry to torch's thread pool. Does not know: what
the functions compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nybble.core import env
from nybble.core.log import logger

FOLDER = Path(__file__).parent
SOURCES = ("attention.c", "int4_linear.c", "rows.c")
HEADERS = ("threads.h", "vectors.h")
# Contracting a·b + c in all blocks of a kernel alike keeps a row's result independent of the block it is computed in.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
# Types by their number in vectors.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class BuildError(Exception):
    """Why the library cannot be had here, in one sentence."""


def compiler_command() -> list[str]:
    """CC (which may hold options), else the first of cc, gcc and clang on the PATH.

    Raises:
        BuildError: there is none, or CC is no command.
    """
    text = os.environ.get("CC", "")
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CC={text} in the environment is no command ({error}); mend or unset it") from None
    if command:
        return command
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("there is no C compiler (install gcc or clang, or set CC)")


def cpu_identity() -> str:
    """Whatever a native build depends on: a home directory may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.platform(), *sorted({line for line in lines if line.startswith(wanted)})])


def build(cache: Path) -> Path:
    """The library in the folder `cache`, built now unless it is there. Several processes may do so at once.

    Raises:
        BuildError: there is no compiler, or it fails, or the folder cannot be written.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    command = [*compiler_command(), *FLAGS, "-march=native" if is_x86 else "-mcpu=native"]
    try:
        version = _run([command[0], "--version"])
        texts = [(FOLDER / name).read_text("utf-8") for name in (*SOURCES, *HEADERS)]
        key = hashlib.sha256("\0".join([*texts, *command, version, cpu_identity()]).encode()).hexdigest()[:16]
        built = cache / f"kernels-{key}.so"
        if not built.exists():
            logger.info("building %s with %s", built, command[0])
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                target = Path(scratch) / built.name
                _run([*command, *(str(FOLDER / name) for name in SOURCES), "-o", str(target)])
                target.replace(built)  # atomic: nobody ever loads half a file
    except OSError as error:
        raise BuildError(f"the C kernels cannot be built: {error}") from error
    return built


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} cannot build the C kernels: {reason}")
    return done.stdout


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Calls release the GIL.

    Raises:
        BuildError: as `build`; or it cannot be loaded.
    """
    built = build(env.cache_dir() / "cpu")
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise BuildError(f"{built} cannot be loaded: {error}") from error


@functools.cache
def why_not() -> str | None:
    """None if the library can be used here, else the reason."""
    if sys.platform == "win32" or sys.byteorder != "little":
        return "the C kernels are for little-endian machines with a Unix"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def thread_pool() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch is linked with, so that the kernels share its threads.

    None if torch has another kind of pool: the kernels then run in the calling thread.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel  # also searches what libtorch_cpu depends on
        except (OSError, AttributeError) as error:
            logger.warning("the C kernels run in one thread: %s", error)
        else:
            return ctypes.cast(function, POINTER).value
    return None
