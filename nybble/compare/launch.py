"""`Launched`: an engine's server as a child process: started, waited for, watched, and stopped with all it started."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from nybble.bench.connection import Disconnected
from nybble.bench.http_reader import MalformedResponse
from nybble.bench.target import Target, TargetSettings
from nybble.compare.recipe import Recipe
from nybble.core import machine
from nybble.core.errors import MeasurementError

FREED = 0.05
"""Of the memory a server took on the GPUs, so much may still be in use when the next one is started."""


class Launched:
    """A server that this process started.

    Args:
        log: file for all that it prints.

    Raises:
        MeasurementError: it cannot be started.
    """

    def __init__(self, recipe: Recipe, model: str, name: str, flags: list[str], log: Path) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [filled(part, model, name, self.port) for part in recipe.command] + flags
        self._recipe = recipe
        self._log = log
        self._gpu_memory_before = machine.gpu_memory_used_mib()
        try:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **recipe.env},
                    start_new_session=True,  # a group of its own, to be stopped with all its children
                )
        except OSError as error:
            raise MeasurementError(f"{self.command[0]} cannot be started: {error}") from None

    def wait_ready(self) -> float:
        """Seconds until it can serve.

        Raises:
            MeasurementError: it ended, or was not ready in time; with the last it said.
        """
        begin = time.monotonic()
        while time.monotonic() - begin < self._recipe.ready_timeout:
            if self._process.poll() is not None:
                raise MeasurementError(f"it ended with exit code {self._process.returncode}: {self.last_words()}")
            if asyncio.run(_answers(self.url, self._recipe.ready)):
                return time.monotonic() - begin
            time.sleep(0.25)
        raise MeasurementError(f"not ready within {self._recipe.ready_timeout:g} s: {self.last_words()}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def is_healthy(self) -> bool:
        """It lives and says that it can serve."""
        return self.is_alive and asyncio.run(_answers(self.url, self._recipe.ready))

    def last_words(self) -> str:
        """The last line of its log that names an error, else the last line."""
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        told = [line for line in lines if "rror" in line]
        return ((told or lines or ["it said nothing"])[-1])[:300]

    def stop(self) -> None:
        """SIGTERM to the server, which ends its children in order; then SIGKILL to what is left of the group.

        Returns when the GPU's memory is free again.
        """
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._recipe.stop_timeout)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._gpu_memory_before is not None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                used = machine.gpu_memory_used_mib()
                if used is None or used <= self._gpu_memory_before * (1 + FREED) + 512:
                    return
                time.sleep(0.5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def filled(text: str, model: str, name: str, port: int) -> str:
    """A word of a recipe with this run's values."""
    values = {"{python}": sys.executable, "{model}": model, "{name}": name, "{port}": str(port)}
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def version_of(recipe: Recipe, model: str, name: str) -> str | None:
    """What the recipe's version command prints."""
    if not recipe.version:
        return None
    command = [filled(part, model, name, 0) for part in recipe.version]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **recipe.env})
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


async def _answers(url: str, path: str) -> bool:
    target = Target(TargetSettings(base_url=url, model="", timeout=5.0))
    try:
        status, _ = await target.fetch(path)
        return status == 200
    except (OSError, Disconnected, MalformedResponse, TimeoutError):
        return False
    finally:
        target.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
