"""Flags that `bench serve` and `compare` share, and how their texts are read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nybble.bench.dataset import DatasetKind
from nybble.bench.synthetic import synthetic_config
from nybble.bench.target import Route
from nybble.core.errors import ConfigError

LOAD, WORKLOAD, MEASURE, OUTPUT = "Load", "Workload", "Measuring", "Output"

ConcurrencyFlag = Annotated[
    str | None,
    typer.Option("--concurrency", help="Closed loop: streams, e.g. 1,4,16.", rich_help_panel=LOAD, show_default=False),
]
RequestRateFlag = Annotated[
    str | None,
    typer.Option(
        "--request-rate",
        help="Open loop: requests a second, e.g. 2,4 or inf.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
NumPromptsFlag = Annotated[
    int | None,
    typer.Option(
        "--num-prompts",
        help="Prompts a point; default: 4 a stream, at least 32, or all of a dataset.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
InputLenFlag = Annotated[
    str, typer.Option("--input-len", help="Tokens of a prompt, or a range: 64-256.", rich_help_panel=WORKLOAD)
]
OutputLenFlag = Annotated[
    str | None,
    typer.Option(
        "--output-len",
        help="Tokens to ask for, or a range; default: what a dataset says, else 64.",
        rich_help_panel=WORKLOAD,
        show_default=False,
    ),
]
PrefixLenFlag = Annotated[
    int, typer.Option("--prefix-len", help="Tokens that prompts begin with in common.", rich_help_panel=WORKLOAD)
]
NumPrefixesFlag = Annotated[
    int, typer.Option("--num-prefixes", help="Different common beginnings.", rich_help_panel=WORKLOAD)
]
TurnsFlag = Annotated[
    int,
    typer.Option("--turns", help="Turns of a conversation; each has what was said before.", rich_help_panel=WORKLOAD),
]
DatasetFlag = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        help="Prompts from a file: JSONL, ShareGPT's JSON, or a trace (Mooncake's JSONL, Azure's CSV).",
        rich_help_panel=WORKLOAD,
        show_default=False,
    ),
]
DatasetKindFlag = Annotated[
    DatasetKind | None,
    typer.Option("--dataset-kind", help="Default: seen from the file.", rich_help_panel=WORKLOAD, show_default=False),
]
SeedFlag = Annotated[int, typer.Option("--seed", help="Of prompts, lengths and arrivals.", rich_help_panel=WORKLOAD)]
RepeatPromptsFlag = Annotated[
    bool,
    typer.Option(
        "--repeat-prompts",
        help="Send the same prompts at every point and repeat, so that a prefix cache has them.",
        rich_help_panel=WORKLOAD,
    ),
]
RouteFlag = Annotated[
    Route, typer.Option("--route", help="/v1/completions or /v1/chat/completions.", rich_help_panel=WORKLOAD)
]
TokenizerFlag = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="The model's directory or Hugging Face id, for prompts of exact lengths; without it prompts are made of "
        "common words, whose cost in tokens is measured.",
        rich_help_panel=WORKLOAD,
        show_default=False,
    ),
]
ApiKeyFlag = Annotated[
    str | None,
    typer.Option("--api-key", help="The servers' key.", envvar="OPENAI_API_KEY", show_default=False),
]
TemperatureFlag = Annotated[
    float, typer.Option("--temperature", help="Sent with each request.", rich_help_panel=WORKLOAD)
]
NoIgnoreEosFlag = Annotated[
    bool,
    typer.Option(
        "--no-ignore-eos", help="Let answers end by themselves, before --output-len.", rich_help_panel=WORKLOAD
    ),
]
ExtraBodyFlag = Annotated[
    str | None,
    typer.Option(
        "--extra-body", help="JSON object that goes into each request.", rich_help_panel=WORKLOAD, show_default=False
    ),
]
RepeatsFlag = Annotated[int, typer.Option("--repeats", help="Of each point.", rich_help_panel=MEASURE)]
WarmupsFlag = Annotated[
    int | None,
    typer.Option(
        "--warmups",
        help="Requests before each repeat that do not count; default: one a stream, at most 64.",
        rich_help_panel=MEASURE,
        show_default=False,
    ),
]
ClientsFlag = Annotated[int, typer.Option("--clients", help="Client processes.", rich_help_panel=MEASURE)]
GoodputFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--goodput",
        help="Objective that a good request keeps, in ms: ttft:200, tpot:50 or e2el:3000; may be repeated.",
        rich_help_panel=MEASURE,
        show_default=False,
    ),
]
TimeoutFlag = Annotated[float, typer.Option("--timeout", help="Seconds for one request.", rich_help_panel=MEASURE)]
ResumeFlag = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run's results.", rich_help_panel=OUTPUT)
]
DetailedFlag = Annotated[
    bool, typer.Option("--detailed", help="Keep each request's times in the JSON file.", rich_help_panel=OUTPUT)
]


def _writable(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """As the flags are read, long before there is anything to write."""
    if path is not None:
        check_writable(parameter.opts[0], path)
    return path


def check_writable(flag: str, path: Path) -> None:
    """A file that is to be written.

    Raises:
        ConfigError: it cannot be.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: {path.parent} is no directory")
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory; give a file's name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: may not be written")


