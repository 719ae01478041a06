"""How long nybble takes to its first token, in processes of their own: cold and warm, by phase.

    python -m nybble.bench.startup SETTINGS.json     what the parent starts: one start, told as a line of JSON

Cold: the checkpoint's files are dropped from the page cache, and kernels are compiled anew. Warm: neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nybble.core.errors import MeasurementError

PHASES = ("interpreter and imports", "locate", "load weights", "measure memory", "warm up", "first token")


def measure(engine: dict[str, Any], *, is_cold: bool) -> dict[str, Any]:
    """One start. `engine`: fields of `EngineConfig`, with the model as a directory.

    Returns: seconds of each phase, and their sum.

    Raises:
        MeasurementError: the process failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="nybble-startup-") as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps(engine))
        environment = dict(os.environ)
        if is_cold:
            environment["NYBBLE_CACHE_DIR"] = f"{folder}/cache"
            environment["TRITON_CACHE_DIR"] = f"{folder}/triton"
            _drop_from_page_cache(Path(engine["model"]))
        begin = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-m", "nybble.bench.startup", str(settings)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if run.returncode:
            raise MeasurementError(f"a start failed: {(run.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        told = json.loads(run.stdout.splitlines()[-1])
    seconds = {"interpreter and imports": told["imported_at"] - begin, **told["phases"], "first token": told["first"]}
    return {**{_field(name): value for name, value in seconds.items()}, "total_seconds": told["done_at"] - begin}


def _field(phase: str) -> str:
    return f"{phase.replace(' ', '_')}_seconds"


FIELDS = tuple(_field(phase) for phase in PHASES)


def _drop_from_page_cache(model: Path) -> None:
    """The kernel keeps file contents in memory; what is clean may be given up without being root."""
    for path in model.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _main() -> None:
    engine = json.loads(Path(sys.argv[1]).read_text())
    from nybble.core.sampling import SamplingParams
    from nybble.llm import LLM

    imported_at = time.perf_counter()
    with LLM(**engine) as llm:
        begin = time.perf_counter()
        llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False), progress=False)
        done_at = time.perf_counter()
        phases = llm.report.phase_seconds
    print(json.dumps({"imported_at": imported_at, "phases": phases, "first": done_at - begin, "done_at": done_at}))


if __name__ == "__main__":
    _main()
