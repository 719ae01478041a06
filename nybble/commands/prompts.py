"""Reading prompts from arguments, text and JSONL; everything wrong with a line is said with its number."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nybble.core.errors import ConfigError, RequestError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.text.request_builder import RequestBuilder

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
DEFAULT_MAX_TOKENS = 256
REQUEST_FIELDS = ("request_id", "priority", "cache_salt")


@dataclass(frozen=True)
class PromptLine:
    """One prompt: the fields of its JSONL line, or {"prompt": …}. `where` is for messages, `index` counts from 0."""

    fields: dict[str, Any]
    index: int
    where: str

    def check(self, sampling: dict[str, Any]) -> None:
        """
        Raises:
            RequestError: a field is unknown, missing or out of range.
        """
        given = [name for name in PROMPT_FIELDS if name in self.fields]
        if len(given) != 1:
            raise self._error(f"needs exactly one of {', '.join(PROMPT_FIELDS)}; it has {', '.join(given) or 'none'}")
        value = self.fields[given[0]]
        if given[0] == "prompt" and not isinstance(value, str):
            raise self._error(f"prompt must be text, got {type(value).__name__}")
        if given[0] == "prompt_token_ids" and not (isinstance(value, list) and all(type(i) is int for i in value)):
            raise self._error("prompt_token_ids must be a list of integers")
        known = {*PROMPT_FIELDS, *REQUEST_FIELDS, *SamplingParams.__struct_fields__}
        if unknown := sorted(set(self.fields) - known):
            raise self._error(f"has unknown fields: {', '.join(unknown)}")
        params = self._params(SamplingParams, sampling)
        try:
            Request(prompt_token_ids=[], params=params, **self._options())  # checks the types of the others
        except RequestError as error:
            raise self._error(str(error)) from None

    def request(self, builder: RequestBuilder, sampling: dict[str, Any], *, raw: bool) -> Request:
        """The request for a model. `raw` sends a prompt without the chat template."""
        (name,) = (name for name in PROMPT_FIELDS if name in self.fields)  # `check` has seen that it is one
        has_template = builder.tokenizer is not None and builder.tokenizer.chat_template is not None
        is_chat = name == "messages" or (name == "prompt" and has_template and not raw)
        make = builder.from_chat if is_chat else builder.from_prompt
        params = self._params(builder.default_params, {"max_tokens": DEFAULT_MAX_TOKENS} | sampling)
        try:
            return make(self.fields[name], params, **self._options())
        except RequestError as error:
            raise self._error(str(error)) from None

    def _options(self) -> dict[str, Any]:
        given = {name: self.fields[name] for name in REQUEST_FIELDS if name in self.fields}
        return {"request_id": str(self.index)} | given

    def _params(self, make: Callable[..., SamplingParams], sampling: dict[str, Any]) -> SamplingParams:
        own = {name: value for name, value in self.fields.items() if name in SamplingParams.__struct_fields__}
        if isinstance(own.get("logit_bias"), dict):  # JSON's keys are strings
            own["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in own["logit_bias"].items()}
        try:
            return make(**(sampling | own))
        except (AttributeError, TypeError, ValueError) as error:  # RequestError is a ValueError
            raise self._error(str(error)) from None

    def _error(self, message: str) -> RequestError:
        return RequestError(f"{self.where}{message}")


def from_texts(prompts: Iterable[str]) -> list[PromptLine]:
    return [PromptLine({"prompt": prompt}, index, "") for index, prompt in enumerate(prompts)]


def read_prompts(path: Path | None) -> list[PromptLine]:
    """Prompts of a file: JSONL if its name ends so, else a prompt a line, empty lines skipped. None: standard input,
    which is one prompt whatever its lines: that is what `cat question.txt | nybble generate …` means.

    Raises:
        ConfigError: the file cannot be read.
        RequestError: a line is no JSON object, or two have one request_id; names the line.
    """
    try:
        text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8-sig")  # Windows puts a mark before
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path or 'standard input'} is no UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    if path is None:
        text = text.removeprefix("\ufeff").rstrip("\n")
        return from_texts([text] if text.strip() else [])
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return from_texts(line.rstrip("\r") for _, line in numbered)
    lines = []
    taken: set[str] = set()
    for index, (number, line) in enumerate(numbered):
        where = f"{path}, line {number}: "
        fields = _parse(line, where)
        if "request_id" in fields:
            request_id = str(fields["request_id"])
            if request_id in taken:
                raise RequestError(f"{where}request_id {request_id!r} was used by an earlier line")
            taken.add(request_id)
        lines.append(PromptLine(fields, index, where))
    for prompt in lines:
        if "request_id" not in prompt.fields:
            prompt.fields["request_id"] = _free_id(str(prompt.index), taken)
    return lines


def _free_id(request_id: str, taken: set[str]) -> str:
    """A line without an id gets its index, unless another line has that for its own."""
    while request_id in taken:
        request_id = f"line-{request_id}"
    return request_id


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"{where}no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise RequestError(f"{where}must be a JSON object, got {type(fields).__name__}")
    return fields