OutputFlag = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Results as JSON.", callback=_writable, rich_help_panel=OUTPUT, show_default=False
    ),
]
CsvFlag = Annotated[
    Path | None,
    typer.Option("--csv", help="Results as CSV, too.", callback=_writable, rich_help_panel=OUTPUT, show_default=False),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Hugging Face id, local directory, or `tiny`.", show_default=False),
]
SyntheticFlag = Annotated[
    str | None,
    typer.Option(
        "--synthetic",
        help="Random weights in a known shape instead of a model: qwen2.5-32b-awq, llama-3-8b-awq …",
        show_default=False,
    ),
]


def is_terminal() -> bool:
    """Whether a bar is wanted."""
    return sys.stderr.isatty()


def check_model(model: str | None, synthetic: str | None) -> None:
    if (model is None) == (synthetic is None):
        raise ConfigError("give a MODEL, or --synthetic with the name of a shape")
    if synthetic is not None:
        synthetic_config(synthetic)


def check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ConfigError("--repeats must be at least 1")


def fail(message: str) -> NoReturn:
    """Exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def parse_counts(flag: str, text: str) -> list[int]:
    """`1,4,16`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: give whole numbers, like 1,4,16") from None
    if not values or min(values) < 1:
        raise ConfigError(f"{flag} {text}: must be at least 1")
    return list(dict.fromkeys(values))


def parse_rates(flag: str, text: str) -> list[float]:
    """`2,4.5,inf`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text}: give requests a second, like 2,4.5 or inf") from None
    if not all(value > 0 for value in values):
        raise ConfigError(f"{flag} {text}: must be above 0")
    return list(dict.fromkeys(values))


def parse_span(flag: str, text: str) -> tuple[int, int]:
    """`128`, or `64-256`."""
    low, dash, high = text.partition("-")
    try:
        span = (int(low), int(high if dash else low))
    except ValueError:
        raise ConfigError(f"{flag} {text}: give a number of tokens, or a range like 64-256") from None
    if not 1 <= span[0] <= span[1]:
        raise ConfigError(f"{flag} {text}: a length is at least 1, and a range goes from the smaller to the larger")
    return span


def parse_objectives(texts: list[str]) -> dict[str, float]:
    """`ttft:200` … in milliseconds."""
    objectives = {}
    for text in " ".join(texts).split():
        name, _, value = text.partition(":")
        try:
            objectives[name] = float(value)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el") or not objectives[name] > 0:
            raise ConfigError(f"--goodput {text}: give ttft:MS, tpot:MS or e2el:MS")
    return objectives


def parse_body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--extra-body: no JSON ({error})") from None
    if not isinstance(body, dict):
        raise ConfigError(f"--extra-body: must be a JSON object, got {type(body).__name__}")
    return body


def tokenizer_directory(name: str | None) -> str | None:
    """Where a model's tokenizer is, downloaded if need be."""
    if name is None:
        return None
    from nybble.models.checkpoint import TINY

    if name == "tiny":
        return str(TINY)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return snapshot_download(name, allow_patterns=["tokenizer*", "*.jinja", "vocab*", "merges.txt", "config.json"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"--tokenizer {name}: no directory, and Hugging Face has not got it ({error})") from None
