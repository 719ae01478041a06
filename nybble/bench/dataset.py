"""Files of prompts: JSONL, ShareGPT's JSON, and traces (when requests came and how long they were)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from nybble.core.errors import ConfigError

DatasetKind = Literal["prompts", "sharegpt", "trace"]
PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")


class Entry(NamedTuple):
    """One conversation. A turn is a prompt (or only its number of tokens) and the tokens to ask for, if known.

    `time`: seconds, of a trace.
    """

    turns: list[tuple[Any, int | None]]
    time: float | None = None


def read_dataset(path: Path, kind: DatasetKind | None, count: Callable[[str], int]) -> Sequence[Entry]:
    """Read a file. `count` tells how many tokens a text has.

    Raises:
        ConfigError: it cannot be read or is not of that kind; names the line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path}: {error}") from None
    kind = kind or _kind_of(path, text)
    read = {"prompts": _read_prompts, "sharegpt": _read_sharegpt, "trace": _read_trace}[kind]
    entries = read(path, text, count)
    if not entries:
        raise ConfigError(f"--dataset {path} holds no usable prompt (read as {kind}; --dataset-kind says otherwise)")
    return entries


def _kind_of(path: Path, text: str) -> DatasetKind:
    start = text.lstrip()[:1]
    if path.suffix == ".csv":
        return "trace"
    if start == "[":
        return "sharegpt"
    first = text.split("\n", 1)[0]
    return "trace" if '"timestamp"' in first else "prompts"


def _lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each line is, and its object."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--dataset {path}, line {number}"
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{where}: no JSON ({error})") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: must be a JSON object")
        rows.append((where, value))
    return rows


def _read_prompts(path: Path, text: str, count: Callable[[str], int]) -> list[Entry]:
    entries = []
    for where, row in _lines(path, text):
        names = [name for name in PROMPT_FIELDS if row.get(name)]
        if len(names) != 1:
            raise ConfigError(f"{where}: needs exactly one of {', '.join(PROMPT_FIELDS)}")
        asked = row.get("output_len", row.get("max_tokens"))
        if asked is not None and (not isinstance(asked, int) or asked < 1):
            raise ConfigError(f"{where}: output_len must be a number of tokens of at least 1, got {asked!r}")
        entries.append(Entry([(row[names[0]], asked)]))
    return entries


def _read_sharegpt(path: Path, text: str, count: Callable[[str], int]) -> list[Entry]:
    try:
        rows = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--dataset {path}: no JSON ({error})") from None
    entries = []
    for row in rows if isinstance(rows, list) else []:
        said = row.get("conversations", row.get("conversation")) if isinstance(row, dict) else None
        if not isinstance(said, list):
            raise ConfigError(f"--dataset {path}: each element of a ShareGPT file has a list `conversations`")
        turns: list[tuple[Any, int | None]] = []
        for asked, answered in zip(said[::2], said[1::2], strict=False):
            question, answer = (str(part.get("value", part.get("content", ""))) for part in (asked, answered))
            if asked.get("from", asked.get("role")) not in ("human", "user") or not question or not answer:
                break
            turns.append((question, count(answer)))
        if turns and (turns[0][1] or 0) >= 4:  # shorter ones tell little; vLLM's benchmark leaves them out too
            entries.append(Entry(turns))
    return entries


def _read_trace(path: Path, text: str, count: Callable[[str], int]) -> list[Entry]:
    """Mooncake's JSONL (timestamp in ms, input_length, output_length) or Azure's CSV (TIMESTAMP, ContextTokens,
    GeneratedTokens)."""
    is_csv = path.suffix == ".csv"
    if is_csv:
        rows = [(f"--dataset {path}, row {i}", row) for i, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    else:
        rows = _lines(path, text)
    names = (
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens") if is_csv else ("timestamp", "input_length", "output_length")
    )
    entries = []
    for where, row in rows:
        try:
            time, num_input, num_output = (row[name] for name in names)
            seconds = _seconds(time) if is_csv else float(time) / 1e3
            entries.append(Entry([(int(num_input), int(num_output))], seconds))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}: a trace has {', '.join(names)} ({type(error).__name__}: {error})") from None
        if entries[-1].turns[0][0] < 1 or (entries[-1].turns[0][1] or 0) < 1:
            raise ConfigError(f"{where}: lengths must be at least 1 token")
    return sorted(entries, key=lambda entry: entry.time or 0.0)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
