"""CUDA C++ at run time: NVRTC compiles a `.cu` file (no nvcc), the cubin stays on disk, torch's stream runs it.

    kernel = nvrtc.kernel(Path("w4a16.cu"), "w4a16", (("BF16", 0), …), device)
    kernel.launch(grid=132, threads=256, shared_bytes=100_000, arguments=Arguments(…), overlap=True)

Sources include only files beside them, no CUDA header, so cuda-bindings and the NVRTC library (both come with torch's
CUDA wheels) are all it takes. Owns: compiling, the cache, launching. Does not know: any operation.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nybble.core.env import cache_dir
from nybble.core.errors import NybbleError
from nybble.core.log import logger

Defines = tuple[tuple[str, int], ...]


class KernelError(NybbleError):
    """A kernel did not compile, or the driver refused it."""


class Compiler(Protocol):
    """What turns sources into machine code; NVRTC, or a fake in tests."""

    version: str

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: list[str]) -> bytes:
        """The cubin. Raises KernelError with the full log."""
        ...


def read_sources(path: Path) -> dict[str, str]:
    """The file and everything it includes with quotes, transitively, by name; the file itself comes first."""
    sources: dict[str, str] = {}
    pending = [path.name]
    while pending:
        name = pending.pop()
        if name not in sources:
            sources[name] = (path.parent / name).read_text("utf-8")
            pending += re.findall(r'^\s*#\s*include\s+"([^"]+)"', sources[name], re.MULTILINE)
    return sources


def compile_cached(path: Path, defines: Defines, arch: str, compiler: Compiler) -> bytes:
    """The cubin of one source file, from the cache if these very sources, options and compiler were seen before.

    Args:
        arch: a real architecture such as "sm_90a".
    """
    sources = read_sources(path)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--use_fast_math"]
    options += [f"-D{name}={value}" for name, value in defines]
    # Lengths keep different splits of the same text apart.
    parts = [compiler.version, *options, *(text for item in sources.items() for text in item)]
    key = hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:32]
    cached = cache_dir() / "cubin" / f"{path.stem}-{arch}-{key}.cubin"
    if cached.exists():
        return cached.read_bytes()
    name, source = next(iter(sources.items()))
    cubin = compiler.compile(name, source, {n: text for n, text in sources.items() if n != name}, options)
    write_atomically(cached, cubin)
    logger.debug("compiled %s for %s into %s", name, arch, cached)
    return cubin


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the whole file or none, also when several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Nvrtc:
    """The real compiler."""

    def __init__(self) -> None:
        from cuda.bindings import nvrtc

        self._nvrtc = nvrtc
        self.version = "nvrtc {}.{}".format(*self._call(nvrtc.nvrtcVersion()))

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: list[str]) -> bytes:
        nvrtc = self._nvrtc
        texts = [text.encode() for text in headers.values()]
        names = [header.encode() for header in headers]
        created = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(texts), texts, names)
        (program,) = self._call(created)
        try:
            (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise KernelError(f"{name} does not compile with {' '.join(options)}:\n{self._log(program)}")
            cubin = bytes(self._call(nvrtc.nvrtcGetCUBINSize(program))[0])
            self._call(nvrtc.nvrtcGetCUBIN(program, cubin))
            return cubin
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _log(self, program: Any) -> str:
        log = bytes(self._call(self._nvrtc.nvrtcGetProgramLogSize(program))[0])
        self._call(self._nvrtc.nvrtcGetProgramLog(program, log))
        return log.rstrip(b"\0\n").decode(errors="replace")

    def _call(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        result, *values = answer
        if result != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"NVRTC: {result.name}")
        return tuple(values)


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled on this machine, in a sentence, or None. Loads the NVRTC library."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed (it comes with torch's CUDA wheels)"
    try:
        Nvrtc()
    except Exception as error:  # the loader raises several kinds; all mean that the library is missing or broken
        return f"the NVRTC library cannot be loaded (package nvidia-cuda-nvrtc): {str(error).splitlines()[0]}"
    return None


@dataclass(frozen=True)
class Kernel:
    """One compiled `extern "C"` function that takes a single struct by value, ready on one device."""

    name: str
    handle: Any  # CUfunction
    library: Any  # CUlibrary: keeps the code loaded

    def launch(
        self, *, grid: int, threads: int, shared_bytes: int, arguments: ctypes.Structure, overlap: bool = False
    ) -> None:
        """Enqueue on torch's current stream; also while a CUDA graph is being captured.

        Args:
            overlap: programmatic dependent launch: the kernel may start before its predecessor in the stream has
                finished and must itself wait (`wait_for_dependencies`) before it touches anything shared with it.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        check(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0), self.name)


@functools.cache
def kernel(path: Path, name: str, defines: Defines, device: torch.device) -> Kernel:
    """Compile (or find) function `name` of `path` and load it for `device`, with all its shared memory allowed."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    cubin = compile_cached(path, defines, arch, Nvrtc())
    torch.cuda.synchronize(device)  # makes sure that torch has its context
    library = check(driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0), name)
    handle = check(driver.cuLibraryGetKernel(library, name.encode()), name)
    attributes, ordinal = driver.CUfunction_attribute, driver.CUdevice(device.index or 0)
    fixed = check(driver.cuKernelGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle, ordinal), name)
    shared_limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - fixed
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_limit),
        # Kernels share a multiprocessor only if they split its memory between L1 and shared memory alike.
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        check(driver.cuKernelSetAttribute(attribute, value, handle, ordinal), name)
    return Kernel(name, driver.CUfunction(int(handle)), library)


def check(answer: tuple[Any, ...], name: str) -> Any:
    """The value of a driver call. Raises KernelError if it failed."""
    result, *values = answer
    if int(result) != 0:
        raise KernelError(f"kernel {name}: the CUDA driver answers {result.name}")
    return values[0] if values else None
