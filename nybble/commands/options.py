"""Flags that are written once, elsewhere: every field of `EngineConfig`, `SamplingParams` and `Limits` is one.

A command asks for them by parameters named as in `GROUPS`, and gets dicts of those that were given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams

ModelArgument = Annotated[
    str, typer.Argument(help="Hugging Face id, local directory, or `tiny` (the embedded model).", show_default=False)
]

METAVARS = {int: "N", float: "X", str: "TEXT", list[int]: "N …", list[str]: "TEXT …"}
NOT_FLAGS = {
    "model",  # an argument
    "logit_bias",  # maps, and what only programs want: Python and JSONL have them
    "allowed_token_ids",
    "spaces_between_special_tokens",
    "detokenize",
}


@dataclass(frozen=True)
class Flag:
    """One optional command-line flag."""

    name: str
    type: Any
    default: Any
    help: str
    panel: str

    def parameter(self) -> inspect.Parameter:
        """The flag as a keyword parameter that is None where the flag is not given."""
        names: tuple[str, ...] = ()
        if self.type is bool:  # one flag, that changes the default
            names = (f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}",)
        option = typer.Option(
            *names,
            help=self.help,
            metavar=METAVARS.get(self.type),
            rich_help_panel=self.panel,
            show_default=False,
        )
        annotation = Annotated[self.type | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def value(self, given: Any) -> Any:
        return not self.default if self.type is bool else given


def engine_flags() -> list[Flag]:
    hints = get_type_hints(EngineConfig, include_extras=True)
    flags = []
    for field in fields(EngineConfig):
        if field.name in NOT_FLAGS:
            continue
        kind, text = get_args(hints[field.name])
        if field.name == "kernels":
            text = f"{text}; may be repeated"
        elif field.default is True:
            text = f"do not {text}"
        elif isinstance(field.default, str | int) and field.default is not False:
            text = f"{text}; default: {field.default}"
        flags.append(Flag(field.name, _flag_type(kind), field.default, text, "Engine"))
    return flags


def sampling_flags() -> list[Flag]:
    hints = get_type_hints(SamplingParams)
    texts = dict(re.findall(r"^ {8}(\w+): (.+)$", SamplingParams.__doc__ or "", re.MULTILINE))
    flags = []
    for name, default in zip(SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__, strict=True):
        if name in NOT_FLAGS:
            continue
        kind = _flag_type(hints[name])
        text = texts[name].rstrip(".")
        if default is True:
            text = f"do not {text}"
        elif get_origin(kind) is list:
            text = f"{text}; may be repeated"
        flags.append(Flag(name, kind, default, text, "Sampling"))
    return flags


def limit_flags() -> list[Flag]:
    from nybble.server.settings import Limits

    hints = get_type_hints(Limits, include_extras=True)
    flags = []
    for field in fields(Limits):
        kind, text = get_args(hints[field.name])
        text = f"most {text}" if field.default is None else f"most {text}; default: {field.default}"
        flags.append(Flag(field.name, _flag_type(kind), field.default, text, "Limits"))
    return flags


GROUPS = {"engine": engine_flags, "sampling": sampling_flags, "limits": limit_flags}


def with_flags(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameters named in `GROUPS` by the flags they stand for, except those in `without`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        groups = {group: make() for group, make in GROUPS.items() if group in own}
        # `seed` is in both groups: the later one, a request's, is the flag.
        flags = {flag.name: (group, flag) for group in groups for flag in groups[group] if flag.name not in without}

        @wraps(command)
        def called(**values: Any) -> None:
            dicts: dict[str, dict[str, Any]] = {group: {} for group in groups}
            for name, (group, flag) in flags.items():
                given = values.pop(name)
                if given not in (None, []):
                    dicts[group][name] = flag.value(given)
            if "kernels" in dicts.get("engine", {}):
                dicts["engine"]["kernels"] = _parse_kernels(dicts["engine"]["kernels"])
            command(**values, **dicts)

        parameters = [parameter for parameter in own.values() if parameter.name not in GROUPS]
        parameters += [flag.parameter() for _, flag in flags.values()]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del called.__wrapped__  # type: ignore[attr-defined]  # typer would look through it
        return called

    return decorate


def _flag_type(kind: Any) -> Any:
    """The type without None; dicts and `str | list[str]` become repeated strings."""
    members = [member for member in get_args(kind) if member is not type(None)]
    if get_origin(kind) is dict:
        return list[str]
    if type(None) in get_args(kind):
        lists = [member for member in members if get_origin(member) is list]
        return lists[0] if lists else members[0]
    return kind


def _parse_kernels(items: list[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    for item, (operation, _, implementation) in zip(items, pairs, strict=True):
        if not operation or not implementation:
            raise ConfigError(f"--kernels takes operation=implementation, got {item!r}")
    return {operation: implementation for operation, _, implementation in pairs}
