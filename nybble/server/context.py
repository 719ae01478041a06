"""`Context`: what every route needs, made once for an application."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from nybble.core.checks import shown
from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.server.admission import Admission
from nybble.server.chat_format import ChatFormat
from nybble.server.errors import ApiError, bad_request
from nybble.server.settings import Limits, ServerSettings
from nybble.server.turns import Workers
from nybble.text.request_builder import RequestBuilder
from nybble.text.tokenizer import Tokenizer


class ReadyFacts(Protocol):
    """The part of `Ready` that the routes use."""

    model: str
    max_model_len: int
    vocab_size: int
    default_sampling: dict[str, Any]
    model_path: str
    settings: dict[str, str]


class Client(Protocol):
    """The part of `EngineClient` that the routes use."""

    @property
    def ready(self) -> Any: ...  # ReadyFacts | None
    @property
    def is_serving(self) -> bool: ...
    @property
    def open_ids(self) -> list[str]: ...
    def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]: ...
    def abort(self, request_id: str) -> None: ...
    def finish(self, request_id: str) -> None: ...
    def reset_prefix_cache(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Context:
    client: Client
    tokenizer: Tokenizer
    builder: RequestBuilder
    settings: ServerSettings
    admission: Admission
    workers: Workers
    created: int  # Unix seconds, shown as the model's
    chat_format: ChatFormat = field(default_factory=ChatFormat)

    @property
    def limits(self) -> Limits:
        return self.settings.limits

    def ready(self) -> ReadyFacts:
        """
        Raises:
            ApiError: the engine is not serving.
        """
        ready: ReadyFacts | None = self.client.ready
        if ready is None or not self.client.is_serving:
            raise ApiError(503, "the engine is not running; try again later", code="engine_dead")
        return ready

    def model_name(self, wanted: str | None = None) -> str:
        """The model's name, if `wanted` is that or nothing."""
        name = self.settings.served_model_name or self.ready().model
        if wanted is not None and wanted != name:
            raise ApiError(
                404,
                f"there is no model {shown(wanted)} here, only {name!r}",
                parameter="model",
                code="model_not_found",
            )
        return name

    def max_tokens(self, wanted: int | None, otherwise: int | None) -> int | None:
        """How many tokens to generate; where the client does not say, what the checkpoint does, within the limit."""
        if wanted is not None:
            return wanted
        default = self.ready().default_sampling.get("max_tokens", otherwise)
        limit = self.limits.max_output_tokens
        return default if limit is None else limit if default is None else min(default, limit)

    def check_priority(self, wanted: int) -> None:
        """Where it would change nothing, whoever asks for it is told."""
        if wanted and self.ready().settings["scheduling_policy"] != "priority":
            raise bad_request(
                f"priority {shown(wanted)} needs a server with --scheduling-policy priority; this one serves whoever "
                "comes first",
                "priority",
                "unsupported_field",
            )

    def check_length(self, text: str, parameter: str) -> None:
        """Before it is encoded, which takes its time."""
        if len(text) > self.limits.max_prompt_chars:
            raise bad_request(
                f"the prompt has {len(text)} characters, but may have at most {self.limits.max_prompt_chars}",
                parameter,
                "limit_exceeded",
            )

    def check_prompt(self, token_ids: list[int], parameter: str) -> None:
        """What is certain to be refused is refused before it queues."""
        most = self.ready().max_model_len - 1  # room for one to be generated
        if self.limits.max_prompt_tokens is not None:
            most = min(most, self.limits.max_prompt_tokens)
        if not token_ids:
            raise bad_request("the prompt has no tokens; it needs at least one", parameter, "invalid_value")
        if len(token_ids) > most:
            raise bad_request(
                f"the prompt has {len(token_ids)} tokens, but may have at most {most}",
                parameter,
                "context_length_exceeded",
            )
