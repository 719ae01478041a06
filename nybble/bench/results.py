"""`ResultsFile`: what a run has measured so far, on disk after each repeat, so that a later run can go on from it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nybble.bench.environment import environment
from nybble.bench.metrics import combine
from nybble.core.errors import ConfigError

SCHEMA = 1


class ResultsFile:
    """Results by point and repeat. `facts`: what else belongs at the top of the file.

    Args:
        path: JSON file; None keeps them in memory.
        settings: what was asked; a file made with other settings is not gone on with.
        resume: go on with the file that is there; repeats with `faults` are not taken from it.

    Raises:
        ConfigError: the file cannot be written, or not be resumed.
    """

    def __init__(
        self,
        benchmark: str,
        path: Path | None,
        settings: Mapping[str, Any],
        *,
        formulas: Mapping[str, str],
        resume: bool = False,
    ) -> None:
        self.path = path
        self._head = {"schema": SCHEMA, "benchmark": benchmark, "settings": to_json(settings)}
        self._environment = environment()
        self._formulas = formulas
        self.facts: dict[str, Any] = {}
        self._points: dict[str, dict[str, Any]] = {}
        self._repeats: dict[str, list[dict[str, Any]]] = {}
        self._num_tried: dict[str, int] = {}  # repeats, those that were not kept too
        self.num_dropped = 0  # repeats of the file that is gone on with
        self.is_complete = False
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--output {path}: {path.parent} is no directory")
        if resume:
            self._read()

    def _read(self) -> None:
        if self.path is None:
            raise ConfigError("--resume goes on with a file: give its --output")
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text("utf-8"))
            settings = found["settings"]
            rows = found["results"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--resume: {self.path} is no results file ({error}); remove it to begin anew") from None
        if settings != self._head["settings"] or found.get("benchmark") != self._head["benchmark"]:
            names = [name for name in self._head["settings"] if settings.get(name) != self._head["settings"][name]]
            raise ConfigError(
                f"--resume: {self.path} was measured with other settings ({', '.join(names)}); "
                "give the same flags, or begin anew without --resume"
            )
        for row in rows:
            good = [repeat for repeat in row["repeats"] if not repeat.get("faults")]
            self.num_dropped += len(row["repeats"]) - len(good)
            self._num_tried[row["label"]] = 1 + max(r.get("repeat", i) for i, r in enumerate(row["repeats"]))
            if good:
                self._points[row["label"]] = row["point"]
                self._repeats[row["label"]] = good

    def num_repeats(self, label: str) -> int:
        """How many repeats of a point are there already."""
        return len(self._repeats.get(label, ()))

    def next_repeat(self, label: str) -> int:
        """A number that no repeat of the point has had, so that its prompts are new to the server."""
        return self._num_tried.get(label, 0)

    def add(self, label: str, point: Mapping[str, Any], repeat: dict[str, Any]) -> None:
        """Keep a repeat, and write the file."""
        self._points[label] = to_json(point)
        number = self.next_repeat(label)
        self._repeats.setdefault(label, []).append(to_json(repeat | {"repeat": number}))
        self._num_tried[label] = number + 1
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        """The points in the order they were measured, with medians and spreads."""
        return [
            {"label": label, "point": self._points[label], **combine(repeats), "repeats": repeats}
            for label, repeats in self._repeats.items()
        ]

    def document(self) -> dict[str, Any]:
        """All that the JSON file says. A run of one point has its fields at the top too, as vLLM's file has them."""
        rows = self.rows()
        top = {name: value for name, value in rows[0].items() if name != "repeats"} if len(rows) == 1 else {}
        return {
            **self._head,
            "complete": self.is_complete,
            "environment": self._environment,
            "formulas": self._formulas,
            **to_json(self.facts),
            **top,
            "results": rows,
        }

    def write(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n", "utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            raise ConfigError(f"--output {self.path}: {error.strerror}") from None

    def write_csv(self, path: Path) -> None:
        """A row a point: the numbers that are one value."""
        rows = [
            {"label": row["label"], **{k: v for k, v in row.items() if isinstance(v, int | float) or v is None}}
            for row in self.rows()
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise ConfigError(f"--csv {path}: {error.strerror}") from None


def to_json(value: Any) -> Any:
    """As it is after a way through JSON: tuples are lists; infinities are words."""
    return json.loads(json.dumps(msgspec.to_builtins(value)), parse_constant={"Infinity": "inf", "NaN": None}.get)
