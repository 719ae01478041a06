"""`Recipe`: how an engine is started, asked whether it is ready, and told to use so much memory. Three are built in."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import msgspec

from nybble.core.errors import ConfigError


class Recipe(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A command line, in which {python}, {model}, {port} and {name} stand for this run's.

    `env`: set beside the user's environment. `ready`: a path that answers 200 when the engine can serve.
    `memory_flag`: takes the share of memory in a sweep. `prefix_cache_on`, `prefix_cache_off`: flags that say so, where
    it is not the default. `version`: a command that prints it.
    """

    command: list[str]
    env: dict[str, str] = {}
    ready: str = "/health"
    ready_timeout: float = 1200.0
    stop_timeout: float = 60.0
    memory_flag: str | None = None
    prefix_cache_on: list[str] = []
    prefix_cache_off: list[str] = []
    version: list[str] = []


BUILT_IN = {
    "nybble": Recipe(
        command=shlex.split("{python} -m nybble serve {model} --port {port} --served-model-name {name}"),
        memory_flag="--gpu-memory-utilization",
        prefix_cache_off=["--no-enable-prefix-caching"],
        version=["{python}", "-m", "nybble", "--version"],
    ),
    "vllm": Recipe(
        command=shlex.split(
            "python3 -m vllm.entrypoints.cli.main serve {model} --host 127.0.0.1 --port {port} "
            "--served-model-name {name}"
        ),
        memory_flag="--gpu-memory-utilization",
        prefix_cache_on=["--enable-prefix-caching"],
        prefix_cache_off=["--no-enable-prefix-caching"],
        version=["python3", "-c", "import importlib.metadata as m; print('vllm', m.version('vllm'))"],
    ),
    "lmdeploy": Recipe(
        command=shlex.split(
            "python3 -m lmdeploy serve api_server {model} --server-name 127.0.0.1 --server-port {port} "
            "--model-name {name}"
        ),
        memory_flag="--cache-max-entry-count",
        prefix_cache_on=["--enable-prefix-caching"],
        version=["python3", "-c", "import importlib.metadata as m; print('lmdeploy', m.version('lmdeploy'))"],
    ),
}


class TargetSpec(msgspec.Struct, frozen=True):
    """One `--target NAME=…`: a running server's URL, or a recipe with more flags for its command."""

    name: str
    url: str | None = None
    recipe: Recipe | None = None
    flags: list[str] = []


def parse_target(text: str) -> TargetSpec:
    """`a=http://host:8000`, `b=nybble --max-num-seqs 8`, `c=recipe.yaml --flag`.

    Raises:
        ConfigError: it is neither, or the recipe is faulty.
    """
    name, _, value = text.partition("=")
    if not name.strip() or not value.strip():
        raise ConfigError(f"--target {text}: give NAME=URL, NAME=RECIPE or NAME='RECIPE --its-flags'")
    if not all(character.isalnum() or character in "-_." for character in name):
        raise ConfigError(f"--target {text}: a name has letters, digits, - _ and . only, for files are called by it")
    if value.startswith(("http://", "https://")):
        return TargetSpec(name, url=value.strip())
    recipe, *flags = split_words(f"--target {text}", value)
    if recipe in BUILT_IN:
        return TargetSpec(name, recipe=BUILT_IN[recipe], flags=flags)
    if not recipe.endswith((".yaml", ".yml")):
        raise ConfigError(f"--target {text}: {recipe} is no URL, no .yaml file and none of {', '.join(BUILT_IN)}")
    return TargetSpec(name, recipe=read_recipe(Path(recipe)), flags=flags)


def split_words(what: str, text: str) -> list[str]:
    """As a shell does.

    Raises:
        ConfigError: a quote has no end; `what` names where.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {str(error).lower()}; close the quotation mark or escape it") from None


def read_recipe(path: Path) -> Recipe:
    """A recipe of a YAML file: `Recipe`'s fields, and `base` for the built-in one whose fields it changes.

    Raises:
        ConfigError: names the file and what is wrong in it.
    """
    import yaml

    try:
        value: Any = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"recipe {path}: must be a mapping with `command` or `base`")
    base = value.pop("base", None)
    if base is not None:
        if base not in BUILT_IN:
            raise ConfigError(f"recipe {path}: base must be one of {', '.join(BUILT_IN)}, got {base!r}")
        value = msgspec.to_builtins(BUILT_IN[base]) | value
    for field in ("command", "version", "prefix_cache_on", "prefix_cache_off"):
        if isinstance(value.get(field), str):
            value[field] = split_words(f"recipe {path}: {field}", value[field])
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"recipe {path}: {error}") from None
