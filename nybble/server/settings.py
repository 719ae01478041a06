"""`ServerSettings`: what an operator decides about the HTTP side. Frozen; the command makes it from flags."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated

from nybble.core.errors import ConfigError
from nybble.text.tool_calls import FORMATS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask for. None: no limit but the engine's own. Annotations are the flags' help texts."""

    max_head_bytes: Annotated[int, "bytes of a request's line and headers"] = 32 << 10
    max_head_seconds: Annotated[float, "seconds to send these in"] = 20.0
    max_body_bytes: Annotated[int, "bytes of a request's body"] = 8 << 20
    max_body_seconds: Annotated[float, "seconds to send a body in"] = 60.0
    max_send_seconds: Annotated[float, "seconds that a client may leave what is sent unread"] = 120.0
    max_json_depth: Annotated[int, "nesting of a body"] = 64
    max_json_containers: Annotated[int, "arrays and objects of a body; each costs far more than its two bytes"] = (
        1 << 16
    )
    max_prompts: Annotated[int, "prompts in one completion request"] = 1024
    max_prompt_chars: Annotated[int, "characters of a prompt, as the model's template writes it"] = 2 << 20
    max_prompt_tokens: Annotated[int | None, "tokens of a prompt"] = None
    max_n: Annotated[int, "completions of a prompt"] = 16
    max_logprobs: Annotated[int, "log-probabilities with each token"] = 20
    max_stops: Annotated[int, "stop strings"] = 16
    max_stop_chars: Annotated[int, "characters of a stop string"] = 256
    max_list_items: Annotated[int, "entries of bad_words, stop_token_ids and logit_bias"] = 1024
    max_output_tokens: Annotated[int | None, "tokens of a completion"] = None
    max_queued_requests: Annotated[int, "completions that wait for their first token; more get 429"] = 2048
    max_queued_tokens: Annotated[int | None, "prompt tokens of these"] = None
    max_queue_seconds: Annotated[float, "seconds that one of these waits before it gets 503"] = 600.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"{item.name} must be a positive number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """
    Args:
        admin_keys: open the control routes, and all others.
        allow_origins: pages of these origins may use the API from a browser; "*" is any.
        api_keys: with any, every route but /health and the page asks for one of them.
        served_model_name: what clients call the model; None is the engine's name for it.
        tool_call_parser: the format of the model's tool calls; None goes by its chat template.
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    served_model_name: str | None = None
    tool_call_parser: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, keys in (("api_key", self.api_keys), ("admin_key", self.admin_keys)):
            if not all(key and key == key.strip() for key in keys):
                # `--api-key "$KEY"` with KEY unset must not let everyone in.
                raise ConfigError(f"{name} must not be empty nor begin or end with blanks")
        if set(self.api_keys) & set(self.admin_keys):
            raise ConfigError("admin_key must be another than every api_key: those who have that are no admins")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(f"allow_origin must be * or like https://example.org, got {origin!r}")
        if self.tool_call_parser is not None and self.tool_call_parser not in FORMATS:
            raise ConfigError(f"tool_call_parser must be one of {', '.join(FORMATS)}, got {self.tool_call_parser!r}")
