"""What this machine is: processor, memory, GPUs and their driver, read without torch. None or []: not known."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

_GPU_FIELDS = {
    "name": "name",
    "driver_version": "driver",
    "memory.total": "memory_mib",
    "memory.used": "memory_used_mib",
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def resident_bytes() -> int | None:
    """Of this process and all that it started."""
    try:
        return sum(_resident_bytes(pid) for pid in _with_children(os.getpid()))
    except OSError:  # no /proc
        return None


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            for child in (task / "children").read_text().split():
                found += _with_children(int(child))
    return found


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without one."""
    answer = _nvidia_smi("driver_version")
    return (answer[0][0] or None) if answer else None


def gpus() -> list[dict[str, str]]:
    """Each NVIDIA GPU: name, driver, memory, clocks, power limit, as the driver tells them now."""
    return [dict(zip(_GPU_FIELDS.values(), row, strict=True)) for row in _nvidia_smi(*_GPU_FIELDS)]


def gpu_memory_used_mib() -> int | None:
    """Of all GPUs together."""
    rows = _nvidia_smi("memory.used")
    try:
        return sum(int(row[0]) for row in rows) if rows else None
    except ValueError:
        return None


def _nvidia_smi(*fields: str) -> list[list[str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
